"""One way to time an op: all providers interleaved in one process, after their results agreed.

A provider is a name and a function without arguments. `measure` runs every provider once in each
round, in a new order, so that a change of the machine's speed hits all alike, and gives the median
with the 20th and 80th percentile. Ratios are of medians within one run; nothing is compared across runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Provider = Callable[[], Any]


def allow_buffer_reuse() -> None:
    """Keeps glibc from returning large blocks to the kernel, for every provider alike.

    Without it each large output is mapped anew, and the page faults (2-4x the time of a memory-bound
    op) would be measured instead of the op.
    """
    if platform.system() == "Linux":
        import ctypes

        libc = ctypes.CDLL(None)
        m_mmap_threshold, m_trim_threshold = -3, -1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 1 << 31 - 1)


def gate(timed: Mapping[str, Callable[[], Sequence[Tensor]]], limit: float, what: str = "") -> None:
    """Raises unless the results of every provider are within `limit` of those of "eager", relative to their norms."""
    expected = timed["eager"]()
    for name, run in timed.items():
        for found, wanted in zip(run(), expected, strict=True):
            error = (found - wanted).float().norm() / wanted.float().norm()
            if not error <= limit:
                raise AssertionError(f"{what} {name}: relative error {error:.1e}, allowed {limit:.1e}".lstrip())


def measure(
    providers: dict[str, Provider], device: str = "cpu", rounds: int = 15, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Times the providers round-robin.

    Returns:
        For each provider `ms` (median), `p20`, `p80` in milliseconds, and `ratio`: the first
        provider's median divided by its own.
    """
    for _ in range(warmup):
        for run in providers.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in providers}
    # In a new order each round: what ran before leaves its mark on caches.
    shuffle = random.Random(0).shuffle
    order = list(providers)
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run = providers[name]
            times[name].append(_time_cuda(run) if device == "cuda" else _time_cpu(run))
    first = statistics.median(times[next(iter(times))])
    rows = {}
    for name, samples in times.items():
        ordered = sorted(samples)
        rows[name] = {
            "ms": statistics.median(ordered),
            "p20": ordered[int(0.2 * (len(ordered) - 1))],
            "p80": ordered[int(0.8 * (len(ordered) - 1))],
            "ratio": first / statistics.median(ordered),
        }
    return rows


def _time_cpu(run: Provider) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _time_cuda(run: Provider) -> float:
    # Larger than any L2, written before each sample, so that inputs come from memory as in training.
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_extra_bytes(run: Provider, device: str = "cpu") -> int:
    """Bytes that `run` held at its peak beyond what was allocated before, as PyTorch's allocator sees it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def environment(device: str) -> dict[str, Any]:
    """What a figure must stand beside: device, versions, threads, revision, date."""
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "revision": _revision(),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    else:
        found |= {"device": _cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def arguments(description: str) -> argparse.Namespace:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; each runs every provider once")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="the first shape of each list only")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default: print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        allow_buffer_reuse()
    return options


def report(op: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the rows as a table and, with --out, writes `<out>/<op>.json`."""
    found = environment(options.device)
    print(f"\n{op} on {found['device']}, torch {found['torch']}, {found['threads']} threads, {found['date']}")
    for row in rows:
        notes = "".join(
            f"  {k} {v}" for k, v in row.items() if k not in ("case", "provider", "ms", "p20", "p80", "ratio")
        )
        timing = ""  # of a row that says something else
        if "ms" in row:
            timing = f" {row['ms']:9.3f} ms  [{row['p20']:.3f}, {row['p80']:.3f}]  {row['ratio']:6.2f}x"
        print(f"  {row['case']:<44} {row['provider']:<22}{timing}{notes}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / f"{op}.json"
        partial = target.with_suffix(".tmp")
        partial.write_text(json.dumps({"op": op, "environment": found, "rows": list(rows)}, indent=1) + "\n")
        os.replace(partial, target)
