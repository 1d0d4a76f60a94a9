"""spatio_temporal_pool against plain PyTorch, torch.compile and the numpy code of Video-ChatGPT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.spatio_temporal_pool import reference, spatio_temporal_pool

# B, T, N, D: clips of Video-ChatGPT (CLIP ViT-L/14, 100 frames of 256 patches), shorter ones, and very small ones.
SHAPES = {
    "cpu": [(1, 100, 256, 1024), (1, 16, 256, 1024), (1, 8, 64, 256), (1, 8, 16, 64), (1, 2, 4, 8)],
    "cuda": [(32, 100, 256, 1024), (1, 8, 64, 256), (1, 100, 256, 1024), (8, 8, 576, 1024)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}


def arguments(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype).requires_grad_()]


def two_means(features: Tensor) -> Tensor:
    """What one writes without thinking: two passes over the features."""
    return torch.cat([features.mean(2), features.mean(1)], 1)


def numpy_means(features: Tensor) -> Tensor:
    """As Video-ChatGPT stores its training features: fp16 arrays, one clip at a time."""
    clips = [np.concatenate([np.mean(clip, 1), np.mean(clip, 0)]) for clip in features.detach().numpy()]
    return torch.from_numpy(np.stack(clips))


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        batch, frames, patches, size = shape
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            providers: dict[str, Any] = {"eager": reference, "two torch.mean": two_means}
            providers |= harness.compiling(two_means, device, quick) if first else {}
            once = batch * size * (frames * patches + frames + patches) * dtype.itemsize
            for mode in harness.modes(index == 0):
                numpy = mode == "forward" and dtype == torch.float16 and device == "cpu"
                yield harness.Case(
                    op="spatio_temporal_pool",
                    name=f"{'x'.join(map(str, shape))} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, shape, dtype, device),
                    providers=providers
                    | ({"numpy (Video-ChatGPT)": numpy_means} if numpy else {})
                    | harness.ours("spatio_temporal_pool", spatio_temporal_pool, device),
                    limit=1e-5 if dtype == torch.float32 else 1e-2,
                    bytes=once * (2 if mode == "both" else 1),
                    device=device,
                )
