"""Times rms_norm, alone and of a sum, against LlamaRMSNorm's lines, F.rms_norm, torch.compile and Liger.

python benchmarks/bench_rms_norm.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import rms_norm
from mmfast.ops.backends import machine
from mmfast.ops.rms_norm import OP, check, reference

EPS = 1e-6
Norm = Callable[[Tensor, Tensor, float, "Tensor | None"], "Tensor | tuple[Tensor, Tensor]"]


class Case(NamedTuple):
    """`mode` is "forward", or "both" (forward and backward) with a frozen or a trained weight."""

    rows: int
    hidden_size: int
    dtype: torch.dtype
    with_residual: bool
    mode: str

    def __str__(self) -> str:
        op, kind = "add+norm" if self.with_residual else "norm", str(self.dtype).removeprefix("torch.")
        return f"{op} {self.mode} {self.rows}x{self.hidden_size} {kind}"


def pytorch_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, eps)
    return y if residual is None else (y, h)


def implementations(case: Case, arguments: tuple[Any, ...]) -> dict[str, Norm]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Norm] = {"eager": reference, "F.rms_norm": pytorch_norm}
    try:
        compiled = torch.compile(reference, dynamic=False)
        compiled(*arguments)
        found["torch.compile"] = compiled
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  {case} torch.compile: left out, {type(failure).__name__}")
    if arguments[0].is_cuda and not case.with_residual and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_rms_norm

        found["Liger"] = lambda x, weight, eps, residual: liger_rms_norm(x, weight, eps)
    call, on = check(*arguments), machine(arguments[0].device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[backend.name] = partial(rms_norm, backend=backend.name)
    found["auto"] = rms_norm
    return found


def step(norm: Norm, arguments: tuple[Any, ...], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """What is timed: the outputs, and the gradients of the leaves."""
    found = norm(*arguments)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)] if leaves else outputs


def providers(case: Case, device: str) -> dict[str, harness.Provider]:
    torch.manual_seed(0)
    x, residual, *grads = (torch.randn(case.rows, case.hidden_size, device=device).to(case.dtype) for _ in range(4))
    weight = (torch.rand(case.hidden_size, device=device) + 0.5).to(case.dtype)
    arguments = x, weight, EPS, residual if case.with_residual else None
    leaves: list[Tensor] = []
    if case.mode != "forward":
        leaves = [x, *([residual] if case.with_residual else []), *([weight] if "trained" in case.mode else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    grads = grads[: 2 if case.with_residual else 1]
    found = implementations(case, arguments)
    return {name: partial(step, norm, arguments, leaves, grads) for name, norm in found.items()}


def cases_of(device: str) -> list[Case]:
    bf16, fp32, fp16 = torch.bfloat16, torch.float32, torch.float16
    modes = ("forward", "both, frozen", "both, trained")
    if device == "cuda":
        sizes = [(rows, width, bf16) for rows in (16384, 2048, 16) for width in (2048, 4096, 8192)]
    else:
        sizes = [(2048, 4096, bf16), (2048, 4096, fp32), (512, 4096, fp16)]
        small = [(128, 4096), (16, 4096), (64, 128), (1, 4096), (1, 2048), (1, 128)]
        sizes += [(*shape, dtype) for shape in small for dtype in (bf16, fp32, fp16)]
    return [Case(*size, with_residual, mode) for size in sizes for with_residual in (True, False) for mode in modes]


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for case in cases_of(options.device)[: 3 if options.quick else None]:
        timed = providers(case, options.device)
        harness.gate(timed, 1e-4 if case.dtype == torch.float32 else 2e-2, str(case))
        rounds = options.rounds * (1 if case.rows * case.hidden_size > 1 << 20 else 20)
        for name, timing in harness.measure(timed, options.device, rounds).items():
            rows.append({"case": str(case), "provider": name, **timing})
    harness.report("rms_norm", rows, options)


if __name__ == "__main__":
    main()
