"""Times bias_scale_linear, forward and backward, against eager PyTorch, torch.compile and the frozen linear alone.

python benchmarks/bench_bias_scale_linear.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import bias_scale_linear, nf4_quantize, products
from mmfast.ops.backends import machine
from mmfast.ops.bias_scale_linear import OP, SCALE_ON, check, reference

Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """`rows` rows through a linear of features × out_features; forward and backward, or forward alone (decoding)."""

    rows: int
    features: int
    out_features: int
    dtype: torch.dtype
    scale_on: str = "output"
    backward: bool = True

    def __str__(self) -> str:
        kind, mode = str(self.dtype).removeprefix("torch."), "" if self.backward else " forward"
        return f"{self.scale_on} {self.rows}x{self.features}->{self.out_features} {kind}{mode}"


class Tensors(NamedTuple):
    """A frozen weight; bias and scale in fp32, as they are trained."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scale: Tensor | None
    grad: Tensor


def tensors(case: Case, device: str) -> Tensors:
    torch.manual_seed(0)
    x = torch.randn(case.rows, case.features, device=device).to(case.dtype).requires_grad_(case.backward)
    weight = (torch.randn(case.out_features, case.features, device=device) * case.features**-0.5).to(case.dtype)
    bias = torch.randn(case.out_features, device=device).requires_grad_(case.backward)
    size = {"output": case.out_features, "input": case.features, "none": 0}[case.scale_on]
    scale = torch.randn(size, device=device).requires_grad_(case.backward) if size else None
    grad = torch.randn(case.rows, case.out_features, device=device).to(case.dtype)
    return Tensors(x, weight, bias, scale, grad)


def cast_first(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, scale_on: str) -> Tensor:
    """Bias and scale in the dtype of x, as where a whole model is in 16 bits; LitGPT's and LLaMA-Adapter's lines."""
    bias = bias.to(x.dtype)
    if scale is None:
        return F.linear(x, weight, bias)
    scale = scale.to(x.dtype)
    return scale * (F.linear(x, weight) + bias) if scale_on == "output" else F.linear(x * scale, weight) + bias


def step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, backward: bool) -> list[Tensor]:
    """What is timed: the output, and the gradients of the leaves."""
    if not backward:
        with torch.no_grad():
            return [forward()]
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def providers(case: Case, t: Tensors) -> dict[str, Run]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    leaves = [tensor for tensor in (t.x, t.bias, t.scale) if tensor is not None]
    arguments = (t.x, t.weight, t.bias, t.scale, case.scale_on)
    found: dict[str, Run] = {}

    def add(name: str, forward: Callable[[], Tensor], leaves: list[Tensor] = leaves) -> None:
        found[name] = partial(step, forward, leaves, t.grad, case.backward)

    add("eager", lambda: reference(*arguments))
    if case.dtype != torch.float32:
        add("eager, cast first", lambda: cast_first(*arguments))
    add("plain linear", lambda: F.linear(t.x, t.weight), [t.x])
    try:
        compiled = torch.compile(lambda: reference(*arguments), dynamic=False)
        compiled()
        add("torch.compile", compiled)
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  {case} torch.compile: left out, {type(failure).__name__}")
    call, on = check(*arguments), machine(t.x.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            add(f"mmfast:{backend.name}", lambda name=backend.name: bias_scale_linear(*arguments, backend=name))
    add("auto", lambda: bias_scale_linear(*arguments))
    return found


def gate(case: Case, found: dict[str, Run]) -> None:
    """Raises unless all providers agree with eager."""
    expected = found["eager"]()
    limit = 1e-4 if case.dtype == torch.float32 else 2e-2
    for name, run in found.items():
        if name != "plain linear":
            for actual, e in zip(run(), expected, strict=True):
                error = (actual - e).float().norm() / e.float().norm()
                if not error <= limit:
                    raise AssertionError(f"{case} {name}: relative error {error:.1e}, allowed {limit:.1e}")


def timed_rows(case: Case, found: dict[str, Run], options: argparse.Namespace, floor: str) -> list[dict[str, Any]]:
    """A row for each provider, with its time as a multiple of that of the provider called `floor`."""
    work = case.rows * case.features * case.out_features
    slow = options.device == "cpu" and products.is_slow(case.dtype, case.rows, grad=True)
    rounds = 3 if slow and work > 2**24 else options.rounds * (1 if work > 2**28 else 20)
    timings = harness.measure(found, options.device, rounds, warmup=1)
    return [
        {
            "case": str(case),
            "provider": name,
            **timing,
            f"of {floor}": round(timing["ms"] / timings[floor]["ms"], 3),
            "peak MiB": round(harness.peak_extra_bytes(found[name], options.device) / 2**20, 1),
        }
        for name, timing in timings.items()
    ]


def dense_rows(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = providers(case, tensors(case, options.device))
    gate(case, found)
    return timed_rows(case, found, options, "plain linear")


def quantised_rows(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """On an NF4 base, against the same op on the dense weight."""
    t = tensors(case, options.device)
    leaves = [tensor for tensor in (t.x, t.bias, t.scale) if tensor is not None]
    found = {
        f"{name} weight": partial(
            step,
            lambda weight=weight: bias_scale_linear(t.x, weight, t.bias, t.scale, case.scale_on),
            leaves,
            t.grad,
            case.backward,
        )
        for name, weight in (("dense", t.weight), ("NF4", nf4_quantize(t.weight)))
    }
    return [{**row, "case": f"NF4 {row['case']}"} for row in timed_rows(case, found, options, "dense weight")]


FP32, BF16 = torch.float32, torch.bfloat16


def cases_of(device: str) -> list[Case]:
    if device == "cuda":
        shapes = [(16384, 4096, 4096), (16384, 4096, 11008), (1024, 4096, 4096), (64, 4096, 4096)]
        cases = [Case(*shape, BF16, scale_on) for shape in shapes for scale_on in SCALE_ON]
        return [*cases, *(Case(1, 4096, 4096, BF16, scale_on, backward=False) for scale_on in SCALE_ON)]
    native = not products.is_slow(BF16, 1024, grad=True)
    # Where the CPU has no 16-bit matrix instructions, eager PyTorch takes half a minute for a step of the larger one.
    rows_in_16_bit = 1024 if native else 32
    shapes = [(1024, 2048, 2048), (128, 2048, 2048), (16, 2048, 2048), (1, 2048, 2048), (64, 128, 128), (1, 128, 128)]
    cases = [Case(*shape, FP32, scale_on) for shape in shapes for scale_on in SCALE_ON]
    cases += [Case(rows_in_16_bit, 2048, 2048, BF16, scale_on) for scale_on in SCALE_ON]
    return [*cases, *(Case(1, 2048, 2048, dtype, backward=False) for dtype in (FP32, BF16))]


def main() -> None:
    options = harness.arguments(__doc__)
    cases = cases_of(options.device)
    rows = [row for case in cases[: 3 if options.quick else None] for row in dense_rows(case, options)]
    if not options.quick:
        rows += [row for case in (cases[0], cases[-1]) for row in quantised_rows(case, options)]
    harness.report("bias_scale_linear", rows, options)


if __name__ == "__main__":
    main()
