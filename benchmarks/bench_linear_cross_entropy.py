"""Times linear_cross_entropy, forward and backward, against eager PyTorch and the peers that are installed.

python benchmarks/bench_linear_cross_entropy.py --rounds 7 --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from mmfast.benchmarks import harness


class Case(NamedTuple):
    """rows × features hidden states, of which `labelled` have a label; a head of `vocabulary` tokens."""

    rows: int
    features: int
    vocabulary: int
    labelled: float
    dtype: torch.dtype
    trained: bool = False

    def __str__(self) -> str:
        head = " trained" if self.trained else ""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.rows}x{self.features}x{self.vocabulary} {kind} {self.labelled:.0%}{head}"

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """hidden, weight, labels; the logits have unit variance."""
        torch.manual_seed(0)
        hidden = torch.randn(self.rows, self.features, device=device).to(self.dtype).requires_grad_()
        weight = (torch.randn(self.vocabulary, self.features, device=device) * self.features**-0.5).to(self.dtype)
        labels = torch.randint(self.vocabulary, (self.rows,), device=device)
        labels[torch.randperm(self.rows, device=device)[round(self.rows * self.labelled) :]] = -100
        return hidden, weight.requires_grad_(self.trained), labels


SHARES = (1.0, 0.5, 0.25, 0.15, 0.06)
# Language models of the embedded world: a batch of 32, smaller ones, and one too small for any kernel.
WORLD = [Case(rows, 128, 512, share, torch.float32) for rows in (1600, 300, 100) for share in (0.15, 1.0)]
WORLD.append(Case(20, 64, 512, 0.5, torch.float32))
CPU = [
    Case(2048, 1024, 32000, 0.15, torch.float32),
    Case(2048, 4096, 32000, 0.15, torch.bfloat16),
    *(Case(1024, 1024, 32000, share, torch.bfloat16) for share in SHARES),
    Case(1024, 1024, 32000, 0.15, torch.bfloat16, trained=True),
]
CUDA = [
    *(Case(16384, 4096, 32000, share, torch.bfloat16) for share in SHARES),
    Case(16384, 4096, 128256, 0.25, torch.bfloat16),
    Case(16384, 4096, 32000, 0.25, torch.bfloat16, trained=True),
]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def losses(device: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """Every implementation that can run here, eager PyTorch first."""
    op = mmfast.ops.linear_cross_entropy
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {"eager": eager}
    found["torch.compile"] = torch.compile(eager)
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, ignore_index=-100, options=options)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger

        found["liger"] = lambda hidden, weight, labels: liger.apply(hidden, weight, labels)[0]
    for backend in ("triton" if device == "cuda" else "cpu", "reference"):
        found[f"mmfast:{backend}"] = partial(op, backend=backend)
    return found


def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """One forward and backward; the gradients stay in .grad."""
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()


def agrees(loss: Callable[[Tensor, Tensor, Tensor], Tensor], *tensors: Tensor) -> str | None:
    """Why the gradient of hidden is not that of eager PyTorch; None if it is."""
    hidden = tensors[0]
    run(eager, *tensors)
    expected = hidden.grad
    try:
        run(loss, *tensors)
    except Exception as failure:  # a peer that cannot run is a row of the table, not the end of the benchmark
        return f"{type(failure).__name__}: {failure}".splitlines()[0][:60]
    error = (hidden.grad - expected).float().norm() / expected.float().norm()
    limit = 1e-4 if hidden.dtype == torch.float32 else 2e-2
    return None if error < limit else f"relative error {error:.1e}"


def rows_of(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    tensors = case.tensors(options.device)
    providers, rows = {}, []
    for name, loss in losses(options.device).items():
        if reason := agrees(loss, *tensors):
            print(f"  {case} {name}: left out, {reason}")
        else:
            providers[name] = partial(run, loss, *tensors)
    explained = mmfast.ops.explain("linear_cross_entropy", *tensors).splitlines()[0]
    # Where a call takes seconds the gate above has warmed up enough; where it takes microseconds, samples are many.
    small = case in WORLD
    rounds = options.rounds * (100 if small else 1)
    timings = harness.measure(providers, options.device, rounds, warmup=20 if small else 0)
    for name, timing in timings.items():
        peak = harness.peak_extra_bytes(providers[name], options.device)
        row = {"case": str(case), "provider": name, **timing, "peak MiB": round(peak / 2**20, 1)}
        if name == "mmfast:" + explained.rsplit(" ", 1)[1]:
            row["chosen"] = "by default"
        rows.append(row)
    return rows


def main() -> None:
    options = harness.arguments(__doc__)
    large = CUDA if options.device == "cuda" else CPU
    for name, cases in (("linear_cross_entropy_small", WORLD), ("linear_cross_entropy", large)):
        rows = [row for case in cases[: 1 if options.quick else None] for row in rows_of(case, options)]
        harness.report(name, rows, options)


if __name__ == "__main__":
    main()
