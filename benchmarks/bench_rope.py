"""rope against transformers' lines in eager PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.rope import reference, rope

# B, L and heads of q and k, each of 128 elements: Llama 2 and 3, from a prompt down to one token.
SHAPES = {
    "cpu": [(1, 2048, 32, 8), (1, 512, 32, 32), (1, 128, 32, 8), (8, 1, 32, 8), (1, 1, 32, 8)],
    "cuda": [(8, 2048, 32, 32), (1, 1, 32, 8), (8, 2048, 32, 8), (1, 2048, 32, 8)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16,)}


def arguments(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Heads as transposed views of [B, L, heads, D]."""
    batch, length, *heads = shape
    theta = torch.rand(1, length, 64, device=device).repeat(1, 1, 2) * 7
    made = (torch.randn(batch, length, count, 128, device=device).to(dtype).transpose(1, 2) for count in heads)
    return [*(x.requires_grad_() for x in made), theta.cos().to(dtype), theta.sin().to(dtype)]


def liger(*_: Any) -> Any:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    # It rotates in place, so it needs copies: of what it is given, every provider needs the values in each round.
    return lambda q, k, cos, sin: liger_rotary_pos_emb(q.clone(), k.clone(), cos, sin)


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            first = index == 0 and dtype == DTYPES[device][0]
            batch, length, heads, key_heads = shape
            providers: dict[str, Any] = {"eager": reference}
            providers |= harness.compiling(reference, device, quick) if first else {}
            providers |= {"Liger": harness.Prepared(liger)} if device == "cuda" else {}
            rotated = batch * length * (heads + key_heads) * 128 * dtype.itemsize
            for mode in harness.modes(first):
                yield harness.Case(
                    op="rope",
                    name=f"{batch}x{length} heads {heads}+{key_heads} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, shape, dtype, device),
                    providers=providers | harness.ours("rope", rope, device),
                    limit=1e-5 if dtype == torch.float32 else 1e-2,
                    bytes=(4 if mode == "both" else 2) * rotated,
                    device=device,
                )
