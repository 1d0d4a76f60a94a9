"""`mmfast bench crossover`: from which size each op's kernels are faster than its reference on this device."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import mmfast.ops
from mmfast.benchmarks import harness
from mmfast.benchmarks.crossover_ladders import LADDERS, Arguments, Ladder
from mmfast.files import write_json
from mmfast.ops import backends, crossovers

# A loss of less is none, and one of more is one, however much the times scatter.
NOISE = 0.02, 0.05
# Scatter of a machine that does something else.
BUSY = 0.2
# A sample repeats a call for so long, and a point takes about so long in all.
SAMPLE_SECONDS, POINT_SECONDS = 5e-4, 0.4
LEAST_ROUNDS = 5


class Point(NamedTuple):
    """What was measured at one size.

    Attributes:
        ratio: the reference's median time divided by the backend's.
        noise: half the range from the 20th to the 80th percentile over the median, of the one that scatters more.
    """

    size: int
    ratio: float
    noise: float = 0.0

    @property
    def is_slower(self) -> bool:
        least, most = NOISE
        return self.ratio < 1 - min(max(self.noise, least), most)


def search(points: Sequence[Point], again: Callable[[int], Point]) -> int | None:
    """The smallest size from which no point is slower; None if the largest is.

    Args:
        points: by growing size.
        again: measures a size once more: a point is slower if it is so twice.
    """
    found = None
    for point in reversed(points):
        if point.is_slower and again(point.size).is_slower:
            break
        found = point.size
    return found


@contextmanager
def forced(op: str, device: torch.device) -> Iterator[Callable[[int], None]]:
    """Gives what sets all sizes from which an op's backends run on a device; afterwards they are as before."""
    keys = list(crossovers.CPU.cpu(op))
    table = crossovers.in_force(crossovers.device_name(device)).ops[op]
    # Changed in place: ops hold on to these dictionaries.
    forced = [table.setdefault(name, {}) for name in (("cpu",) if device.type == "cpu" else ("triton", "cuda"))]
    before = [dict(sizes) for sizes in forced]

    def force(least: int) -> None:
        for sizes in forced:
            for key in keys:
                sizes[key] = least

    try:
        yield force
    finally:
        for sizes, kept in zip(forced, before, strict=True):
            sizes.clear()
            sizes.update(kept)


class Subject:
    """A ladder's calls of one dtype, with a gradient or without, each run by the reference and by a backend.

    Both are the op as a user calls it, selection and all, with a table in which the backend runs never or always.
    """

    def __init__(self, ladder: Ladder, dtype: torch.dtype, trained: bool, device: torch.device, rounds: int) -> None:
        self.ladder, self.dtype, self.trained, self.device, self.rounds = ladder, dtype, trained, device, rounds
        self.name = f"{str(dtype).removeprefix('torch.')}{', with gradients' if trained else ''}"

    def arguments(self, size: int) -> Arguments:
        """Of the op, for a call of this size."""
        torch.manual_seed(0)
        arguments = self.ladder.call(size, self.dtype, self.device.type)
        if self.trained:
            for place in self.ladder.train:
                arguments[place].requires_grad_()
        return arguments

    def backend(self, size: int, least: int) -> str:
        """Which backend selection picks when all sizes of the table are `least`."""
        op = backends.OPS[self.ladder.op]
        with forced(self.ladder.op, self.device) as force:
            force(least)
            return op.select(op.check(*self.arguments(size)), backends.machine(self.device))

    def run(self, arguments: Arguments) -> Sequence[Tensor]:
        """The call; its outputs, or with gradients those."""
        found = getattr(mmfast.ops, self.ladder.op)(*arguments)
        outputs = found if isinstance(found, tuple) else (found,)
        if not self.trained:
            return outputs
        leaves = [arguments[place] for place in self.ladder.train]
        return torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])

    def again(self, size: int) -> Point:
        """Another look at a size, a longer one where that is cheap."""
        return self.point(size, 2 * self.rounds)

    def point(self, size: int, rounds: int | None = None) -> Point:
        """Times a call of this size, in so many rounds or what `POINT_SECONDS` allow."""
        arguments = self.arguments(size)

        def timed(least: int, repeats: int) -> Callable[[], Any]:
            def run() -> Any:
                force(least)
                for _ in range(repeats):
                    found = self.run(arguments)
                return found

            return run

        with forced(self.ladder.op, self.device) as force:
            once = {"eager": timed(crossovers.NEVER, 1), "backend": timed(0, 1)}
            what = f"{self.ladder.op}, {self.name}, size {size}"
            harness.gate("backend", once["backend"](), once["eager"](), 0.05, what)
            seconds = max(_seconds(run, self.device) for run in once.values())
            repeats = math.ceil(SAMPLE_SECONDS / seconds)
            affordable = int(POINT_SECONDS / (2 * seconds * repeats))
            rounds = min(rounds or self.rounds, max(affordable, LEAST_ROUNDS))
            runs = {"reference": timed(crossovers.NEVER, repeats), "backend": timed(0, repeats)}
            found = harness.measure(runs, self.device.type, rounds, warmup=1)
        noise = max((row["p80"] - row["p20"]) / 2 / row["ms"] for row in found.values())
        return Point(size, found["backend"]["ratio"], noise)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def crossover(
    *ops: str,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    rounds: int = 15,
    threads: int | None = None,
    out: str | None = None,
    dry_run: bool = False,
) -> None:
    """Measures from which size each op's kernels are faster than its reference, and writes the table that ops read.

    Args:
        ops: The ops to measure; default: all. What a table says of others stays.
        device: cpu or cuda.
        rounds: Timed rounds at a size, in each of which kernel and reference run in turn; large sizes take fewer.
        threads: CPU threads; default: PyTorch's.
        out: The file to write; default: the table of this device in the user's cache, which ops read from then on.
        dry_run: Print only.

    Raises:
        ValueError: An option is wrong, `out` is there and no table of this device, or no kernel can run on it.
    """
    named = sorted({ladder.op for ladder in LADDERS})
    if unknown := sorted(set(ops) - set(named)):
        raise ValueError(f"crossover: {unknown[0]!r} has no crossover; use any of {', '.join(named)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        here = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"crossover: there is no device {device!r} here; use {here}")
    for what, number in (("rounds", rounds), ("threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"crossover: {what} is {number}; expected at least 1")
    if backend := os.environ.get("MMFAST_BACKEND"):
        raise ValueError(f"crossover: MMFAST_BACKEND is {backend}, so that nothing is selected; unset it")
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cpu":
        harness.allow_buffer_reuse()
    on = torch.device(device, 0) if device == "cuda" else torch.device(device)
    ladders = [ladder for ladder in LADDERS if not ops or ladder.op in ops]
    name = crossovers.device_name(on)
    if dry_run:
        measure(ladders, on, rounds)
        return
    path = Path(out) if out else crossovers.user_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = kept(path, name, own=not out)
    for op, entry in measure(ladders, on, rounds).items():
        for backend, sizes in entry.items():
            table.setdefault(op, {}).setdefault(backend, {}).update(sizes)
    environment = {key: value for key, value in harness.environment(device).items() if key != "device"}
    write_json(path, {"device": name, "environment": environment | {"rounds": rounds}, "ops": table})
    print(f"\n{path} is written; `mmfast env` tells which table is in force")


def measure(ladders: Sequence[Ladder], device: torch.device, rounds: int) -> dict[str, Any]:
    """Op, backend and key to the size found, None for never; prints each as it is found.

    Raises:
        ValueError: No kernel of an op can run on the device.
    """
    count = sum(len(ladder.variants(device.type)) * len(ladder.sizes) for ladder in ladders)
    name, minutes = crossovers.device_name(device), math.ceil(count * POINT_SECONDS / 60)
    print(f"{name}, {torch.get_num_threads()} threads: {count} points, about {minutes} min or less")
    print("At each size: the reference's time over the kernel's. A loss within the scatter, 2 to 5 %, is none.")
    found: dict[str, Any] = {}
    busy = 0
    with tqdm(total=count, unit="point", disable=None) as bar:
        for ladder in ladders:
            bar.set_description(f"{ladder.op}, {ladder.key}")
            variants = ladder.variants(device.type)
            subjects = [Subject(ladder, dtype, trained, device, rounds) for dtype, trained in variants]
            if not subjects:
                tqdm.write(f"\n{ladder.op}, {ladder.key}: no call on this device is of this kind")
                continue
            backend = _kernel(subjects[0])
            before = crossovers.least(None if device.type == "cpu" else name, ladder.op, backend, ladder.key)
            results = [_climb(subject, bar) for subject in subjects]
            sizes = [search(points, subject.again) for subject, points in zip(subjects, results, strict=True)]
            size = None if None in sizes else max(size for size in sizes if size is not None)
            tqdm.write(f"\n{ladder.op}, {ladder.key}: {backend} from {_words(before)}, now from {_words(size)}")
            for subject, points, least in zip(subjects, results, sizes, strict=True):
                ratios = "  ".join(f"2^{point.size.bit_length() - 1} {point.ratio:.2f}" for point in points)
                tqdm.write(f"    {subject.name}: {_words(least)}\n      {ratios}")
                busy += sum(point.noise > BUSY for point in points)
            found.setdefault(ladder.op, {}).setdefault(backend, {})[ladder.key] = size
    if busy:
        print(f"\n{busy} points scatter by more than {BUSY:.0%}; is the machine quiet? If not, measure again.")
    return found


def _kernel(subject: Subject) -> str:
    """The backend that selection takes where the table never takes the reference."""
    smallest = subject.ladder.sizes[0]
    backend = subject.backend(smallest, 0)
    if backend == "reference":
        reason = mmfast.ops.explain(subject.ladder.op, *subject.arguments(smallest))
        raise ValueError(f"crossover: no kernel of {subject.ladder.op} can run on {subject.device}: {reason}")
    return backend


def _climb(subject: Subject, bar: tqdm[Any]) -> list[Point]:
    points = []
    for size in subject.ladder.sizes:
        points.append(subject.point(size))
        bar.update()
    return points


def _words(size: int | None) -> str:
    return "never" if size in (None, crossovers.NEVER) else str(size)


def kept(path: Path, device: str, own: bool) -> dict[str, Any]:
    """What the table that is to be written to has: op, backend and key to size, None for never.

    Args:
        path: of the table; nothing need be there.
        device: see `mmfast.ops.crossovers.device_name`.
        own: it is the user's own, and replaced where it is of no use; any other is not.

    Raises:
        ValueError: Something else is there.
    """
    if not path.exists():
        return {}
    try:
        old = crossovers.read(path, crossovers.CPU.ops)
        if old.device != device:
            raise ValueError(f"crossover: {path} was measured on {old.device}; this is {device}; name another file")
    except ValueError as error:
        if not own:
            raise
        print(f"{error}\nIt will be replaced.")
        return {}
    return {op: {name: _numbers(sizes) for name, sizes in entry.items()} for op, entry in old.ops.items()}


def _numbers(sizes: dict[str, int]) -> dict[str, int | None]:
    return {key: None if size == crossovers.NEVER else size for key, size in sizes.items()}
