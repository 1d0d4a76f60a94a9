"""Times swiglu, forward and with its gradients, against eager PyTorch, torch.compile and Liger.

python benchmarks/bench_swiglu.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import swiglu
from mmfast.ops.backends import machine
from mmfast.ops.swiglu import OP, check, reference

# Rows and F: Llama 2 7B's MLP, from a prompt down to one decoded token, and small models.
SHAPES = {
    "cpu": [(1024, 11008), (128, 11008), (64, 2048), (16, 2048), (1, 11008), (64, 128), (1, 2048)],
    "cuda": [(16384, 11008), (2048, 11008), (64, 11008), (1, 11008)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}


def implementations(gate: Tensor, up: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Eager first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"eager": reference}
    try:
        compiled = torch.compile(reference, dynamic=False)
        compiled(gate, up)
        found["torch.compile"] = compiled
    except Exception as failure:  # no compiler here: the row is left out, and said so
        print(f"  torch.compile: left out, {type(failure).__name__}")
    call, on = check(gate, up), machine(gate.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[f"mmfast:{backend.name}"] = lambda g, u, name=backend.name: swiglu(g, u, backend=name)
    if gate.device.type == "cuda":
        try:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            found["Liger"] = LigerSiLUMulFunction.apply
        except ImportError:
            print("  Liger: left out, not installed")
    found["auto"] = swiglu
    return found


def providers(shape: tuple[int, int], dtype: torch.dtype, device: str, backward: bool) -> dict[str, harness.Provider]:
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    gate.requires_grad_(backward)
    up.requires_grad_(backward)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        out = function(gate, up)
        return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)] if backward else [out]

    return {name: lambda f=function: step(f) for name, function in implementations(gate, up).items()}


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES[options.device][: 1 if options.quick else None]:
        for dtype in DTYPES[options.device]:
            for backward in (False, True):
                timed = providers(shape, dtype, options.device, backward)
                harness.gate(timed, 1e-5 if dtype == torch.float32 else 1e-2)
                kind = str(dtype).removeprefix("torch.")
                case = f"{'both' if backward else 'forward'} {shape[0]}x{shape[1]} {kind}"
                rounds = options.rounds * (1 if shape[0] * shape[1] > 1 << 20 else 20)
                for name, timing in harness.measure(timed, options.device, rounds).items():
                    memory = round(harness.peak_extra_bytes(timed[name], options.device) / 2**20, 1)
                    rows.append({"case": case, "provider": name, **timing, "peak MiB": memory})
    harness.report("swiglu", rows, options)


if __name__ == "__main__":
    main()
