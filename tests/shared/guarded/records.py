"""The committed figures: how they are kept, compared with what is found, and replaced by it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.files import write_atomically

# Each takes over what is found.
ACCEPT, ACCEPT_COMPILED = "python scripts/guard.py --accept", "python scripts/compile_kernels.py --accept"
ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "tests" / "guard"
COUNTS, COMPILED, INSTRUCTIONS = (FOLDER / f"{name}.json" for name in ("counts", "compile", "instructions"))


@dataclass
class Record:
    """What one file holds.

    Attributes:
        versions: of the tools whose choices the figures depend on.
        rows: what was counted, by what it is of: a number, a list, or a (nested) dict of them.
        sources: digests of what was counted, where figures of the same source and versions need no second count.
    """

    versions: dict[str, str] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> Record:
    """The record at `path`; an empty one where there is no file yet."""
    return Record(**json.loads(path.read_text())) if path.exists() else Record()


def save(path: Path, record: Record) -> None:
    """Writes a record atomically, a line for each row: a change shows as the lines that it changes."""
    parts = {"sources": record.sources} if record.sources else {}
    parts["rows"] = record.rows
    tables = ",\n".join(f"{json.dumps(name)}: {{\n{_lines(table)}\n}}" for name, table in parts.items())
    write_atomically(path, f'{{"versions": {json.dumps(record.versions)},\n{tables}}}\n')


def _lines(table: dict[str, Any]) -> str:
    return ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))


def differences(accepted: dict[str, Any], found: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    """A line for each figure that was `accepted` and is not `found`, or the reverse.

    Args:
        tolerance: the share of an accepted number by which one that is found may differ.
    """
    before, now = dict(_figures(accepted)), dict(_figures(found))
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'nothing' if old is None else old} -> {'nothing' if new is None else new}")
        elif old != new and not (tolerance and abs(new - old) <= tolerance * old):
            share = f" ({new / old - 1:+.1%})" if isinstance(old, int) and isinstance(new, int) and old else ""
            lines.append(f"{name}: {old} -> {new}{share}")
    return lines


def complaint(path: Path, lines: list[str], accept: str = ACCEPT) -> str:
    """What a test says of `differences` from the record at `path`; `accept` is the command that takes them over."""
    text = "\n  ".join(lines)
    return f"{len(lines)} figures are not those of {shown(path)}:\n  {text}\nIf that is meant: {accept}"


def shown(path: Path) -> str:
    """A path as a reader in the checkout types it."""
    return os.path.relpath(path, ROOT)


def _figures(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _figures(part, f"{name}, {key}" if name else key)
    else:
        yield name, value
