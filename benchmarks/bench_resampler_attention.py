"""resampler_attention against PyTorch's attention on the concatenation, OpenFlamingo's eager form and FlexAttention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.resampler_attention import reference, resampler_attention

# B, N: videos of 8 frames of CLIP ViT-L/14, images, a few tokens; 8 heads of 64, 64 queries that are latents too.
SHAPES = {
    "cpu": [(1, 2056), (8, 257), (1, 257), (1, 64), (1, 4)],
    "cuda": [(64, 257), (1, 257), (8, 2056), (1, 16448)],
}
HEADS, QUERIES, DIM = 8, 64, 64
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16,)}


def arguments(batch: int, media: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Halves of joint projections, as a module has them."""
    found = [torch.randn(batch, QUERIES, HEADS, DIM, device=device).to(dtype).transpose(1, 2)]
    for length in (media, QUERIES):
        joint = torch.randn(batch, length, 2, HEADS, DIM, device=device).to(dtype)
        found += [half.transpose(1, 2) for half in joint.unbind(2)]
    return [x.requires_grad_() for x in found]


def open_flamingo(
    query: Tensor, media_key: Tensor, media_value: Tensor, latent_key: Tensor, latent_value: Tensor
) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:41-65, between its projections."""
    query = query * query.size(-1) ** -0.5
    key, value = torch.cat((media_key, latent_key), -2), torch.cat((media_value, latent_value), -2)
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def flex_attention(
    query: Tensor, media_key: Tensor, media_value: Tensor, latent_key: Tensor, latent_value: Tensor
) -> Tensor:
    """FlexAttention on the concatenation."""
    from torch.nn.attention.flex_attention import flex_attention

    key, value = torch.cat((media_key, latent_key), -2), torch.cat((media_value, latent_value), -2)
    out: Tensor = flex_attention(query, key, value)
    return out


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, (batch, media) in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            providers: dict[str, Any] = {"eager (SDPA, concatenated)": reference, "OpenFlamingo": open_flamingo}
            if first:
                providers |= harness.compiling(open_flamingo, device, quick)
                providers |= harness.compiling(flex_attention, device, quick, "FlexAttention")
            flops = 4 * batch * HEADS * QUERIES * (media + QUERIES) * DIM
            size = batch * HEADS * DIM * dtype.itemsize * (media + 2 * QUERIES)
            for mode in harness.modes(first):
                yield harness.Case(
                    op="resampler_attention",
                    name=f"{batch}x{media} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, batch, media, dtype, device),
                    providers=providers | harness.ours("resampler_attention", resampler_attention, device),
                    limit=1e-4 if dtype == torch.float32 else 3e-2,
                    bytes={"forward": 2, "backward": 4, "both": 6}[mode] * size,
                    flops=int({"forward": 1, "backward": 2.5, "both": 3.5}[mode] * flops),
                    dtype=dtype,
                    device=device,
                )
