"""What PyTorch's CPU allocator hands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that was allocated at one time inside `run`, beyond what there was before."""
    return _allocated(run)[0]


def kept_bytes(run: Callable[[], Any]) -> int:
    """What is still allocated when `run` has ended, while its result is alive."""
    return _allocated(run)[1]


def _allocated(run: Callable[[], Any]) -> tuple[int, int]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    held = peak = 0
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak, held
