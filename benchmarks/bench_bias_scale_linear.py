"""bias_scale_linear against eager PyTorch, torch.compile and the frozen linear alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import bias_scale_linear, nf4_dequantize, nf4_quantize, products
from mmfast.ops.bias_scale_linear import reference

FP32, BF16 = torch.float32, torch.bfloat16


class Shape(NamedTuple):
    """`rows` rows through a linear of features × out_features; one row is decoded, without gradients."""

    rows: int
    features: int
    out_features: int
    dtype: torch.dtype
    scale_on: str = "output"

    def __str__(self) -> str:
        size = f"{self.rows}x{self.features}->{self.out_features}"
        return f"scale on {self.scale_on}, {size} {harness.kind_of(self.dtype)}"


def shapes(device: str) -> list[Shape]:
    if device == "cuda":
        sizes = [(16384, 4096, 4096), (1, 4096, 4096), (16384, 4096, 11008), (1024, 4096, 4096), (64, 4096, 4096)]
        found = [Shape(*size, BF16) for size in sizes]
        return [*found, *(Shape(*sizes[0], BF16, scale_on) for scale_on in ("input", "none"))]
    # Where the CPU has no 16-bit matrix instructions, eager PyTorch takes half a minute for a step of 1024 rows.
    rows = 32 if products.is_slow(BF16, 1024, grad=True) else 1024
    found = [Shape(rows, 2048, 2048, BF16, scale_on) for scale_on in ("output", "input", "none")]
    found += [Shape(1024, 2048, 2048, FP32, scale_on) for scale_on in ("output", "input")]
    return [*found, *(Shape(*size, FP32) for size in [(128, 2048, 2048), (64, 128, 128), (1, 2048, 2048)])]


def arguments(shape: Shape, device: str) -> list[Any]:
    """A frozen weight; bias and scale in fp32, as they are trained."""
    x = torch.randn(shape.rows, shape.features, device=device).to(shape.dtype).requires_grad_()
    weight = (torch.randn(shape.out_features, shape.features, device=device) * shape.features**-0.5).to(shape.dtype)
    bias = torch.randn(shape.out_features, device=device, requires_grad=True)
    size = {"output": shape.out_features, "input": shape.features, "none": 0}[shape.scale_on]
    return [x, weight, bias, torch.randn(size, device=device, requires_grad=True) if size else None]


def on_nf4(shape: Shape, device: str) -> list[Any]:
    """The same with a weight in NF4, which comes last, and the values of that as the dense one."""
    x, weight, *trained = arguments(shape, device)
    q = nf4_quantize(weight)
    return [x, nf4_dequantize(q, shape.dtype), *trained, q]


def cast_first(scale_on: str, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """Bias and scale in the dtype of x, as where a whole model is in 16 bits; LitGPT's and LLaMA-Adapter's lines."""
    bias = bias.to(x.dtype)
    if scale is None:
        return F.linear(x, weight, bias)
    scale = scale.to(x.dtype)
    return scale * (F.linear(x, weight) + bias) if scale_on == "output" else F.linear(x * scale, weight) + bias


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen({device: shapes(device)}, device, quick)):
        eager = partial(reference, scale_on=shape.scale_on)
        providers: dict[str, Any] = {"eager": eager}
        providers |= {"eager, cast first": partial(cast_first, shape.scale_on)} if shape.dtype != FP32 else {}
        providers |= {"plain linear": lambda x, weight, *_: F.linear(x, weight)}
        providers |= harness.compiling(eager, device, quick) if index == 0 else {}
        providers |= harness.ours("bias_scale_linear", partial(bias_scale_linear, scale_on=shape.scale_on), device)
        for mode in harness.modes(index == 0) if shape.rows > 1 else ("forward",):
            yield _case(shape, mode, device, partial(arguments, shape, device), providers, "dense weight")
    shape = shapes(device)[0]
    if not quick:
        on_base: dict[str, Any] = {
            "dense weight": lambda x, weight, bias, scale, q: bias_scale_linear(x, weight, bias, scale),
            "mmfast": lambda x, weight, bias, scale, q: bias_scale_linear(x, q, bias, scale),
        }
        yield _case(shape, "both", device, partial(on_nf4, shape, device), on_base, "NF4 weight")


def _case(shape: Shape, mode: str, device: str, make: Any, providers: dict[str, Any], table: str) -> harness.Case:
    rows, features, out_features = shape[:3]
    product, weight = 2 * rows * features * out_features, features * out_features
    forward = rows * features + weight + rows * out_features
    backward = rows * features + weight + 2 * rows * out_features
    return harness.Case(
        op="bias_scale_linear",
        name=str(shape),
        table=table,
        mode=mode,
        arguments=make,
        providers=providers,
        limit=1e-4 if shape.dtype == FP32 else 2e-2,
        limits={"plain linear": math.inf},
        bytes={"forward": forward, "backward": backward, "both": forward + backward}[mode] * shape.dtype.itemsize,
        flops=product * (2 if mode == "both" else 1),
        dtype=shape.dtype,
        device=device,
    )
