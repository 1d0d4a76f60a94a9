"""What the benchmarks of quantised formats share: shapes, providers of linears, and the order in which all is timed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import products
from mmfast.ops.backends import machine

# [N, K] of LLaMA-7B (attention, MLP), and smaller ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (1024, 1024), (256, 256)]
ROWS = {"cpu": [1, 2, 4, 8, 16, 128], "cuda": [1, 2, 4, 8, 16, 64, 4096]}
TRAINED = {"cpu": [128], "cuda": [4096]}

Providers = dict[str, harness.Provider]
Linears = dict[str, Callable[[Tensor], Tensor]]


def kernels(device: torch.device) -> list[str]:
    """The kernels that can be timed here: the interpreter proves kernels, it does not time them."""
    on = machine(device)
    return [
        name for name in ("cpu", "triton") if on.lacks(name) is None and not (on.device == "cpu" and name == "triton")
    ]


def compiled(function: Callable[..., Any], *arguments: Any) -> harness.Provider | None:
    """`function(*arguments)` by torch.compile; None, and said so, where that does not work."""
    try:
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    except Exception as error:  # no C++ compiler, or no Triton
        print(f"torch.compile does not work here: {type(error).__name__}")
        return None
    return lambda: fast(*arguments)


def timed(case: str, providers: Providers, elements: int, tolerance: float, options: argparse.Namespace) -> list[Any]:
    """The rows of one case. Raises unless all providers agree with the first."""
    (_, first), *others = providers.items()
    expected = first().double()
    for name, run in others:
        error = torch.linalg.vector_norm(run().double() - expected) / torch.linalg.vector_norm(expected)
        if not error <= tolerance:
            raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")
    rounds = options.rounds * (1 if elements > 1 << 20 else 20)
    timings = harness.measure(providers, options.device, rounds)
    return [{"case": case, "provider": name, **timing} for name, timing in timings.items()]


def rows_of(
    options: argparse.Namespace,
    quantize: Callable[[Tensor], Any],
    dequantize: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    dequantising: Callable[[Any, torch.dtype], Providers],
    peers: Callable[[Any, torch.dtype], Linears] = lambda q, dtype: {},
) -> list[dict[str, Any]]:
    """Dequantising and multiplying, for every shape and dtype.

    Args:
        quantize, dequantize, linear: the ops of the format.
        dequantising: a weight and a dtype to providers, the plain one first.
        peers: a weight and a dtype to other ways to multiply by it.
    """
    rows: list[dict[str, Any]] = []
    for shape in WEIGHTS[: 1 if options.quick else None]:
        for dtype in (torch.bfloat16, torch.float32):
            weight = (0.02 * torch.randn(shape, device=options.device)).to(dtype)
            q, elements = quantize(weight), weight.numel()
            case = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            rows += timed(f"dequantise {case}", dequantising(q, dtype), elements, 1e-6, options)
            dense = dequantize(q, dtype)
            linears: Linears = {
                "dense F.linear": lambda x, dense=dense: F.linear(x, dense),
                "dequantise, F.linear": lambda x, q=q: F.linear(x, dequantize(q, x.dtype)),
                **peers(q, dtype),
                **{name: lambda x, q=q, name=name: linear(x, q, backend=name) for name in kernels(q.device)},
            }
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            # A gradient in 16 bits takes eager PyTorch many seconds on a CPU without instructions for it.
            slow = options.device == "cpu" and products.is_slow(dtype, 128, grad=True) and elements > 2**20
            multiplied = [("linear", count) for count in ROWS[options.device][: 1 if options.quick else None]]
            multiplied += [("both", count) for count in TRAINED[options.device] if not (options.quick or slow)]
            for mode, count in multiplied:
                x = torch.randn(count, shape[1], device=options.device).to(dtype)
                providers = {name: _provider(run, x, mode == "both") for name, run in linears.items()}
                rows += timed(f"{mode} {count} · {case}", providers, elements * count, tolerance, options)
    return rows


def _provider(linear: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> harness.Provider:
    """x Wᵀ, or with `backward` both that and the gradient of x."""
    if not backward:
        return lambda: linear(x)
    leaf, grad = x.detach().requires_grad_(), torch.ones_like(linear(x))
    return lambda: torch.autograd.grad(linear(leaf), leaf, grad)[0]
