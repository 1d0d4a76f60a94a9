"""lora_linear against eager PyTorch, torch.compile, PEFT, PEFT on bitsandbytes, and the frozen linear alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.benchmarks import harness
from mmfast.ops import lora_linear, lora_linear_group, nf4_dequantize, nf4_quantize, products

SCALING = 2.0
FP32, BF16 = torch.float32, torch.bfloat16


class Shape(NamedTuple):
    """`rows` rows through a linear of features × out_features; one row is decoded, without gradients."""

    rows: int
    features: int
    out_features: int
    rank: int
    dtype: torch.dtype
    dropout: float = 0.0

    def __str__(self) -> str:
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        size = f"{self.rows}x{self.features}->{self.out_features}"
        return f"{size} r={self.rank} {harness.kind_of(self.dtype)}{dropout}"

    def flops(self, mode: str) -> int:
        """Of the product and the update; W is frozen."""
        product = 2 * self.rows * self.features * self.out_features
        update = 2 * self.rows * self.rank * (self.features + self.out_features)
        return {"forward": product + update, "backward": product + 2 * update, "both": 2 * product + 3 * update}[mode]

    def bytes(self, mode: str) -> int:
        """Forward reads x and W and writes y; backward reads x, dy and W and writes dx."""
        x, y = self.rows * self.features, self.rows * self.out_features
        weight, adapters = self.features * self.out_features, self.rank * (self.features + self.out_features)
        forward, backward = x + y + weight + adapters, 2 * x + y + weight + 2 * adapters
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode] * self.dtype.itemsize


def shapes(device: str) -> list[Shape]:
    if device == "cuda":
        return [
            Shape(16384, 4096, 4096, 16, BF16),
            Shape(1, 4096, 4096, 16, BF16),
            Shape(16384, 4096, 4096, 16, BF16, 0.05),
            Shape(16384, 4096, 11008, 16, BF16),
            Shape(16384, 11008, 4096, 64, BF16),
            Shape(1024, 4096, 4096, 16, BF16),
            Shape(64, 4096, 4096, 16, BF16),
        ]
    # Where the CPU has no 16-bit matrix instructions, eager PyTorch takes half a minute for a step of 1024 rows.
    rows = 64 if products.is_slow(BF16, 1024, grad=True) else 1024
    found = [
        Shape(rows, 2048, 2048, 16, BF16),
        Shape(1024, 2048, 2048, 16, FP32),
        Shape(1024, 2048, 2048, 16, FP32, 0.05),
    ]
    found += [Shape(size, 2048, 2048, 16, FP32) for size in (128, 16)]
    return [*found, Shape(64, 128, 128, 8, FP32), Shape(1, 2048, 2048, 16, FP32), Shape(1, 2048, 2048, 16, BF16)]


def arguments(shape: Shape, device: str) -> list[Any]:
    """x, a frozen weight, and adapters in fp32, as they are trained."""
    x = torch.randn(shape.rows, shape.features, device=device).to(shape.dtype).requires_grad_()
    weight = (torch.randn(shape.out_features, shape.features, device=device) * shape.features**-0.5).to(shape.dtype)
    lora_a = nn.Parameter(torch.randn(shape.rank, shape.features, device=device) * shape.features**-0.5)
    return [x, weight, lora_a, nn.Parameter(torch.randn(shape.out_features, shape.rank, device=device))]


def siblings(shape: Shape, device: str) -> list[Any]:
    """x, and lists of the weights and adapters of q, k and v."""
    made = [arguments(shape, device) for _ in range(3)]
    return [made[0][0], *(list(column) for column in list(zip(*made, strict=True))[1:])]


def on_nf4(shape: Shape, device: str) -> list[Any]:
    """A weight in NF4, which comes last, and the values of that as the dense one."""
    x, weight, lora_a, lora_b = arguments(shape, device)
    q = nf4_quantize(weight)
    return [x, nf4_dequantize(q, shape.dtype), lora_a, lora_b, q]


def eager(dropout: float, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    update = F.linear(F.linear(F.dropout(x, dropout), lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return F.linear(x, weight) + SCALING * update


def peft(dropout: float, x: Tensor, weight: Tensor, lora_a: nn.Parameter, lora_b: nn.Parameter) -> Callable[..., Any]:
    """PEFT's own layer, with the very weight and adapter."""
    from peft.tuners.lora import Linear, LoraConfig

    base = nn.Linear(*weight.t().shape, bias=False, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    rank = lora_a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), lora_dropout=dropout)
    layer = Linear(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha, lora_dropout=dropout)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora_a, lora_b
    layer.train()
    return lambda x, *_: layer(x)


def peft_on_bitsandbytes(x: Tensor, weight: Tensor, lora_a: nn.Parameter, lora_b: nn.Parameter, _: Any) -> Any:
    import bitsandbytes as bnb
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.bnb import Linear4bit

    base = bnb.nn.Linear4bit(*weight.t().shape, bias=False, compute_dtype=x.dtype, quant_type="nf4")
    base.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    base, rank = base.to(x.device), lora_a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank))
    layer = Linear4bit(base, "default", config=config, r=rank, lora_alpha=config.lora_alpha)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = lora_a, lora_b
    return lambda x, *_: layer(x)


def one_kernel(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Triton's second tier: the large product and the update in one loop."""
    from mmfast.kernels.lora_linear import down
    from mmfast.kernels.lora_linear_fused import fused

    s, out = down(x, lora_a.to(x.dtype), None, 0), x.new_empty(x.shape[0], weight.shape[0])
    fused(x, weight, s, lora_b.to(x.dtype), None, SCALING, out)
    return out


def group(dropout: float, x: Tensor, weights: Any, lora_as: Any, lora_bs: Any) -> Any:
    return lora_linear_group(x, weights, lora_as, lora_bs, [SCALING] * 3, None, dropout)


def each(one: Callable[..., Tensor], x: Tensor, *lists: Any) -> list[Tensor]:
    return [one(x, *sibling) for sibling in zip(*lists, strict=True)]


def providers_of(shape: Shape, device: str, quick: bool, first: bool) -> dict[str, Any]:
    plain = partial(eager, shape.dropout)
    found: dict[str, Any] = {"eager": plain, "plain linear": lambda x, weight, *_: F.linear(x, weight)}
    found |= harness.compiling(plain, device, quick) if first else {}
    found |= {"PEFT": harness.Prepared(partial(peft, shape.dropout))}
    return found | harness.ours("lora_linear", partial(ours, shape.dropout), device)


def ours(dropout: float, x: Tensor, weight: Any, lora_a: Tensor, lora_b: Tensor, **backend: str) -> Tensor:
    return lora_linear(x, weight, lora_a, lora_b, SCALING, None, dropout, **backend)


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    chosen = harness.chosen({device: shapes(device)}, device, quick)
    for index, shape in enumerate(chosen):
        providers = providers_of(shape, device, quick, index == 0)
        for mode in harness.modes(index == 0) if shape.rows > 1 else ("forward",):
            more = {"triton, one kernel": one_kernel} if (device, mode, shape.dropout) == ("cuda", "forward", 0) else {}
            yield _case(shape, mode, device, partial(arguments, shape, device), providers | more, "dense weight")
    if quick:
        return
    shape = chosen[0]
    together: dict[str, Any] = {"eager": partial(each, partial(eager, shape.dropout))}
    together |= {
        "three lora_linear": partial(each, partial(ours, shape.dropout)),
        "mmfast": partial(group, shape.dropout),
    }
    yield _case(shape, "both", device, partial(siblings, shape, device), together, "q, k and v together", 3)
    for shape, mode in ((chosen[0], "both"), (chosen[-1], "forward")):
        on_base: dict[str, Any] = {
            "dense weight": lambda x, dense, lora_a, lora_b, q: ours(0.0, x, dense, lora_a, lora_b),
            "PEFT on bitsandbytes": harness.Prepared(peft_on_bitsandbytes),
            "mmfast": lambda x, dense, lora_a, lora_b, q: ours(0.0, x, q, lora_a, lora_b),
        }
        yield _case(shape, mode, device, partial(on_nf4, shape, device), on_base, "NF4 weight (QLoRA)")


def _case(
    shape: Shape, mode: str, device: str, make: Any, providers: Mapping[str, Any], table: str, count: int = 1
) -> harness.Case:
    # Masks of dropout differ from provider to provider, so there is nothing to compare.
    limit = math.inf if shape.dropout else 1e-4 if shape.dtype == FP32 else 2e-2
    return harness.Case(
        op="lora_linear",
        name=str(shape),
        table=table,
        mode=mode,
        arguments=make,
        providers=providers,
        limit=limit,
        limits={"plain linear": math.inf},
        bytes=count * shape.bytes(mode),
        flops=count * shape.flops(mode),
        dtype=shape.dtype,
        device=device,
    )
