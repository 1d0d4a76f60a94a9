"""linear_cross_entropy against eager PyTorch, torch.compile, PyTorch's own and Liger, by share of labelled rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.linear_cross_entropy import linear_cross_entropy


class Shape(NamedTuple):
    """rows × features hidden states, of which `labelled` have a label; a head of `vocabulary` tokens."""

    rows: int
    features: int
    vocabulary: int
    labelled: float
    dtype: torch.dtype
    trained: bool = False

    def __str__(self) -> str:
        size, head = f"{self.rows}x{self.features}x{self.vocabulary}", ", trained head" * self.trained
        return f"{size} {harness.kind_of(self.dtype)}, {self.labelled:.0%} labelled{head}"

    def flops(self, mode: str) -> int:
        """Of the logits of labelled rows, of the gradient of hidden states and, if it is trained, of the head."""
        product = 2 * round(self.rows * self.labelled) * self.features * self.vocabulary
        return product * {"forward": 1, "backward": 1 + self.trained, "both": 2 + self.trained}[mode]

    def bytes(self, mode: str) -> int:
        """One read of the head and of the labelled rows, and what is written of gradients, which are dense."""
        head, hidden = self.vocabulary * self.features, self.rows * self.features
        written = 0 if mode == "forward" else hidden + head * self.trained
        return int(head + hidden * self.labelled + written) * self.dtype.itemsize


BF16, FP32 = torch.bfloat16, torch.float32
SHARES = (0.15, 1.0, 0.5, 0.25, 0.06)
SHAPES = {
    "cpu": [
        *(Shape(1024, 1024, 32000, share, BF16) for share in SHARES),
        Shape(512, 1024, 32000, 0.15, BF16, trained=True),
        Shape(512, 1024, 32000, 0.15, FP32),
        # Language models of the embedded world, and one too small for any kernel.
        Shape(1600, 128, 512, 0.15, FP32),
        Shape(300, 128, 512, 0.15, FP32),
        Shape(20, 64, 512, 0.5, FP32),
    ],
    "cuda": [
        Shape(16384, 4096, 32000, 0.25, BF16),
        Shape(64, 1024, 32000, 0.25, BF16),
        *(Shape(16384, 4096, 32000, share, BF16) for share in (1.0, 0.5, 0.06)),
        Shape(16384, 4096, 128256, 0.25, BF16),
        Shape(16384, 4096, 32000, 0.25, BF16, trained=True),
    ],
}


def arguments(shape: Shape, device: str) -> list[Tensor]:
    """hidden, weight, labels; the logits have unit variance."""
    hidden = torch.randn(shape.rows, shape.features, device=device).to(shape.dtype).requires_grad_()
    weight = (torch.randn(shape.vocabulary, shape.features, device=device) * shape.features**-0.5).to(shape.dtype)
    labels = torch.randint(shape.vocabulary, (shape.rows,), device=device)
    labels[torch.randperm(shape.rows, device=device)[round(shape.rows * shape.labelled) :]] = -100
    return [hidden, weight.requires_grad_(shape.trained), labels]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def pytorch(*_: Tensor) -> Any:
    """Its chunked form, new in PyTorch 2.13."""
    return partial(F.linear_cross_entropy, ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions())


def liger(*_: Tensor) -> Any:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda hidden, weight, labels: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        providers: dict[str, Any] = {"eager": eager}
        providers |= harness.compiling(eager, device, quick) if index == 0 else {}
        # On a CPU it takes ten times as long as eager.
        providers |= {"F.linear_cross_entropy": harness.Prepared(pytorch)} if index == 0 or device == "cuda" else {}
        providers |= {"Liger": harness.Prepared(liger)} if device == "cuda" else {}
        for mode in ("forward", "both") if index == 0 and not quick else ("both",):
            yield harness.Case(
                op="linear_cross_entropy",
                name=str(shape),
                mode=mode,
                arguments=partial(arguments, shape, device),
                providers=providers | harness.ours("linear_cross_entropy", linear_cross_entropy, device),
                limit=1e-4 if shape.dtype == torch.float32 else 2e-2,
                bytes=shape.bytes(mode),
                flops=shape.flops(mode),
                dtype=shape.dtype,
                device=device,
            )
