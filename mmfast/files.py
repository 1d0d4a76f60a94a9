"""Writing files so that a crash leaves either the old content or the new, never a part of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["file_sha256", "fsync_folder", "replace_atomically", "write_atomically", "write_json"]


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written under a temporary name, brings it to the disk and renames it into place.

    Args:
        path: The file to write. Its folder must exist; a file already there is replaced.
        write: Called with the temporary path. If it raises, what was at `path` stays.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file's whole content, atomically; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    replace_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def fsync_folder(folder: Path) -> None:
    """Brings a folder's entries (created, renamed or deleted names) to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders; there a rename is durable by itself.
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
