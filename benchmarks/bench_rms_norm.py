"""rms_norm, alone and of a sum, against LlamaRMSNorm's lines, F.rms_norm, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.rms_norm import reference, rms_norm

EPS = 1e-6
# Rows and H, whether of a sum, and whether the weight is trained.
SHAPES = {
    "cpu": [
        (2048, 4096, True, False),
        (2048, 4096, True, True),
        (2048, 4096, False, False),
        (128, 4096, True, False),
        (16, 4096, False, False),
        (64, 128, True, False),
        (1, 4096, False, False),
    ],
    "cuda": [
        (16384, 4096, True, False),
        (16, 4096, False, False),
        (16384, 4096, False, False),
        (16384, 4096, True, True),
        (16384, 8192, True, False),
        (2048, 2048, True, False),
    ],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16,)}


def arguments(rows: int, size: int, summed: bool, trained: bool, dtype: torch.dtype, device: str) -> list[Any]:
    x, residual = (torch.randn(rows, size, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight = (torch.rand(size, device=device) + 0.5).to(dtype).requires_grad_(trained)
    return [x, weight, EPS, residual if summed else None]


def pytorch_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, eps)
    return y if residual is None else (y, h)


def liger(*_: Any) -> Any:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.transformers.functional import liger_rms_norm

    def run(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Any:
        if residual is None:
            return liger_rms_norm(x, weight, eps)
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

    return run


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, (rows, size, summed, trained) in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            providers: dict[str, Any] = {"eager": reference, "F.rms_norm": pytorch_norm}
            providers |= harness.compiling(reference, device, quick) if first else {}
            providers |= {"Liger": harness.Prepared(liger)} if device == "cuda" else {}
            forward, backward = (4, 4) if summed else (2, 3)
            for mode in harness.modes(first) if not trained else ("both",):
                name = f"{rows}x{size} {harness.kind_of(dtype)}"
                yield harness.Case(
                    op="rms_norm",
                    name=f"{'add + norm' if summed else 'norm'} {name}{', trained weight' * trained}",
                    mode=mode,
                    arguments=partial(arguments, rows, size, summed, trained, dtype, device),
                    providers=providers | harness.ours("rms_norm", rms_norm, device),
                    limit=1e-4 if dtype == torch.float32 else 2e-2,
                    bytes=rows
                    * size
                    * dtype.itemsize
                    * {"forward": forward, "backward": backward, "both": forward + backward}[mode],
                    device=device,
                )
