"""Times zero_init_attention, forward and backward, against LLaMA-Adapter's form, two calls of SDPA and torch.compile.

python benchmarks/bench_zero_init_attention.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import zero_init_attention
from mmfast.ops.backends import machine
from mmfast.ops.zero_init_attention import OP, check

Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """`length` queries on as many words, causally; one query on `words` where it is decoding, forward alone."""

    batch: int
    heads: int
    length: int
    dim: int
    prompts: int
    dtype: torch.dtype
    key_heads: int | None = None
    words: int | None = None
    backward: bool = True

    @property
    def is_large(self) -> bool:
        return self.batch * self.heads * self.length * (self.words or self.length) > 2**22

    def __str__(self) -> str:
        kind, mode = str(self.dtype).removeprefix("torch."), "" if self.backward else " forward"
        heads = f"{self.heads}" if self.key_heads is None else f"{self.heads}/{self.key_heads}"
        words = "" if self.words is None else f" on {self.words}"
        return f"{self.batch}x{heads}x{self.length}x{self.dim}{words} P{self.prompts} {kind}{mode}"


def tensors(case: Case, device: str) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and prompts as views of projections, a gate in fp32; the gradient of the output."""
    torch.manual_seed(0)
    key_heads = case.key_heads or case.heads

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(case.dtype).transpose(-3, -2)

    words = case.words or case.length
    found = [randn(case.batch, case.length, case.heads, case.dim)]
    found += [randn(case.batch, words, key_heads, case.dim) for _ in range(2)]
    found += [randn(case.prompts, key_heads, case.dim) for _ in range(2)]
    found.append(torch.randn(case.heads, device=device))
    return [x.requires_grad_(case.backward) for x in found], randn(case.batch, case.length, case.heads, case.dim)


def official(case: Case, mask: Tensor | None, *arguments: Tensor) -> Tensor:
    """LLaMA-Adapter's steps: prompts before words, one matrix of scores, two softmaxes, the gate on the first."""
    query, key, value, prompt_key, prompt_value, gate = arguments
    key, value = (
        torch.cat([few.expand(case.batch, *few.shape), many], 2).repeat_interleave(case.heads // many.shape[1], 1)
        for few, many in ((prompt_key, key), (prompt_value, value))
    )
    scores = torch.matmul(query, key.transpose(2, 3)) / case.dim**0.5
    if mask is not None:
        scores = scores + mask
    of_prompts = gate.tanh().view(1, -1, 1, 1).to(case.dtype) * F.softmax(
        scores[..., : case.prompts].float(), dim=-1
    ).type_as(query)
    of_words = F.softmax(scores[..., case.prompts :].float(), dim=-1).type_as(query)
    return torch.matmul(torch.cat([of_prompts, of_words], -1), value)


def words_alone(causal: bool, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal, enable_gqa=key.shape[1] != query.shape[1]
    )


def two_calls(causal: bool, *arguments: Tensor) -> Tensor:
    """SDPA on the words, SDPA on the prompts, a gate in the dtype of the query."""
    query, _, _, prompt_key, prompt_value, gate = arguments
    few = (x.expand(query.shape[0], *x.shape) for x in (prompt_key, prompt_value))
    return words_alone(causal, *arguments) + gate.tanh()[:, None, None].to(query.dtype) * words_alone(
        False, query, *few
    )


def step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, backward: bool) -> list[Tensor]:
    """What is timed: the output, and the gradients of the leaves."""
    if not backward:
        with torch.no_grad():
            return [forward()]
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def providers(case: Case, device: str) -> dict[str, Run]:
    """The official form first: ratios are against it. `auto` is what a call without `backend` runs."""
    leaves, grad = tensors(case, device)
    causal, mask = case.words is None, None
    if causal:
        mask = torch.full((case.length, case.length), float("-inf"), dtype=case.dtype, device=device).triu(1)
        mask = F.pad(mask, (case.prompts, 0))
    found: dict[str, Run] = {}

    def add(name: str, forward: Callable[[], Tensor], leaves: list[Tensor] = leaves) -> None:
        found[name] = partial(step, forward, leaves, grad, case.backward)

    add("official", lambda: official(case, mask, *leaves))
    add("words alone", lambda: words_alone(causal, *leaves), leaves[:3])
    add("two SDPA", lambda: two_calls(causal, *leaves))
    for name, function in (
        ("official, compiled", lambda: official(case, mask, *leaves)),
        ("two SDPA, compiled", lambda: two_calls(causal, *leaves)),
    ):
        if not case.is_large:  # a call of a compiled function costs more than such a case
            continue
        try:
            compiled = torch.compile(function, dynamic=False)
            compiled()
            add(name, compiled)
        except Exception as failure:  # no compiler here: the row is left out, and said so
            print(f"  {case} {name}: left out, {type(failure).__name__}")
    call, on = check(*leaves, is_causal=causal), machine(leaves[0].device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            add(
                f"mmfast:{backend.name}",
                lambda name=backend.name: zero_init_attention(*leaves, is_causal=causal, backend=name),
            )
    add("auto", lambda: zero_init_attention(*leaves, is_causal=causal))
    return found


def gate(case: Case, found: dict[str, Run]) -> None:
    """Raises unless all providers agree with the official form."""
    expected = found["official"]()
    limit = 1e-4 if case.dtype == torch.float32 else 5e-2
    for name, run in found.items():
        if name != "words alone":
            for actual, e in zip(run(), expected, strict=True):
                if not e.any():  # of one prompt's key: 0, or what roundings leave of it
                    continue
                error = (actual - e).float().norm() / e.float().norm()
                if not error <= limit:
                    raise AssertionError(f"{case} {name}: relative error {error:.1e}, allowed {limit:.1e}")


def rows_of(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    found = providers(case, options.device)
    gate(case, found)
    timings = harness.measure(found, options.device, options.rounds * (1 if case.is_large else 10), warmup=2)
    return [
        {
            "case": str(case),
            "provider": name,
            **timing,
            "of words alone": round(timing["ms"] / timings["words alone"]["ms"], 3),
            "peak MiB": round(harness.peak_extra_bytes(found[name], options.device) / 2**20, 1),
        }
        for name, timing in timings.items()
    ]


def cases_of(device: str) -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if device == "cuda":
        shapes = [(8, 32, 2048, 128, 10), (8, 32, 2048, 128, 20), (2, 16, 1024, 64, 10)]
        return [
            *(Case(*shape, bf16) for shape in shapes),
            Case(8, 32, 2048, 128, 10, bf16, key_heads=8),
            Case(8, 32, 1, 128, 10, bf16, words=512, backward=False),
        ]
    return [
        Case(2, 16, 1024, 64, 10, bf16),
        Case(2, 16, 1024, 64, 10, bf16, backward=False),
        Case(2, 16, 1024, 64, 10, fp32),
        Case(1, 32, 512, 128, 20, bf16, key_heads=8),
        Case(2, 16, 1024, 64, 1, bf16),
        Case(1, 16, 64, 64, 10, bf16),
        Case(1, 4, 16, 32, 10, fp32),
        Case(1, 32, 1, 128, 10, bf16, words=512, backward=False),
        Case(32, 32, 1, 128, 10, bf16, words=64, backward=False),
        Case(1, 1, 1, 16, 10, fp32, words=8, backward=False),
    ]


def main() -> None:
    options = harness.arguments(__doc__)
    cases = cases_of(options.device)[: 1 if options.quick else None]
    harness.report("zero_init_attention", [row for case in cases for row in rows_of(case, options)], options)


if __name__ == "__main__":
    main()
