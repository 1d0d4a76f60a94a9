"""Writing files so that a crash leaves either the old content or the new, never a part of it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "file_sha256",
    "fsync_folder",
    "load_pickled",
    "read_tensors",
    "replace_atomically",
    "write_atomically",
    "write_json",
]


def replace_atomically(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Has a file written under a temporary name, brings it to the disk and renames it into place.

    Args:
        path: The file to write. Its folder must exist; a file already there is replaced.
        write: Called with the temporary path. If it raises, what was at `path` stays.
        shared: Whether others may write the same file at the same time; the last one stays.
    """
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}" if shared else f".tmp-{path.name}")
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


def load_pickled(path: Path, where: str, what: str = "tensors alone", classes: Sequence[type] = ()) -> Any:
    """Loads a file of `torch.save` on the CPU; no code in it ever runs.

    Args:
        path: The file, which exists.
        where: Begins the error.
        what: What the file may hold, for the error.
        classes: Classes whose objects it may hold beside tensors and plain values; they must only hold values.

    Raises:
        ValueError: If it holds anything else, or is no such file.
    """
    import torch

    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file that is none of its own, torch.load raises nearly anything
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{where}: {path} is not a file of {what} ({type(error).__name__}: {reason}); such a file, written by "
            "torch.save, is accepted; other content could run code and is never loaded"
        ) from error


def read_tensors(path: Path, where: str, root: str | None = None) -> dict[str, Tensor]:
    """Reads tensors by name from safetensors or a file of `torch.save`, on the CPU; no code in it ever runs.

    Args:
        path: The file.
        where: Begins the errors.
        root: The key under which a file of `torch.save` holds its tensors beside other things.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds other than tensors by name.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{where}: {path} does not exist; a file with tensors is accepted; correct the path")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    content = load_pickled(path, where)
    if root is not None:
        content = content.get(root) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        under = "" if root is None else f" under {root!r}"
        raise ValueError(f"{where}: {path} does not hold tensors by name{under}; a state dict is accepted there")
    return dict(content)
