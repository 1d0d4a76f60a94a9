"""gated_cross_attention against OpenFlamingo's eager form, SDPA with a dense mask, FlexAttention and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.gated_cross_attention import gated_cross_attention, reference

# B, L, T: documents of interleaved images, captions of one image, and tokens that are decoded. Images are evenly
# spread, 64 latents each; 8 heads of 64.
SHAPES = {
    "cpu": [(1, 1024, 8), (4, 256, 5), (16, 32, 1), (8, 1, 8), (1, 1, 8)],
    "cuda": [(8, 2048, 8), (8, 1, 8), (8, 256, 5), (64, 32, 1)],
}
HEADS, DIM, MEDIA_LENGTH = 8, 64, 64
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}


def arguments(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Heads of projections, keys and values of a joint one, as a module has them; and the times."""
    batch, length, media = shape
    query = torch.randn(batch, length, HEADS, DIM, device=device).to(dtype).transpose(1, 2)
    joint = torch.randn(batch, media * MEDIA_LENGTH, 2, HEADS, DIM, device=device).to(dtype)
    tensors = [query, *(half.transpose(1, 2) for half in joint.unbind(2))]
    text_time = times(length, media).to(device).expand(batch, -1).contiguous()
    return [*(x.requires_grad_() for x in tensors), text_time]


def times(length: int, media: int) -> Tensor:
    return (torch.arange(1, length + 1) * media).div(length, rounding_mode="floor").clamp(min=1).int()


def open_flamingo(only_latest: bool, query: Tensor, key: Tensor, value: Tensor, text_time: Tensor) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:186-233, between its projections."""
    scores = torch.einsum("bhid,bhjd->bhij", query * query.size(-1) ** -0.5, key)
    media_time = torch.arange(key.size(2) // MEDIA_LENGTH, device=key.device) + 1
    compare = torch.eq if only_latest else torch.ge
    seen = compare(text_time[:, None, :, None], media_time.repeat_interleave(MEDIA_LENGTH))
    scores = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    if only_latest:
        weights = weights.masked_fill((text_time == 0)[:, None, :, None], 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


def flex_attention(only_latest: bool, query: Tensor, key: Tensor, value: Tensor, text_time: Tensor) -> Any:
    """FlexAttention, compiled; its block mask, which all layers of a model share, is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        medium = j // MEDIA_LENGTH + 1
        return text_time[b, i] == medium if only_latest else text_time[b, i] >= medium

    mask = create_block_mask(
        seen, query.size(0), None, query.size(2), key.size(2), device=str(query.device), BLOCK_SIZE=MEDIA_LENGTH
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, _: compiled(q, k, v, block_mask=mask)


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        batch, length, media = shape
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            # With one image both modes are the same.
            for only_latest in (True,) if index or quick else (True, False):
                first = index == 0 and only_latest and dtype == DTYPES[device][0]
                options = {"media_length": MEDIA_LENGTH, "only_latest": only_latest}
                eager = partial(open_flamingo, only_latest)
                providers: dict[str, Any] = {
                    "eager (OpenFlamingo)": eager,
                    "SDPA, dense mask": partial(reference, **options),
                }
                if first:
                    providers |= harness.compiling(eager, device, quick)
                    flex = harness.Prepared(partial(flex_attention, only_latest))
                    providers |= {"FlexAttention": flex} if device == "cuda" or not quick else {}
                visible = times(length, media).sum().item() if not only_latest else length
                flops = 4 * batch * HEADS * DIM * MEDIA_LENGTH * int(visible)
                size = batch * HEADS * DIM * dtype.itemsize * (length + media * MEDIA_LENGTH)
                for mode in harness.modes(first) if length > 1 else ("forward",):
                    name = f"{batch}x{length}, {media} media, {harness.kind_of(dtype)}"
                    yield harness.Case(
                        op="gated_cross_attention",
                        name=f"{'latest' if only_latest else 'all'} {name}",
                        mode=mode,
                        arguments=partial(arguments, shape, dtype, device),
                        providers=providers
                        | harness.ours("gated_cross_attention", partial(gated_cross_attention, **options), device),
                        limit=1e-4 if dtype == torch.float32 else 3e-2,
                        bytes={"forward": 2, "backward": 4, "both": 6}[mode] * size,
                        flops=int({"forward": 1, "backward": 2.5, "both": 3.5}[mode] * flops),
                        dtype=dtype,
                        device=device,
                    )
