"""The messages that docs/troubleshooting.md explains are those of the source."""

from __future__ import annotations

import ast
import re

from documents import ROOT

PLACEHOLDER = "…"


def test_every_message_stands_in_the_source() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(messages) >= 25
    assert len(messages) == page.count("\n### ")
    texts = "\n".join(text for file in (ROOT / "mmfast").rglob("*.py") for text in _texts(file.read_text()))
    assert [message for message in messages if not _words(message) or message not in texts] == []


def _texts(source: str) -> list[str]:
    """The strings of a file, a placeholder for each value that an f-string takes; docstrings do not count."""
    tree = ast.parse(source)
    found, parts = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            parts.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            pieces = [part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values]
            found.append("".join(map(str, pieces)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append(node.value)
    return found


def _words(message: str) -> bool:
    """Whether there is more to a message than placeholders."""
    return len(re.findall(r"[a-z]{2,}", message)) >= 3
