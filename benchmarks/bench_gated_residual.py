"""gated_residual against eager PyTorch, as the definition and as one writes it, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.gated_residual import gated_residual, reference

# Rows and H: hidden states of Flamingo's language models, from a prompt down to one token, and small models.
SHAPES = {
    "cpu": [(1024, 4096), (128, 4096), (16, 2048), (64, 128), (1, 2048)],
    "cuda": [(16384, 4096), (1, 4096), (2048, 4096), (64, 4096)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}
ROUNDED = "eager, gate in 16 bits"


def arguments(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """One trained gate in fp32; x and y need a gradient too."""
    x, y = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return [x, y, torch.randn(1, device=device, requires_grad=True)]


def rounded_each_time(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """As one writes it: in 16 bits every step is rounded."""
    return x + torch.tanh(gate.to(x.dtype)) * y


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            limit = 1e-5 if dtype == torch.float32 else 2e-2
            providers: dict[str, Any] = {"eager": reference}
            providers |= {ROUNDED: rounded_each_time} if dtype != torch.float32 else {}
            providers |= harness.compiling(reference, device, quick) if first else {}
            for mode in harness.modes(first):
                yield harness.Case(
                    op="gated_residual",
                    name=f"{shape[0]}x{shape[1]} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, shape, dtype, device),
                    providers=providers | harness.ours("gated_residual", gated_residual, device),
                    limit=limit,
                    # Rounded at every step, the sum that is the gate's gradient is off by more.
                    limits={ROUNDED: 3 * limit},
                    # The gradient of x is that of the output.
                    bytes={"forward": 3, "backward": 3, "both": 6}[mode] * shape[0] * shape[1] * dtype.itemsize,
                    device=device,
                )
