"""Disks that refuse, for real: files that may not grow, folders that may not be written, processes that die midway."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

# What changes a disk, beside writing into an open file.
_CHANGES = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_OVERRIDE = 1 << 1


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `most` bytes; errno is EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that this thread may not write in, not even as root, who gives up that privilege meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable, in two halves; what stays permitted can be taken up again.
    capabilities = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, capabilities) == 0
    effective, mode = capabilities[0], folder.stat().st_mode
    folder.chmod(0o500)
    capabilities[0] = effective & ~_CAP_DAC_OVERRIDE
    assert libc.capset(header, capabilities) == 0
    try:
        yield
    finally:
        capabilities[0] = effective
        assert libc.capset(header, capabilities) == 0
        folder.chmod(mode)


@contextmanager
def at_change(number: int, act: Callable[[], Any]) -> Iterator[list[str]]:
    """Calls `act` in place of the `number`-th change of the disk, counted from 0; gives the names of all changes."""
    changes: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        change = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            changes.append(name)
            return act() if len(changes) == number + 1 else change(*args, **kwargs)

        return call

    with mock.patch.multiple(os, **{name: wrapped(name) for name in _CHANGES}):
        yield changes


def dies_at_change(number: int, run: Callable[[], Any]) -> bool:
    """Runs `run` in a copy of this process that ends, cleaning nothing up, at that change; whether it came so far."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with at_change(number, lambda: os._exit(9)):
                run()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9
