"""Times gated_residual, forward and with its gradients, against eager PyTorch and torch.compile.

python benchmarks/bench_gated_residual.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import gated_residual
from mmfast.ops.backends import machine
from mmfast.ops.gated_residual import OP, check, reference

# Rows and H: hidden states of Flamingo's language models, from a prompt down to one token, and small models.
SHAPES = {
    "cpu": [(1024, 4096), (128, 4096), (64, 2048), (16, 2048), (64, 128), (1, 2048)],
    "cuda": [(16384, 4096), (2048, 4096), (64, 4096), (1, 4096)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def rounded_each_time(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As one writes it: in 16 bits every step is rounded."""
    return x + torch.tanh(gate) * y


def implementations(x: Tensor, y: Tensor, gate: Tensor) -> dict[str, Function]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Function] = {"eager": reference}
    if x.dtype != torch.float32:
        found["eager, gate in 16 bits"] = lambda x, y, gate: rounded_each_time(x, y, gate.to(x.dtype))
    try:
        compiled = torch.compile(reference, dynamic=False)
        compiled(x, y, gate)
        found["torch.compile"] = compiled
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  torch.compile: left out, {type(failure).__name__}")
    call, on = check(x, y, gate), machine(x.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[f"mmfast:{backend.name}"] = lambda *a, name=backend.name: gated_residual(*a, backend=name)
    found["auto"] = gated_residual
    return found


def providers(shape: tuple[int, int], dtype: torch.dtype, device: str, backward: bool) -> dict[str, harness.Provider]:
    """One trained gate in fp32; x and y need a gradient too."""
    torch.manual_seed(0)
    x, y, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    leaves = [tensor.requires_grad_(backward) for tensor in (x, y, torch.randn(1, device=device))]

    def step(function: Function) -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)] if backward else [out]

    return {name: lambda f=function: step(f) for name, function in implementations(*leaves).items()}


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[options.device][: 1 if options.quick else None]:
        for dtype in DTYPES[options.device]:
            for backward in (False, True):
                timed = providers(shape, dtype, options.device, backward)
                limit = 1e-5 if dtype == torch.float32 else 2e-2
                # Rounded at every step, the sum that is the gate's gradient is off by more.
                rounded = "eager, gate in 16 bits"
                harness.gate({name: run for name, run in timed.items() if name != rounded}, limit)
                if rounded in timed:
                    harness.gate({name: timed[name] for name in ("eager", rounded)}, 3 * limit)
                kind = str(dtype).removeprefix("torch.")
                case = f"{'both' if backward else 'forward'} {shape[0]}x{shape[1]} {kind}"
                rounds = options.rounds * (1 if shape[0] * shape[1] > 1 << 20 else 20)
                for name, timing in harness.measure(timed, options.device, rounds).items():
                    memory = round(harness.peak_extra_bytes(timed[name], options.device) / 2**20, 1)
                    rows.append({"case": case, "provider": name, **timing, "peak MiB": memory})
    harness.report("gated_residual", rows, options)


if __name__ == "__main__":
    main()
