"""What readers of indexed files share: parts of a file that must not change, and names that must differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

__all__ = ["file_state", "read_range", "unique_id"]


def file_state(file: BinaryIO) -> tuple[int, int]:
    """Size and time of change, which tell that what an index says of a file still holds."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def read_range(path: Path, state: tuple[int, int], offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on.

    Raises:
        RuntimeError: the file is not as it was in `state`.
    """
    with path.open("rb") as file:
        if file_state(file) != state:
            raise RuntimeError(f"{path}: the file has changed since it was opened; start again")
        file.seek(offset)
        return file.read(length)


def unique_id(name: str, taken: dict[str, int]) -> str:
    """`name`, or `name` with the first free suffix; `taken` counts the uses of each name."""
    unique = name
    while unique in taken:
        taken[name] += 1
        unique = f"{name}#{taken[name]}"
    taken[unique] = 1
    return unique
