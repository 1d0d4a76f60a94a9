"""zero_init_attention against LLaMA-Adapter's form, two calls of SDPA, torch.compile, and attention without prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops.zero_init_attention import zero_init_attention


class Shape(NamedTuple):
    """`length` queries on as many words, causally; one query on `words` where it is decoding, forward alone."""

    batch: int
    heads: int
    length: int
    dim: int
    prompts: int
    dtype: torch.dtype
    key_heads: int | None = None
    words: int | None = None

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.key_heads is None else f"{self.heads}/{self.key_heads}"
        words = "" if self.words is None else f" on {self.words}"
        kind = harness.kind_of(self.dtype)
        return f"{self.batch}x{heads}x{self.length}x{self.dim}{words}, {self.prompts} prompts, {kind}"


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = {
    "cpu": [
        Shape(2, 16, 1024, 64, 10, BF16),
        Shape(2, 16, 1024, 64, 10, FP32),
        Shape(1, 32, 512, 128, 20, BF16, key_heads=8),
        Shape(1, 16, 64, 64, 10, BF16),
        Shape(1, 4, 16, 32, 10, FP32),
        Shape(32, 32, 1, 128, 10, BF16, words=64),
        Shape(1, 32, 1, 128, 10, BF16, words=512),
    ],
    "cuda": [
        Shape(8, 32, 2048, 128, 10, BF16),
        Shape(8, 32, 1, 128, 10, BF16, words=512),
        Shape(8, 32, 2048, 128, 10, BF16, key_heads=8),
        Shape(2, 16, 1024, 64, 10, BF16),
    ],
}


def arguments(shape: Shape, device: str) -> list[Tensor]:
    """Query, key, value and prompts as views of projections, a gate in fp32."""
    key_heads = shape.key_heads or shape.heads

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(shape.dtype).transpose(-3, -2)

    found = [randn(shape.batch, shape.length, shape.heads, shape.dim)]
    found += [randn(shape.batch, shape.words or shape.length, key_heads, shape.dim) for _ in range(2)]
    found += [randn(shape.prompts, key_heads, shape.dim) for _ in range(2)]
    found.append(torch.randn(shape.heads, device=device))
    return [x.requires_grad_() for x in found]


def official(shape: Shape, device: str) -> harness.Prepared:
    """LLaMA-Adapter's steps: prompts before words, one matrix of scores, two softmaxes, the gate on the first."""

    def make(*_: Tensor) -> Callable[..., Tensor]:
        mask = None
        if shape.words is None:
            mask = torch.full((shape.length, shape.length), float("-inf"), dtype=shape.dtype, device=device).triu(1)
            mask = F.pad(mask, (shape.prompts, 0))
        return partial(_official, shape, mask)

    return harness.Prepared(make)


def _official(shape: Shape, mask: Tensor | None, *arguments: Tensor) -> Tensor:
    query, key, value, prompt_key, prompt_value, gate = arguments
    key, value = (
        torch.cat([few.expand(shape.batch, *few.shape), many], 2).repeat_interleave(shape.heads // many.shape[1], 1)
        for few, many in ((prompt_key, key), (prompt_value, value))
    )
    scores = torch.matmul(query, key.transpose(2, 3)) / shape.dim**0.5
    if mask is not None:
        scores = scores + mask
    of_prompts = gate.tanh().view(1, -1, 1, 1).to(shape.dtype) * F.softmax(
        scores[..., : shape.prompts].float(), dim=-1
    ).type_as(query)
    of_words = F.softmax(scores[..., shape.prompts :].float(), dim=-1).type_as(query)
    return torch.matmul(torch.cat([of_prompts, of_words], -1), value)


def words_alone(causal: bool, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1]
    )


def two_calls(causal: bool, *arguments: Tensor) -> Tensor:
    """SDPA on the words, SDPA on the prompts, a gate in the dtype of the query: LitGPT's steps."""
    query, _, _, prompt_key, prompt_value, gate = arguments
    few = (x.expand(query.shape[0], *x.shape) for x in (prompt_key, prompt_value))
    return words_alone(causal, *arguments) + gate.tanh()[:, None, None].to(query.dtype) * words_alone(
        False, query, *few
    )


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        causal = shape.words is None
        providers: dict[str, Any] = {
            "eager (LLaMA-Adapter)": official(shape, device),
            "words alone": partial(words_alone, causal),
            "two SDPA": partial(two_calls, causal),
        }
        if index == 0:
            providers |= harness.compiling(official(shape, device), device, quick)
            providers |= harness.compiling(partial(two_calls, causal), device, quick, "two SDPA, compiled")
        attend = partial(zero_init_attention, is_causal=causal)
        words = shape.words or shape.length
        flops = shape.batch * shape.heads * shape.length * shape.dim * (2 * words if causal else 4 * words)
        flops += 4 * shape.batch * shape.heads * shape.length * shape.dim * shape.prompts
        key_heads = shape.key_heads or shape.heads
        size = shape.batch * shape.dim * (shape.heads * shape.length + key_heads * words) * shape.dtype.itemsize
        for mode in harness.modes(index == 0) if causal else ("forward",):
            yield harness.Case(
                op="zero_init_attention",
                name=str(shape),
                mode=mode,
                arguments=partial(arguments, shape, device),
                providers=providers | harness.ours("zero_init_attention", attend, device),
                limit=1e-4 if shape.dtype == torch.float32 else 5e-2,
                limits={"words alone": math.inf},
                bytes={"forward": 2, "backward": 4, "both": 6}[mode] * size,
                flops=int({"forward": 1, "backward": 2.5, "both": 3.5}[mode] * flops),
                dtype=shape.dtype,
                device=device,
            )
