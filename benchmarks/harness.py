"""One way to time an op: all providers interleaved in one process, after their results agreed.

A benchmark of an op is a file `bench_<op>.py` with `cases(device, quick)`: what is computed, on which tensors, by whom.
All else is here. `run` makes a case's tensors, compares the results of every provider with those of the first (nothing
is timed unless all agree), and then runs every provider once in each round, in a new order, so that a change of the
machine's speed hits all alike. Two floors are timed in the same rounds: a copy of as many bytes as the case must move,
and a square matrix product of as many FLOPs as it must do. Ratios are of medians within one case; nothing is compared
across runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.ops import BackendUnavailable, products
from mmfast.ops.backends import OPS

Provider = Callable[[], Any]
Row = dict[str, Any]

COPY, PRODUCT = "floor: copy", "floor: product"
GRAPH = " [graph]"  # ends the name of what replays a CUDA graph
# Enough rounds for a median of calls of microseconds; more say nothing new.
MOST_ROUNDS = 1000


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    Attributes:
        device: "cpu" or "cuda".
        quick: The first few cases alone; on a GPU those of scripts/gpu_check.sh.
        rounds: Timed rounds at least; each runs every provider once.
        seconds: Rounds go on until a case was measured for so long.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int = 5
    seconds: float = 0.3


@dataclass(frozen=True)
class Prepared:
    """A provider that is made of a case's arguments: `make(*arguments)` is the function. Its time counts as cold."""

    make: Callable[..., Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """One computation on tensors of one shape, and who does it. Nothing is made before the case is measured.

    Attributes:
        op: The file's name without `bench_`.
        name: The shape and the dtype, as they stand in tables.
        mode: "forward" (without gradients), "backward" (of a graph made outside of the timing) or "both".
        arguments: Makes what every provider is called with: tensors, modules, lists of them. Gradients are those of all
            tensors and parameters in it that require one.
        providers: Functions of the arguments that return a tensor or a sequence of tensors. The first is the baseline:
            what one writes in eager PyTorch. Ours have names that begin with "mmfast"; the others are peers.
        limit: How far results may be from those of the baseline, relative to their norms.
        bytes: What must be read and written at least.
        flops: What must be multiplied and added at least, in matrix products; 0 for elementwise ops.
        dtype: That of the product that is the floor.
        limits: For a provider by name where another limit holds; `math.inf` for one that computes something else, as a
            bound.
        jointly: Whether all results together have one norm, for gradients that are zero but for rounding.
        table: Of the tables in an op's page, that to which the case belongs.
    """

    op: str
    name: str
    mode: str
    arguments: Callable[[], Sequence[Any]]
    providers: Mapping[str, Callable[..., Any] | Prepared]
    limit: float
    bytes: int
    device: str
    flops: int = 0
    dtype: torch.dtype = torch.float32
    limits: Mapping[str, float] = field(default_factory=dict)
    jointly: bool = False
    table: str = ""

    def __str__(self) -> str:
        return f"{self.op}, {self.name}, {self.mode}"

    def kind(self, provider: str) -> str:
        """What a provider is: "baseline", "mmfast", "bound", "floor" or "peer"."""
        if provider in (COPY, PRODUCT):
            return "floor"
        found = kind_by_name(provider, next(iter(self.providers)))
        return "bound" if found == "peer" and self.limits.get(provider) == math.inf else found

    def about(self, provider: str) -> Row:
        """What a row begins with."""
        found = {"case": self.name, "table": self.table, "mode": self.mode, "provider": provider}
        return found | {"kind": self.kind(provider)}

    def names(self) -> list[str]:
        """All that is timed, the floors included."""
        return [*self.providers, COPY, *([PRODUCT] if self.flops else [])]


# ---- what the files of ops share


def kind_by_name(provider: str, first: str) -> str:
    """ "baseline", "mmfast" or "peer"."""
    return "baseline" if provider == first else "mmfast" if provider.startswith("mmfast") else "peer"


def kind_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def made(provider: Callable[..., Any] | Prepared, arguments: Sequence[Any]) -> Callable[..., Any]:
    """The function of a provider for these arguments."""
    return provider.make(*arguments) if isinstance(provider, Prepared) else provider


def compiled(provider: Callable[..., Any] | Prepared) -> Prepared:
    """`provider` by torch.compile, for the shapes of a case alone."""

    def make(*arguments: Any) -> Callable[..., Any]:
        import torch._functorch.config as settings

        # Else backward could run once alone, and not again on a graph that is kept.
        settings.donated_buffer = False
        return torch.compile(made(provider, arguments), dynamic=False)

    return Prepared(make)


def ours(op: str, function: Callable[..., Any], device: str, default: bool = True) -> dict[str, Callable[..., Any]]:
    """`function` with every backend asked for by name, and, with `default`, as a call without `backend` runs it."""
    on = ("cpu",) if device == "cpu" else ("triton", "cuda")
    named = [backend.name for backend in OPS[op].backends if backend.name in on]
    found = {f"mmfast:{name}": partial(function, backend=name) for name in named}
    return found | ({"mmfast": function} if default else {})


def chosen(shapes: Mapping[str, Sequence[Any]], device: str, quick: bool) -> Sequence[Any]:
    """The shapes to measure; with `quick` the first, and on a GPU a second one, which is bound by launches."""
    return shapes[device][: (2 if device == "cuda" else 1) if quick else None]


def compiling(
    function: Callable[..., Any] | Prepared, device: str, quick: bool, name: str = "torch.compile"
) -> dict[str, Any]:
    """`function` by torch.compile as a provider; none in a quick run on a CPU, where g++ takes longer than all else."""
    return {} if quick and device == "cpu" else {name: compiled(function)}


def modes(first: bool = False) -> tuple[str, ...]:
    """Forward and both; of an op's first shape backward alone, too."""
    return ("forward", "backward", "both") if first else ("forward", "both")


# ---- a case, from its tensors to its rows


@dataclass(frozen=True)
class Measured:
    """A case's rows, and the samples in milliseconds that they sum up."""

    rows: list[Row]
    samples: dict[str, list[float]]


def run(case: Case, settings: Settings) -> Measured:
    """Compares all providers with the first, then times them.

    Raises:
        RuntimeError: The results of a provider are wrong; nothing was timed.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # of one function it compiles eight shapes, and then runs it in eager mode
    torch.manual_seed(0)
    steps, cold, refused = _ready(case)
    timed = steps | _floors(case)
    if case.device == "cuda":
        timed |= {name + GRAPH: replay for name in timed if (replay := _captured(timed[name], case))}
    samples = sample(timed, case.device, settings.rounds, settings.seconds)
    rows = []
    for name, found in samples.items():
        provider, graph, _ = name.partition(GRAPH)
        row = case.about(provider) | {"timing": "graph" if graph else "eager"} | summary(found)
        # A replayed graph against a replayed graph: without the host, a kernel is not faster than a call.
        if first := samples.get(next(iter(steps)) + graph):
            row |= {"ratio": statistics.median(first) / row["ms"]}
        row |= {"bytes": case.bytes, "flops": case.flops}
        if name in steps:
            row |= {"cold ms": cold[name]}
            row |= {"peak MiB": round(peak_extra_bytes(steps[name], case.device) / 2**20, 1)}
        rows.append(row)
    rows += [case.about(name) | {"left out": reason} for name, reason in refused.items()]
    return Measured(rows, samples)


def _ready(case: Case) -> tuple[dict[str, Provider], dict[str, float], dict[str, str]]:
    """Steps whose results agree, the time of each one's first call, and why others cannot run."""
    arguments = case.arguments()
    leaves = list({id(leaf): leaf for leaf in _leaves(arguments)}.values())
    gradients: list[Tensor] = []
    steps: dict[str, Provider] = {}
    cold: dict[str, float] = {}
    refused: dict[str, str] = {}
    expected: Sequence[Tensor | None] = ()
    for name, provider in case.providers.items():
        kind, start = case.kind(name), time.perf_counter()
        try:
            function = made(provider, arguments)
            step = _step(case.mode, partial(function, *arguments), leaves, gradients)
            found = step()
            _finish(case.device)
        except BackendUnavailable as refusal:
            refused[name] = str(refusal).splitlines()[0]
            continue
        except Exception as failure:
            if kind in ("baseline", "mmfast"):
                raise
            refused[name] = f"{type(failure).__name__}: {failure}".splitlines()[0][:120]
            continue
        cold[name] = (time.perf_counter() - start) * 1e3
        expected = found if kind == "baseline" else expected
        if kind != "bound":
            gate(name, found, expected, case.limits.get(name, case.limit), str(case), case.jointly)
        steps[name] = step
    return steps, cold, refused


def _step(mode: str, function: Provider, leaves: list[Tensor], gradients: list[Tensor]) -> Provider:
    """What is timed. `gradients`, those of the outputs, are made with the first provider, for all of them."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return _outputs(function())

    def derive(outputs: list[Tensor], keep: bool = False) -> list[Tensor | None]:
        if not gradients:
            gradients.extend(
                torch.randn_like(output) if output.dim() else torch.ones_like(output) for output in outputs
            )
        return list(torch.autograd.grad(outputs, leaves, gradients, retain_graph=keep, allow_unused=True))

    def both() -> list[Tensor | None]:
        outputs = _outputs(function())
        return [*(output.detach() for output in outputs), *derive(outputs)]

    if mode == "backward":
        return partial(derive, _outputs(function()), keep=True)
    return {"forward": forward, "both": both}[mode]


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _leaves(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, nn.Module):
        yield from (parameter for parameter in arguments.parameters() if parameter.requires_grad)
    elif isinstance(arguments, Tensor):
        yield from (arguments,) if arguments.requires_grad else ()
    elif isinstance(arguments, list | tuple):
        for argument in arguments:
            yield from _leaves(argument)


def gate(
    name: str,
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    limit: float,
    what: str = "",
    jointly: bool = False,
) -> None:
    """Raises unless what a provider returns is within `limit` of what is expected, relative to the norms.

    Raises:
        RuntimeError: It is not, or there are fewer or more results.
    """
    if [x is None for x in found] != [x is None for x in expected]:
        raise RuntimeError(f"{what}, {name}: results {_there(found)}; expected {_there(expected)}")
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True) if f is not None and e is not None]
    if jointly:
        pairs = [(torch.cat([f.flatten() for f, _ in pairs]), torch.cat([e.flatten() for _, e in pairs]))]
    for index, (actual, wanted) in enumerate(pairs):
        error = float((actual - wanted).norm() / wanted.norm()) if wanted.any() else float(actual.norm())
        if not error <= limit:
            raise RuntimeError(f"{what}, {name}: result {index} is off by {error:.1e}; at most {limit:.1e} is accepted")


def _there(results: Sequence[Tensor | None]) -> str:
    return " ".join("none" if x is None else "x".join(map(str, x.shape)) or "scalar" for x in results)


def _floors(case: Case) -> dict[str, Provider]:
    source = torch.ones(max(1, case.bytes // 8), device=case.device)
    target = torch.empty_like(source)
    found: dict[str, Provider] = {COPY: lambda: target.copy_(source)}
    if case.flops:
        slow = case.device == "cpu" and products.is_slow(case.dtype, 1024, grad=True)
        rows, inner = _square(case.flops)
        a, b = (
            torch.ones(size, inner, device=case.device, dtype=torch.float32 if slow else case.dtype)
            for size in (rows, inner)
        )
        out = a.new_empty(rows, inner)
        found[PRODUCT] = lambda: torch.mm(a, b, out=out)
    return found


def _square(flops: int) -> tuple[int, int]:
    """M, and N = K, of a product of so many FLOPs that is as square as multiples of 64 allow."""
    side = round((flops / 2) ** (1 / 3))
    side = max(1, side if side < 64 else side // 64 * 64)
    return max(1, round(flops / (2 * side * side))), side


# ---- time


def sample(
    providers: Mapping[str, Provider], device: str, rounds: int = 5, seconds: float = 0.0, warmup: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of each provider in each round, until there are `rounds` of them that took `seconds` in all."""
    for _ in range(warmup):
        for provider in providers.values():
            provider()
    _finish(device)
    once = _time_cuda if device == "cuda" else _time_cpu
    samples: dict[str, list[float]] = {name: [] for name in providers}
    # In a new order each round: what ran before leaves its mark on caches.
    shuffle, order, spent = random.Random(0).shuffle, list(providers), 0.0
    done = 0
    while done < rounds or (spent < seconds * 1e3 and done < MOST_ROUNDS):
        shuffle(order)
        for name in order:
            samples[name].append(once(providers[name]))
            spent += samples[name][-1]
        done += 1
    return samples


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile in milliseconds, and how many rounds there were."""
    ordered = sorted(samples)
    low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.8))
    return {"ms": statistics.median(ordered), "p20": low, "p80": high, "rounds": len(ordered)}


def measure(providers: Mapping[str, Provider], device: str, rounds: int, warmup: int = 1) -> dict[str, Row]:
    """Times the providers round-robin: the `summary` of each, with the `ratio` of the first's median to its own."""
    found = {name: summary(times) for name, times in sample(providers, device, rounds, warmup=warmup).items()}
    first = next(iter(found.values()))["ms"]
    return {name: {**row, "ratio": first / row["ms"]} for name, row in found.items()}


def _time_cpu(provider: Provider) -> float:
    start = time.perf_counter()
    provider()
    return (time.perf_counter() - start) * 1e3


@cache
def _larger_than_l2() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")


def _time_cuda(provider: Provider) -> float:
    # Written before each sample, so that inputs come from memory as in training.
    _larger_than_l2().zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    provider()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@cache
def _graph_pool() -> Any:
    """One memory for the graphs of all providers: they run one after the other, and nobody reads their results."""
    return torch.cuda.graph_pool_handle()


def _captured(step: Provider, case: Case) -> Provider | None:
    """The replay of a CUDA graph of `step`: its kernels without the host. None where it cannot be captured."""
    if case.mode == "backward":
        return None  # autograd runs it on the stream of its forward, which was not captured
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_graph_pool()):
            step()
        graph.replay()
        torch.cuda.synchronize()
    except Exception as failure:  # it waits for the host, say; the row says which timing it is of
        torch.cuda.synchronize()
        print(f"  {case}: no CUDA graph, {str(failure).splitlines()[0][:100]}", file=sys.stderr)
        return None
    return graph.replay


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


# ---- memory


def peak_extra_bytes(provider: Provider, device: str = "cpu") -> int:
    """Bytes that `provider` held at its peak beyond what was allocated before, as PyTorch's allocator sees it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        provider()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return allocated_bytes(provider)[0]


def allocated_bytes(provider: Provider) -> tuple[int, int]:
    """What PyTorch's CPU allocator hands out beyond what there was: at the peak, and while the result is alive."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else two lines on stderr for each profile
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile
    from torch.profiler._utils import traverse_dfs

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = provider()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = [event for event in traverse_dfs(tree) if event.tag == _EventType.Allocation]
    sizes: dict[int, int] = {}
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        # PyTorch keeps the sizes of one profile for the next: where the garbage collector frees what was there before
        # this one, it reports a size of long ago. Only what was allocated here counts.
        held -= sizes.pop(address, 0)
        if size > 0:
            sizes[address] = size
            held += size
        peak = max(peak, held)
    del result
    return peak, held


# ---- what a figure must stand beside


def environment(device: str, tested: str = "not run") -> dict[str, Any]:
    """Device, clocks, versions, threads, revision, date, and how the op's own tests ended."""
    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{
            name: _version(name) for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger_kernel")
        },
        "threads": torch.get_num_threads(),
        "revision": _revision(),
        "tests": tested,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        return found | {"cuda": torch.version.cuda, "clocks": _gpu_clocks()}
    found |= {"device": _cpuinfo("model name") or platform.processor() or "unknown CPU"}
    return found | {"instructions": torch.backends.cpu.get_cpu_capability(), "clocks": _cpuinfo("cpu MHz")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _gpu_clocks() -> str | None:
    names = ["clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version"]
    found = _printed("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0")
    return found and ", ".join(f"{name} {value}" for name, value in zip(names, found.split(", "), strict=False))


def _revision() -> str:
    return _printed("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty") or "unknown"


def _printed(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def document(op: str, rows: Sequence[Row], found: Mapping[str, Any]) -> dict[str, Any]:
    """A results file: every row names its environment, so that rows of several runs may stand in one file."""
    key = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
    return {"op": op, "environments": {key: dict(found)}, "rows": [{**row, "environment": key} for row in rows]}


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    lines = []
    for row in rows:
        words = [row["case"], row.get("mode", ""), row["provider"] + GRAPH * (row.get("timing") == "graph")]
        known = {"case", "table", "mode", "provider", "kind", "timing", "ms", "p20", "p80", "ratio", "bytes", "flops"}
        timing = "" if "ms" not in row else f" {row['ms']:9.3f} ms  [{row['p20']:.3f}, {row['p80']:.3f}]"
        timing += f"  {row['ratio']:6.2f}x" if "ratio" in row else ""
        notes = "".join(f"  {k} {_short(v)}" for k, v in row.items() if k not in known)
        lines.append(f"  {words[0]:<44} {words[1]:<8} {words[2]:<28}{timing}{notes}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
