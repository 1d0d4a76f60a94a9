"""What README.md and the pages of docs/ show: blocks of commands, of code and of messages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: the line of its text in the page, its language, the file that it is to be, and its text."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, in order, of one language or of all."""
    found: list[Block] = []
    fence, language_of, title, start, indent, lines = "", "", "", 0, 0, [""]
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        opened = re.match(r"""( *)(```+)(\w*)(?: title="(.*)")?""", line)
        if not fence and opened:
            indent, fence, language_of, title = len(opened[1]), opened[2], opened[3], opened[4] or ""
            start, lines = number + 1, []
        elif fence and line.strip() == fence:
            found.append(Block(page, start, language_of, title, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line[indent:])
    if fence:
        raise ValueError(f"{page}: the block at line {start} is not closed")
    return [block for block in found if language is None or block.language == language]


@dataclass(frozen=True)
class Command:
    """A command of a console block, without its comment, continued lines joined."""

    place: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands(page: str) -> list[Command]:
    """The lines of a page's console blocks that begin with `$ `, in order."""
    found = []
    for block in blocks(page, "console"):
        lines = enumerate(block.text.splitlines(), block.line)
        for number, line in lines:
            if not line.startswith("$ "):
                continue
            whole = line[2:]
            while whole.endswith("\\"):
                whole = whole[:-1] + next(lines)[1]
            found.append(Command(f"{page}:{number}", shlex.join(shlex.split(whole, comments=True))))
    return found
