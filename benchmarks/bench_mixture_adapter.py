"""mixture_adapter against LaVIN's convolutions, the best forms of it in eager PyTorch, and torch.compile."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.mixture_adapter import ACTIVATIONS, mixture_adapter, reference

FP32, BF16 = torch.float32, torch.bfloat16
DROPPED = "mmfast, dropout 0.1"
EAGER_DROPPED = "eager, dropout 0.1"


class Shape(NamedTuple):
    """`samples` × `tokens` rows of `features`; one expert and one group are a plain adapter without a router."""

    samples: int
    tokens: int
    features: int
    dtype: torch.dtype
    ranks: int = 8
    experts: int = 2
    groups: int = 2
    activation: str = "identity"

    def __str__(self) -> str:
        plain = f", plain {self.activation}" if self.experts == 1 else ""
        size = f"{self.samples}x{self.tokens}x{self.features} r={self.ranks}"
        return f"{size} {harness.kind_of(self.dtype)}{plain}"


PLAIN: dict[str, Any] = {"experts": 1, "groups": 1, "activation": "relu"}
SHAPES = {
    "cpu": [
        Shape(1, 2048, 4096, BF16),
        Shape(1, 2048, 4096, FP32),
        Shape(4, 257, 1024, BF16),
        Shape(1, 1024, 1024, BF16, ranks=64, **PLAIN),
        Shape(1, 1, 1024, FP32, ranks=64, **PLAIN),
        Shape(1, 1, 4096, BF16),
    ],
    "cuda": [Shape(8, 2048, 4096, BF16), Shape(16, 1, 4096, BF16), Shape(32, 257, 1024, BF16)],
}


class Tensors(NamedTuple):
    """Parameters in fp32, as they are trained; without a router where there is one expert."""

    x: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    router: Tensor | None


def arguments(shape: Shape, device: str) -> Tensors:
    def trained(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=device) * scale).requires_grad_()

    x = torch.randn(shape.samples, shape.tokens, shape.features, device=device).to(shape.dtype).requires_grad_()
    router = torch.rand(shape.samples, shape.experts, device=device).requires_grad_()
    return Tensors(
        x,
        trained(shape.ranks, shape.features, scale=shape.features**-0.5),
        trained(shape.ranks),
        trained(shape.experts, shape.features, shape.ranks // shape.groups, scale=0.3),
        trained(shape.experts, shape.features),
        router if shape.experts > 1 else None,
    )


# ---- what one would write in PyTorch


def convolutions(shape: Shape, *given: Any) -> Tensor:
    """LaVIN's form: 1 × 1 convolutions on a transposed view, everything in the dtype of x."""
    t, dtype = Tensors(*given), shape.dtype
    x, weights = t.x.transpose(1, 2), [None] * shape.experts if t.router is None else t.router.to(dtype).unbind(1)
    h = F.conv1d(x, t.down.to(dtype)[..., None], t.down_bias.to(dtype))
    h, y = ACTIVATIONS[shape.activation](h), x
    for up, bias, weight in zip(t.up.to(dtype), t.up_bias.to(dtype), weights, strict=True):
        update = F.conv1d(h, up[..., None], bias, groups=shape.groups)
        y = y + (update if weight is None else update * weight[:, None, None])
    return y.transpose(1, 2).contiguous()


def dense(up: Tensor, groups: int) -> Tensor:
    """[..., H, R / groups] as [..., H, R] with zeros."""
    if groups == 1:
        return up
    parts, seen = up.chunk(groups, -2), up.shape[-1]
    return torch.cat([F.pad(part, (g * seen, (groups - 1 - g) * seen)) for g, part in enumerate(parts)], -2)


def hidden(shape: Shape, t: Tensors, dropout: float) -> Tensor:
    h = ACTIVATIONS[shape.activation](F.linear(t.x, t.down.to(shape.dtype), t.down_bias.to(shape.dtype)))
    return F.dropout(h, dropout) if dropout else h


def per_expert(shape: Shape, *given: Any, dropout: float = 0.0) -> Tensor:
    """A dense linear for each expert."""
    t, dtype = Tensors(*given), shape.dtype
    h = hidden(shape, t, dropout)
    weights = [None] * shape.experts if t.router is None else t.router.to(dtype).unbind(1)
    y = t.x
    for up, bias, weight in zip(dense(t.up.to(dtype), shape.groups), t.up_bias.to(dtype), weights, strict=True):
        update = F.linear(h, up, bias)
        y = y + (update if weight is None else update * weight[:, None, None])
    return y


def merged(shape: Shape, *given: Any, dropout: float = 0.0) -> Tensor:
    """The experts of each sample merged into one dense update: the fastest of these."""
    t, dtype = Tensors(*given), shape.dtype
    if t.router is None:
        return per_expert(shape, *given, dropout=dropout)
    router = t.router.to(dtype)
    h = hidden(shape, t, dropout)
    up = dense((router @ t.up.to(dtype).flatten(1)).view(shape.samples, shape.features, -1), shape.groups)
    return t.x + torch.baddbmm((router @ t.up_bias.to(dtype))[:, None], h, up.transpose(1, 2))


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        adapter = partial(_adapter, shape.activation, 0.0)
        eager = partial(merged, shape)
        providers: dict[str, Any] = {"eager, merged": eager}
        providers |= {"eager, per expert": partial(per_expert, shape)} if shape.experts > 1 else {}
        providers |= {"eager, definition": lambda *t, act=shape.activation: reference(*t, 1.0, None, act)}
        providers |= harness.compiling(eager, device, quick) if index == 0 else {}
        for mode in harness.modes(index == 0):
            # oneDNN's backward of these convolutions in bfloat16 corrupts the heap (torch 2.13, docs/facts.md).
            works = device == "cuda" or shape.dtype == FP32 or mode == "forward"
            lavin = {"LaVIN (convolutions)": partial(convolutions, shape)} if works else {}
            # As in a training step of LaVIN.
            dropped: dict[str, Any] = {EAGER_DROPPED: partial(eager, dropout=0.1)}
            dropped |= {DROPPED: partial(_adapter, shape.activation, 0.1)}
            yield harness.Case(
                op="mixture_adapter",
                name=str(shape),
                mode=mode,
                arguments=partial(arguments, shape, device),
                providers=providers
                | lavin
                | (dropped if shape.tokens > 1 else {})
                | harness.ours("mixture_adapter", adapter, device),
                # Where z is rounded to 16 bits, as in eager forms, the slope of relu is another one for some z near 0.
                limit=1e-4 if shape.dtype == FP32 else 5e-2,
                limits=dict.fromkeys(dropped, math.inf),
                bytes={"forward": 2, "backward": 3, "both": 5}[mode]
                * shape.samples
                * shape.tokens
                * shape.features
                * shape.dtype.itemsize,
                device=device,
            )


def _adapter(activation: str, dropout: float, *given: Any, **backend: str) -> Tensor:
    return mixture_adapter(*given, 1.0, dropout, activation, **backend)
