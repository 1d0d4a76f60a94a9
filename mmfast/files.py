"""Writing files so that a crash leaves either the old content or the new, never a part of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "explained_writing",
    "file_sha256",
    "fsync_folder",
    "load_pickled",
    "read_tensors",
    "remove_leftovers",
    "replace_atomically",
    "replace_folder",
    "system_error",
    "write_atomically",
    "write_json",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# safetensors names its own temporary files `.tmp<letters>`.
_LEFTOVERS = ".tmp*"
_REPLACED = ".tmp-old-"


@contextmanager
def explained_writing(path: Path) -> Iterator[None]:
    """Turns what the system says when `path` cannot be written into an error that says all of it.

    Raises:
        OSError: Of the system's kind and number; it names `path`, what is wrong and what to do.
    """
    try:
        yield
    except Exception as error:
        number = _refusal(error, path)
        if number is None:
            raise
        if number in _FULL:
            advice = f"{_free(path)} are free on its disk; free some space there, or choose another folder"
        elif number in _FORBIDDEN:
            advice = "a folder that you may write in is accepted; change its permissions, or choose another folder"
        else:
            advice = "a folder on a disk that works is accepted; choose another folder"
        raise system_error(number, f"{path}: it cannot be written: {os.strerror(number)}; {advice}") from error


def system_error(number: int | None, message: str) -> OSError:
    """An OSError of the kind and number of a system's error that says nothing but `message`."""
    error = OSError(message) if number is None else type(OSError(number, ""))(message)
    error.errno = number
    return error


def replace_atomically(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Has a file written under a temporary name, brings it to the disk and renames it into place.

    Args:
        path: The file to write. Its folder must exist; a file already there is replaced.
        write: Called with the temporary path. If it raises, what was at `path` stays.
        shared: Whether others may write the same file at the same time; the last one stays.
    """
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}-{path.name}" if shared else f".tmp-{path.name}")
    with explained_writing(path):
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Has a folder written under a temporary name, brings it to the disk and renames it into place.

    A folder that is replaced has another name for the moment between two renames; `remove_leftovers` puts it back if
    the process dies in between.

    Args:
        path: The folder to write, whose parent must exist.
        write: Called with the temporary folder, which is empty. If it raises, what was at `path` stays.
    """
    temporary, old = path.with_name(f".tmp-{path.name}"), path.with_name(f"{_REPLACED}{path.name}")
    try:
        with explained_writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            fsync_folder(temporary)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
    fsync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that died left half-written in `folder`, which may be missing."""
    for old in folder.glob(f"{_REPLACED}*"):
        path = folder / old.name.removeprefix(_REPLACED)
        if not path.exists():
            old.rename(path)
    for leftover in folder.glob(_LEFTOVERS):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


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


def _refusal(error: Exception, path: Path) -> int | None:
    """The system's number for why `path` was not written; None for any other error, or one that is explained."""
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else None
    if not isinstance(error, OSError) or error.strerror is None:
        return None
    named = [Path(name) for name in (error.filename, error.filename2) if name is not None]
    return error.errno if all(_is_for(name, path) for name in named) else None


def _is_for(name: Path, path: Path) -> bool:
    """Whether a file or folder is made so that there is `path` in the end; others were perhaps read."""
    if name == path or name in path.parents or path in name.parents:
        return True
    return path.parent in name.parents and name.relative_to(path.parent).parts[0].startswith(".tmp")


def _free(path: Path) -> str:
    place = next(parent for parent in path.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(place).free / 1e6:,.1f} MB"
