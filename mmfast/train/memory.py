"""Memory: its peak since the last reset, of the GPU if there is one, else of the process; and whether it ran out."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

__all__ = ["is_out_of_memory", "peak_memory_mb", "reset_peak_memory"]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement. Where the system cannot reset a process's peak, the old one stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5")  # 5 resets the peak resident set size, VmHWM.
    except OSError:
        return


def peak_memory_mb(device: torch.device) -> float:
    """Peak since the last reset, in MB of 10^6 bytes: tensors on the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the GPU or of the machine, could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error) and "Allocator" in str(error)
