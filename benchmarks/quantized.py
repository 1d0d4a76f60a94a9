"""What the benchmarks of quantised formats share: their shapes, and linears in a weight that is never dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness

# Rows of x, N and K: decoding and training with matrices of LLaMA-7B, and smaller ones.
SHAPES = {
    "cpu": [(1, 4096, 4096), (8, 4096, 4096), (128, 4096, 4096), (1, 11008, 4096), (1, 1024, 1024), (1, 256, 256)],
    "cuda": [(4096, 4096, 4096), (1, 4096, 4096), (8, 4096, 4096), (64, 4096, 4096), (1, 11008, 4096)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
# A gradient of fewer rows is not of training.
TRAINED_ROWS = 128

Providers = Mapping[str, Callable[..., Any]]


def size_of(q: Any) -> int:
    """Bytes of a quantised weight."""
    return sum(tensor.nbytes for tensor in q.tensors())


def weight(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (0.02 * torch.randn(shape, device=device)).to(dtype)


def quantised(quantize: Callable[[Tensor], Any], shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Any]:
    return [quantize(weight(shape, dtype, device)), dtype]


def multiplied(
    quantize: Callable[[Tensor], Any],
    dequantize: Callable[..., Tensor],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
) -> list[Any]:
    """x, the quantised weight, and its values as a dense one."""
    rows, out_features, features = shape
    q = quantize(weight((out_features, features), dtype, device))
    x = torch.randn(rows, features, device=device).to(dtype).requires_grad_()
    return [x, q, dequantize(q, dtype)]


def cases(
    op: str,
    bits: float,
    quantize: Callable[[Tensor], Any],
    dequantize: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    dequantising: Providers,
    peers: Providers,
    device: str,
    quick: bool,
) -> Iterator[harness.Case]:
    """Products with a weight of each shape, and dequantising it.

    Args:
        op: the format, with `bits` for an element.
        quantize, dequantize, linear: its ops.
        dequantising: functions of a quantised weight and a dtype, the plain one first.
        peers: functions of x, the quantised weight and the dense one, which multiply.
    """
    linears: dict[str, Callable[..., Any]] = {
        "eager (dense weight)": lambda x, q, dense: F.linear(x, dense),
        "dequantise, F.linear": lambda x, q, dense: F.linear(x, dequantize(q, x.dtype)),
        **peers,
        **harness.ours(f"{op}_linear", lambda x, q, dense, **backend: linear(x, q, **backend), device),
    }
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        rows, out_features, features = shape
        for dtype in DTYPES[device][: 1 if index > 2 or quick else None]:
            packed, elements = int(out_features * features * bits / 8), out_features * features
            activations = rows * (out_features + features) * dtype.itemsize
            for mode in harness.modes() if rows >= TRAINED_ROWS else ("forward",):
                passes = 2 if mode == "both" else 1
                yield harness.Case(
                    op=op,
                    name=f"{rows} x {out_features}x{features} {harness.kind_of(dtype)}",
                    table="products with the weight",
                    mode=mode,
                    arguments=partial(multiplied, quantize, dequantize, shape, dtype, device),
                    providers=linears,
                    limit=1e-5 if dtype == torch.float32 else 1e-2,
                    bytes=passes * (packed + activations),
                    flops=passes * 2 * rows * elements,
                    dtype=dtype,
                    device=device,
                )
    for dtype in DTYPES[device][: 1 if quick else None]:
        yield harness.Case(
            op=op,
            name=f"4096x4096 {harness.kind_of(dtype)}",
            table="dequantising",
            mode="forward",
            arguments=partial(quantised, quantize, (4096, 4096), dtype, device),
            providers={**dequantising, **harness.ours(f"{op}_dequantize", dequantize, device)},
            limit=1e-6,
            bytes=4096 * 4096 * dtype.itemsize + int(4096 * 4096 * bits / 8),
            device=device,
        )
