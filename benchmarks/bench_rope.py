"""Times rope against transformers' lines in eager PyTorch, torch.compile and Liger.

python benchmarks/bench_rope.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import rope
from mmfast.ops.backends import machine
from mmfast.ops.rope import OP, check, reference

Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """Heads of 128 elements, as transposed views of [B, L, heads, D]; `mode` is "forward" or "both"."""

    batch: int
    length: int
    heads: tuple[int, int]
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.mode} {self.batch}x{self.length} heads {self.heads[0]}+{self.heads[1]} {kind}"


def implementations(case: Case, arguments: list[Tensor]) -> dict[str, Rope]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Rope] = {"eager": reference}
    try:
        compiled = torch.compile(reference, dynamic=False)
        compiled(*arguments)
        found["torch.compile"] = compiled
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  {case} torch.compile: left out, {type(failure).__name__}")
    # Liger rotates in place: forward is timed on what the round before left.
    if arguments[0].is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        found["Liger"] = lambda q, k, cos, sin: liger_rotary_pos_emb(q.clone(), k.clone(), cos, sin)
    call, on = check(*arguments), machine(arguments[0].device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[backend.name] = partial(rope, backend=backend.name)
    found["auto"] = rope
    return found


def step(function: Rope, arguments: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What is timed: the outputs, and the gradients of q and k."""
    outputs = function(*arguments)
    return [*outputs, *torch.autograd.grad(outputs, arguments[:2], grads)] if grads else list(outputs)


def providers(case: Case, device: str) -> dict[str, harness.Provider]:
    torch.manual_seed(0)

    def heads(count: int) -> Tensor:
        x = torch.randn(case.batch, case.length, count, 128, device=device).to(case.dtype)
        return x.transpose(1, 2).requires_grad_(case.mode == "both")

    theta = torch.rand(1, case.length, 64, device=device).repeat(1, 1, 2) * 7
    arguments = [*map(heads, case.heads), theta.cos().to(case.dtype), theta.sin().to(case.dtype)]
    grads = [torch.randn_like(x) for x in arguments[:2]] if case.mode == "both" else []
    found = implementations(case, arguments)
    return {name: partial(step, function, arguments, grads) for name, function in found.items()}


def cases_of(device: str) -> list[Case]:
    if device == "cuda":
        sizes: list[tuple[int, int, torch.dtype]] = [(8, 2048, torch.bfloat16), (1, 2048, torch.bfloat16)]
    else:
        sizes = [(1, 2048, torch.bfloat16), (1, 2048, torch.float32), (1, 512, torch.float16)]
        small = [(1, 128), (8, 1), (1, 16), (1, 1)]
        sizes += [(*s, dtype) for s in small for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    return [
        Case(batch, length, heads, dtype, mode)
        for batch, length, dtype in sizes
        for heads in ((32, 32), (32, 8))
        for mode in ("forward", "both")
    ]


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for case in cases_of(options.device)[: 2 if options.quick else None]:
        timed = providers(case, options.device)
        harness.gate(timed, 1e-5 if case.dtype == torch.float32 else 1e-2, str(case))
        rounds = options.rounds * (1 if case.batch * case.length > 256 else 20)
        for name, timing in harness.measure(timed, options.device, rounds).items():
            rows.append({"case": str(case), "provider": name, **timing})
    harness.report("rope", rows, options)


if __name__ == "__main__":
    main()
