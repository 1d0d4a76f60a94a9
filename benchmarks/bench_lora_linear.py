"""Times lora_linear, forward and backward, against eager PyTorch, torch.compile, PEFT and the frozen linear alone.

python benchmarks/bench_lora_linear.py --rounds 15 --out benchmarks/results/cpu
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
from mmfast.ops import lora_linear, lora_linear_group, nf4_quantize, products
from mmfast.ops.backends import machine
from mmfast.ops.lora_linear import OP, check

SCALING = 2.0
Run = Callable[[], Any]


class Case(NamedTuple):
    """`rows` rows through a linear of features × out_features; forward and backward, or forward alone (decoding)."""

    rows: int
    features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    dropout: float = 0.0
    backward: bool = True

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        dropout = f" dropout {self.dropout}" if self.dropout else ""
        mode = "" if self.backward else " forward"
        return f"{self.rows}x{self.features}->{self.out_features} r={self.rank} {kind}{dropout}{mode}"


class Tensors(NamedTuple):
    """A frozen weight; adapters in fp32, as they are trained."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    grad: Tensor


def tensors(case: Case, device: str) -> Tensors:
    torch.manual_seed(0)
    x = torch.randn(case.rows, case.features, device=device).to(case.dtype).requires_grad_(case.backward)
    weight = (torch.randn(case.out_features, case.features, device=device) * case.features**-0.5).to(case.dtype)
    lora_a = (torch.randn(case.rank, case.features, device=device) * case.features**-0.5).requires_grad_(case.backward)
    lora_b = torch.randn(case.out_features, case.rank, device=device).requires_grad_(case.backward)
    return Tensors(x, weight, lora_a, lora_b, torch.randn(case.rows, case.out_features, device=device).to(case.dtype))


def eager(t: Tensors, dropout: float) -> Tensor:
    update = F.linear(F.linear(F.dropout(t.x, dropout), t.lora_a.to(t.x.dtype)), t.lora_b.to(t.x.dtype))
    return F.linear(t.x, t.weight) + SCALING * update


def peft_layer(t: Tensors, dropout: float) -> torch.nn.Module:
    """PEFT's own layer on the same weight and with the same adapter."""
    from peft.tuners.lora import Linear, LoraConfig

    base = torch.nn.Linear(*t.weight.t().shape, bias=False, device="meta")
    base.weight = torch.nn.Parameter(t.weight, requires_grad=False)
    rank = t.lora_a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=dropout)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha, lora_dropout=dropout)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = (
        torch.nn.Parameter(p.detach().clone()) for p in (t.lora_a, t.lora_b)
    )
    return layer.train()


def step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, backward: bool) -> list[Tensor]:
    """What is timed: the output, and the gradients of the leaves."""
    if not backward:
        with torch.no_grad():
            return [forward()]
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def providers(case: Case, t: Tensors) -> dict[str, Run]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    leaves = [t.x, t.lora_a, t.lora_b]
    found: dict[str, Run] = {}

    def add(name: str, forward: Callable[[], Tensor], leaves: list[Tensor] = leaves) -> None:
        found[name] = partial(step, forward, leaves, t.grad, case.backward)

    add("eager", lambda: eager(t, case.dropout))
    add("plain linear", lambda: F.linear(t.x, t.weight), [t.x])
    try:
        compiled = torch.compile(lambda: eager(t, case.dropout), dynamic=False)
        compiled()
        add("torch.compile", compiled)
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  {case} torch.compile: left out, {type(failure).__name__}")
    try:
        layer = peft_layer(t, case.dropout)
        add("PEFT", lambda: layer(t.x), [t.x, *(p for p in layer.parameters() if p.requires_grad)])
    except ImportError as failure:
        print(f"  {case} PEFT: left out, {failure}")
    arguments = (t.x, t.weight, t.lora_a, t.lora_b, SCALING, None, case.dropout)
    call, on = check(*arguments), machine(t.x.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            add(f"mmfast:{backend.name}", lambda name=backend.name: lora_linear(*arguments, backend=name))
    if t.x.device.type == "cuda":
        from mmfast.kernels.lora_linear import down
        from mmfast.kernels.lora_linear_fused import fused

        def one_kernel() -> Tensor:
            s, out = down(t.x, t.lora_a.to(t.x.dtype), None, 0), torch.empty_like(t.grad)
            fused(t.x, t.weight, s, t.lora_b.to(t.x.dtype), None, SCALING, out)
            return out

        if not case.backward and not case.dropout:
            add("triton, one kernel", one_kernel)
    add("auto", lambda: lora_linear(*arguments))
    return found


def gate(case: Case, found: dict[str, Run]) -> None:
    """Raises unless all providers agree with eager (without dropout, whose masks differ)."""
    if case.dropout:
        return
    expected = found["eager"]()
    limit = 1e-4 if case.dtype == torch.float32 else 2e-2
    for name, run in found.items():
        if name != "plain linear":
            for actual, e in zip(run(), expected, strict=True):
                error = (actual - e).float().norm() / e.float().norm()
                if not error <= limit:
                    raise AssertionError(f"{case} {name}: relative error {error:.1e}, allowed {limit:.1e}")


def rows_of(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    t = tensors(case, options.device)
    found = providers(case, t)
    gate(case, found)
    work = case.rows * case.features * case.out_features
    slow = options.device == "cpu" and products.is_slow(case.dtype, case.rows, grad=True)
    rounds = 3 if slow and work > 2**24 else options.rounds * (1 if work > 2**28 else 20)
    timings = harness.measure(found, options.device, rounds, warmup=1)
    rows = []
    for name, timing in timings.items():
        row = {
            "case": str(case),
            "provider": name,
            **timing,
            "of plain": round(timing["ms"] / timings["plain linear"]["ms"], 3),
        }
        row["peak MiB"] = round(harness.peak_extra_bytes(found[name], options.device) / 2**20, 1)
        rows.append(row)
    return rows


def cast_rows(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """16 bits where the CPU has no instructions for them, so that PyTorch's own linear is no measure of anything.

    It is measured against the plain linear made in fp32 from tensors cast.
    """
    t = tensors(case, options.device)
    found: dict[str, Run] = {
        "plain linear, cast to fp32": lambda: torch.autograd.grad(
            F.linear(t.x.float(), t.weight.float()).to(case.dtype), t.x, t.grad
        ),
        "lora_linear": lambda: torch.autograd.grad(
            lora_linear(t.x, t.weight, t.lora_a, t.lora_b, SCALING), [t.x, t.lora_a, t.lora_b], t.grad
        ),
    }
    timings = harness.measure(found, options.device, options.rounds, warmup=1)
    return [{"case": str(case), "provider": name, **timing} for name, timing in timings.items()]


def group_rows(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """q, k and v together and apart."""
    made = [tensors(case, options.device) for _ in range(3)]
    x, grads = made[0].x, [t.grad for t in made]
    lists = [[t.weight for t in made], [t.lora_a for t in made], [t.lora_b for t in made], [SCALING] * 3]
    leaves = [x, *lists[1], *lists[2]]

    def run(forward: Callable[[], Any]) -> Any:
        return torch.autograd.grad(forward(), leaves, grads)

    found: dict[str, Run] = {
        "eager": lambda: run(lambda: [eager(t._replace(x=x), case.dropout) for t in made]),
        "three lora_linear": lambda: run(
            lambda: [lora_linear(x, *sibling, None, case.dropout) for sibling in zip(*lists, strict=True)]
        ),
        "lora_linear_group": lambda: run(lambda: lora_linear_group(x, *lists, None, case.dropout)),
    }
    timings = harness.measure(found, options.device, options.rounds, warmup=1)
    return [{"case": f"q, k, v {case}", "provider": name, **timing} for name, timing in timings.items()]


def quantised_rows(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """On an NF4 base (QLoRA), against the same op on the dense weight and against PEFT on bitsandbytes."""
    t = tensors(case, options.device)
    quantised = nf4_quantize(t.weight)
    leaves = [t.x, t.lora_a, t.lora_b]
    found: dict[str, Run] = {
        "dense lora_linear": lambda: step(
            lambda: lora_linear(t.x, t.weight, t.lora_a, t.lora_b, SCALING), leaves, t.grad, case.backward
        ),
        "NF4 lora_linear": lambda: step(
            lambda: lora_linear(t.x, quantised, t.lora_a, t.lora_b, SCALING), leaves, t.grad, case.backward
        ),
    }
    try:
        import bitsandbytes as bnb
        from peft.tuners.lora import LoraConfig
        from peft.tuners.lora.bnb import Linear4bit

        base = bnb.nn.Linear4bit(*t.weight.t().shape, bias=False, compute_dtype=case.dtype, quant_type="nf4")
        base.weight = bnb.nn.Params4bit(t.weight.cpu(), requires_grad=False, quant_type="nf4")
        base = base.to(options.device)
        rank = case.rank
        config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank))
        layer = Linear4bit(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha)
        trained = [t.x, *(p for p in layer.parameters() if p.requires_grad)]
        peer = partial(step, lambda: layer(t.x), trained, t.grad, case.backward)
        peer()
        found["PEFT on bitsandbytes"] = peer
    except Exception as failure:  # a peer that cannot run is a line, not the end of the benchmark
        print(f"  NF4 {case} PEFT on bitsandbytes: left out, {type(failure).__name__}: {str(failure)[:60]}")
    rounds = options.rounds * (1 if case.rows > 16 else 20)
    timings = harness.measure(found, options.device, rounds, warmup=1)
    return [{"case": f"NF4 base {case}", "provider": name, **timing} for name, timing in timings.items()]


FP32, BF16 = torch.float32, torch.bfloat16
CPU = [
    Case(1024, 2048, 2048, 16, FP32),
    Case(1024, 2048, 2048, 16, FP32, 0.05),
    Case(128, 2048, 2048, 16, FP32),
    Case(16, 2048, 2048, 16, FP32),
    Case(1, 2048, 2048, 16, FP32),
    Case(1, 2048, 2048, 16, FP32, backward=False),
    Case(64, 128, 128, 8, FP32),
    Case(1, 128, 128, 8, FP32),
    Case(16, 2048, 2048, 16, BF16),
    Case(1, 2048, 2048, 16, BF16, backward=False),
]
# Where the CPU has no 16-bit matrix instructions, eager PyTorch takes half a minute for a step with 1024 rows.
CPU_16_BIT = {True: Case(1024, 2048, 2048, 16, BF16), False: Case(64, 2048, 2048, 16, BF16)}
CUDA = [
    Case(16384, 4096, 4096, 16, BF16),
    Case(16384, 4096, 4096, 16, BF16, 0.05),
    Case(16384, 4096, 4096, 16, BF16, backward=False),
    Case(16384, 4096, 11008, 16, BF16),
    Case(16384, 11008, 4096, 64, BF16),
    Case(1024, 4096, 4096, 16, BF16),
    Case(64, 4096, 4096, 16, BF16),
    Case(1, 4096, 4096, 16, BF16, backward=False),
]


def main() -> None:
    options = harness.arguments(__doc__)
    on_cpu = options.device == "cpu"
    native = not products.is_slow(BF16, 1024, grad=True)
    cases = [CPU[0], CPU_16_BIT[native], *CPU[1:]] if on_cpu else CUDA
    quantised = [CPU[0], CPU[5]] if on_cpu else [CUDA[0], CUDA[-1]]
    rows = [row for case in cases[: 1 if options.quick else None] for row in rows_of(case, options)]
    if not options.quick:
        rows += group_rows(cases[0], options)
        if on_cpu and not native:
            rows += cast_rows(CPU_16_BIT[True], options)
        rows += [row for case in quantised for row in quantised_rows(case, options)]
    harness.report("lora_linear", rows, options)


if __name__ == "__main__":
    main()
