"""gated_cross_attention against OpenFlamingo's eager form, SDPA with a dense mask, FlexAttention and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import gated_cross_attention
from mmfast.ops.backends import machine
from mmfast.ops.gated_cross_attention import OP, check, reference

# B, L, T: documents of interleaved images, captions of one image, and tokens that are decoded. Images are evenly
# spread, 64 latents each; 8 heads of 64.
SHAPES = {
    "cpu": [(1, 1024, 8), (2, 1024, 8), (4, 256, 5), (16, 32, 1), (1, 32, 1), (1, 1, 8), (8, 1, 8)],
    "cuda": [(8, 2048, 8), (8, 256, 5), (64, 32, 1), (8, 1, 8)],
}
HEADS, DIM, MEDIA_LENGTH = 8, 64, 64
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def open_flamingo(query: Tensor, key: Tensor, value: Tensor, text_time: Tensor, only_latest: bool) -> Tensor:
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


def inputs(batch: int, length: int, media: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Heads of projections, keys and values of a joint one, as a module has them; and the times."""
    query = torch.randn(batch, length, HEADS, DIM, device=device).to(dtype).transpose(1, 2)
    joint = torch.randn(batch, media * MEDIA_LENGTH, 2, HEADS, DIM, device=device).to(dtype)
    times = (torch.arange(1, length + 1, device=device) * media).div(length, rounding_mode="floor").clamp(min=1)
    return [query, *(half.transpose(1, 2) for half in joint.unbind(2))], times.expand(batch, -1).int().contiguous()


def flex_attention(tensors: list[Tensor], text_time: Tensor, only_latest: bool) -> Attention:
    """FlexAttention, compiled; its block mask, which all layers of a model share, is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        medium = j // MEDIA_LENGTH + 1
        return text_time[b, i] == medium if only_latest else text_time[b, i] >= medium

    query, key, _ = tensors
    mask = create_block_mask(
        seen, query.size(0), None, query.size(2), key.size(2), device=str(query.device), BLOCK_SIZE=MEDIA_LENGTH
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def compiled_eager(tensors: list[Tensor], text_time: Tensor, only_latest: bool) -> Attention:
    compiled = torch.compile(open_flamingo, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, text_time, only_latest)


def implementations(
    tensors: list[Tensor], text_time: Tensor, only_latest: bool, with_compile: bool
) -> dict[str, Attention]:
    """The eager form first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Attention] = {"eager": lambda q, k, v: open_flamingo(q, k, v, text_time, only_latest)}
    found["SDPA, dense mask"] = lambda q, k, v: reference(q, k, v, text_time, MEDIA_LENGTH, only_latest=only_latest)
    peers = {"torch.compile": compiled_eager, "FlexAttention": flex_attention}
    for name, make in peers.items() if with_compile else ():
        try:
            found[name] = make(tensors, text_time, only_latest)
            found[name](*tensors)
        except Exception as error:  # no C++ compiler, no Triton, no backward: the row is left out, and said so
            found.pop(name, None)
            print(f"{name} does not work here: {str(error).splitlines()[0]}")
    options: dict[str, Any] = {"text_time": text_time, "media_length": MEDIA_LENGTH, "only_latest": only_latest}
    query, key, value = tensors
    call, on = check(query, key, value, **options), machine(query.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[backend.name] = lambda q, k, v, name=backend.name: gated_cross_attention(
                q, k, v, **options, backend=name
            )
    found["auto"] = lambda q, k, v: gated_cross_attention(q, k, v, **options)
    return found


def providers(
    tensors: list[Tensor], text_time: Tensor, only_latest: bool, mode: str, with_compile: bool
) -> dict[str, harness.Provider]:
    """What is timed: `mode` is "forward" or "both"."""
    if mode == "forward":
        found = implementations(tensors, text_time, only_latest, with_compile)
        return {name: lambda run=run: [run(*tensors)] for name, run in found.items()}
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[0])
    found = implementations(leaves, text_time, only_latest, with_compile)
    return {name: lambda run=run: torch.autograd.grad(run(*leaves), leaves, grad) for name, run in found.items()}


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    shapes = SHAPES[options.device][: 1 if options.quick else None]
    for batch, length, media in shapes:
        for dtype in DTYPES[options.device]:
            tensors, text_time = inputs(batch, length, media, dtype, options.device)
            # With one image both modes are the same; `all` is timed on the first shape alone.
            for only_latest in (True, False) if (batch, length, media) == shapes[0] else (True,):
                for mode in ("forward", "both") if length > 1 else ("forward",):
                    which = "latest" if only_latest else "all"
                    case = f"{which} {mode} {batch}x{length} {media} media {str(dtype).removeprefix('torch.')}"
                    first = (batch, length, media) == shapes[0] and only_latest
                    timed = providers(tensors, text_time, only_latest, mode, with_compile=first)
                    harness.gate(timed, 1e-4 if dtype == torch.float32 else 3e-2, case)
                    rounds = options.rounds * (1 if batch * length >= 1024 else 5)
                    for name, timing in harness.measure(timed, options.device, rounds).items():
                        rows.append({"case": case, "provider": name, **timing})
    harness.report("gated_cross_attention", rows, options)


if __name__ == "__main__":
    main()
