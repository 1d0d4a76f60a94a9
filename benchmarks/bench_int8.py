"""int8 weights against eager dequantising, eager linears in the dense weight and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import Int8Weight, int8_dequantize, int8_linear, int8_quantize, products
from mmfast.ops.backends import machine

# [N, K] of LLaMA-7B (attention, MLP), and smaller ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (1024, 1024), (256, 256)]
ROWS = {"cpu": [1, 2, 4, 8, 16, 128], "cuda": [1, 2, 4, 8, 16, 64, 4096]}
TRAINED = {"cpu": [128], "cuda": [4096]}


def plain(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What one writes without thinking."""
    return (values * scale[:, None]).to(dtype)


def kernels(device: torch.device) -> list[str]:
    """The kernels that can be timed here: the interpreter proves kernels, it does not time them."""
    on = machine(device)
    return [
        name for name in ("cpu", "triton") if on.lacks(name) is None and not (on.device == "cpu" and name == "triton")
    ]


def gate(timed: dict[str, harness.Provider], tolerance: float) -> None:
    """Raises unless all providers agree with the first."""
    (_, first), *others = timed.items()
    expected = first().double()
    for name, run in others:
        error = torch.linalg.vector_norm(run().double() - expected) / torch.linalg.vector_norm(expected)
        if not error <= tolerance:
            raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")


def dequantising(q: Int8Weight, dtype: torch.dtype) -> dict[str, harness.Provider]:
    timed: dict[str, harness.Provider] = {"values * scale": lambda: plain(q.values, q.scale, dtype)}
    try:
        fast = torch.compile(plain, dynamic=False)
        fast(q.values, q.scale, dtype)
        timed["torch.compile"] = lambda: fast(q.values, q.scale, dtype)
    except Exception as error:  # no C++ compiler, or no Triton: the row is left out, and said so
        print(f"torch.compile does not work here: {type(error).__name__}")
    for name in kernels(q.device):
        timed[name] = lambda name=name: int8_dequantize(q, dtype, backend=name)
    return timed


def multiplying(x: Tensor, q: Int8Weight, dense: Tensor, backward: bool) -> dict[str, harness.Provider]:
    """x Wᵀ, and the gradient of x with `backward`. The first provider has the dense weight."""

    def run(linear: Callable[[Tensor], Tensor]) -> harness.Provider:
        if not backward:
            return lambda: linear(x)
        leaf, grad = x.detach().requires_grad_(), torch.ones_like(linear(x))
        return lambda: torch.autograd.grad(linear(leaf), leaf, grad)[0]

    timed = {
        "dense F.linear": run(lambda x: F.linear(x, dense)),
        "dequantise, F.linear": run(lambda x: F.linear(x, int8_dequantize(q, x.dtype))),
    }
    for name in kernels(q.device):
        timed[name] = run(lambda x, name=name: int8_linear(x, q, backend=name))
    return timed


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []

    def add(case: str, timed: dict[str, harness.Provider], elements: int, tolerance: float) -> None:
        gate(timed, tolerance)
        rounds = options.rounds * (1 if elements > 1 << 20 else 20)
        for name, timing in harness.measure(timed, options.device, rounds).items():
            rows.append({"case": case, "provider": name, **timing})

    for shape in WEIGHTS[: 1 if options.quick else None]:
        for dtype in (torch.bfloat16, torch.float32):
            weight = (0.02 * torch.randn(shape, device=options.device)).to(dtype)
            q = int8_quantize(weight)
            case = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            add(f"dequantise {case}", dequantising(q, dtype), weight.numel(), 1e-6)
            dense = int8_dequantize(q, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            for count in ROWS[options.device][: 1 if options.quick else None]:
                x = torch.randn(count, shape[1], device=options.device).to(dtype)
                add(f"linear {count} · {case}", multiplying(x, q, dense, False), weight.numel() * count, tolerance)
            # A gradient in 16 bits takes eager PyTorch many seconds on a CPU without instructions for it.
            slow = options.device == "cpu" and products.is_slow(dtype, 128, grad=True) and weight.numel() > 2**20
            for count in TRAINED[options.device][: 0 if options.quick or slow else None]:
                x = torch.randn(count, shape[1], device=options.device).to(dtype)
                add(f"both {count} · {case}", multiplying(x, q, dense, True), weight.numel() * count, tolerance)
    harness.report("int8", rows, options)


if __name__ == "__main__":
    main()
