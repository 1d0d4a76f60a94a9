"""nn.PerceiverResampler against OpenFlamingo's eager module, as it is and with PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.nn import PerceiverResampler

# B · T, N, D: six layers, 64 latents, 8 heads of 64.
SHAPES = {
    "cpu": [(1, 2056, 1024), (8, 257, 1024), (1, 257, 1024), (1, 64, 256), (1, 4, 64)],
    "cuda": [(64, 257, 1024), (1, 257, 1024), (8, 2056, 1024), (1, 16448, 1024)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
LAYERS, LATENTS, INNER = 6, 64, 512


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Any]:
    """A resampler to train, and media, which are frozen as features of an encoder are."""
    count, media, size = shape
    return [PerceiverResampler(size).to(device, dtype), torch.randn(count, 1, media, size, device=device).to(dtype)]


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:54-63."""
    scores = torch.einsum("bhid,bhjd->bhij", query * query.size(-1) ** -0.5, key)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def eager(attend: Any, resampler: PerceiverResampler, media: Tensor) -> Tensor:
    """The module as OpenFlamingo runs it (helpers.py:41-65, 107-132), with the weights of `resampler`."""
    x = media.flatten(0, 1)
    latents = resampler.latents.repeat(x.size(0), 1, 1)
    for layer in resampler.layers:
        attention, feed_forward = layer
        normed, heads = attention.norm_latents(latents), attention.num_heads
        query = attention.to_q(normed)
        key, value = attention.to_kv(torch.cat((attention.norm_media(x), normed), -2)).chunk(2, -1)
        query, key, value = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (query, key, value))
        out = attend(query, key, value).transpose(1, 2).flatten(2)
        latents = attention.to_out(out) + latents
        latents = feed_forward(latents) + latents
    return resampler.norm(latents)[:, None]


PROVIDERS = {
    "eager (OpenFlamingo)": partial(eager, eager_attention),
    "OpenFlamingo with SDPA": partial(eager, F.scaled_dot_product_attention),
    "mmfast": lambda resampler, media: resampler(media),
}


def flops(count: int, media: int, size: int, mode: str) -> int:
    """Projections of media and latents, attention, output and feed-forward; frozen media need no gradient."""
    of_media = 4 * media * size * INNER
    of_latents = 4 * LATENTS * size * INNER * 2 + 4 * LATENTS * (media + LATENTS) * INNER + 16 * LATENTS * size * size
    return count * LAYERS * {"forward": of_media + of_latents, "both": 2 * of_media + 3 * of_latents}[mode]


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, (count, media, size) in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            weights = LAYERS * (4 * size * INNER + 8 * size * size)
            for mode in harness.modes():
                passes = 3 if mode == "both" else 1
                yield harness.Case(
                    op="perceiver_resampler",
                    name=f"{count}x{media}x{size} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, (count, media, size), dtype, device),
                    providers=PROVIDERS,
                    limit=1e-4 if dtype == torch.float32 else 5e-2,
                    bytes=(passes * weights + min(passes, 2) * count * media * size) * dtype.itemsize,
                    flops=flops(count, media, size, mode),
                    dtype=dtype,
                    jointly=True,
                    device=device,
                )
