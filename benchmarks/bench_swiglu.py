"""swiglu against eager PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.swiglu import reference, swiglu

# Rows and F: Llama 2 7B's MLP, from a prompt down to one decoded token, and small models.
SHAPES = {
    "cpu": [(1024, 11008), (128, 11008), (16, 2048), (64, 128), (1, 11008)],
    "cuda": [(16384, 11008), (1, 11008), (2048, 11008), (64, 11008)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}


def arguments(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2)]


def liger(*_: Any) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            providers: dict[str, Any] = {"eager": reference}
            providers |= harness.compiling(reference, device, quick) if first else {}
            providers |= {"Liger": harness.Prepared(liger)} if device == "cuda" else {}
            size = shape[0] * shape[1] * dtype.itemsize
            for mode in harness.modes(first):
                yield harness.Case(
                    op="swiglu",
                    name=f"{shape[0]}x{shape[1]} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, shape, dtype, device),
                    providers=providers | harness.ours("swiglu", swiglu, device),
                    limit=1e-5 if dtype == torch.float32 else 1e-2,
                    bytes={"forward": 3, "backward": 5, "both": 8}[mode] * size,
                    device=device,
                )
