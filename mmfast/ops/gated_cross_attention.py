"""Attention of text to the media that each token may see, given as times and not as a mask: Flamingo's, ungated."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, extension
from mmfast.ops.backends import Backend, Machine, Op
from mmfast.ops.resampler_attention import DTYPES, heads_inside, kernels_cannot, only_reference_has_matrix


def text_times(media_locations: Tensor, past: Tensor | None = None) -> Tensor:
    """For each token, the number of media at or before it: the `text_time` of `gated_cross_attention`.

    Args:
        media_locations: [B, L] (bool), True at the tokens that stand for a medium, each of which sees its own.
        past: [B] (any integer dtype), media in the tokens before these, which a cache holds; default: none. A token
            that is decoded alone thereby sees the last medium of its prefix.

    Returns:
        [B, L] (int32).

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    where = "text_times"
    if media_locations.dtype != torch.bool:
        raise TypeError(f"{where}: media_locations is {media_locations.dtype}; expected torch.bool; compare ids first")
    if media_locations.dim() != 2:
        raise ValueError(f"{where}: media_locations is {list(media_locations.shape)}; expected [B, L]")
    times = media_locations.cumsum(1, dtype=torch.int32)
    if past is None:
        return times
    if past.is_floating_point() or past.dtype == torch.bool:
        raise TypeError(f"{where}: past is {past.dtype}; expected an integer dtype")
    if past.shape != media_locations.shape[:1]:
        raise ValueError(f"{where}: past is {list(past.shape)}; expected [B] = {list(media_locations.shape[:1])}")
    return times + past.to(torch.int32)[:, None]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_time: Tensor,
    media_length: int,
    scale: float | None = None,
    *,
    only_latest: bool = True,
    leak: bool = False,
) -> Tensor:
    """The definition: softmax(scale · query keyᵀ) value over the media that a token sees.

    Medium t = 1 .. T owns rows (t - 1) · media_length .. t · media_length of key and value. A token of time t sees
    medium t alone, or with `only_latest=False` media 1 .. t, as far as they exist.

    Args:
        query: [B, H, L, D] (fp32, fp16, bf16, fp64; any strides; any size but D may be 0).
        key, value: [B, H, T · media_length, D].
        text_time: [B, L] (int32, int64), media at or before each token (`text_times`). 0 or less: it sees nothing.
            More than T: the latest medium does not exist, so it sees nothing, or with `only_latest=False` all T.
            Any order is allowed; kernels are fastest where times do not decrease, as in text.
        media_length: rows of each medium, at least 1.
        scale: default D^-0.5.
        only_latest: whether a token sees the latest medium only, or all up to it.
        leak: do as OpenFlamingo does, where the softmax of a row that is masked everywhere is uniform: with
            `only_latest`, a token beyond T gives the mean of all values; without it, a token of time 0 does.

    Returns:
        [B, H, L, D] in the dtype of the query. A token that sees nothing gives exactly zero and no gradients, whatever
        the mode (but for `leak`); so does every token if T = 0.

    Numerics: those of `scaled_dot_product_attention`, which computes it.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), section 3.1.3; mlfoundations/open_flamingo,
    open_flamingo/src/helpers.py:196-229, which zeroes tokens of time 0 with `only_latest` alone.
    """
    media = key.size(2) // media_length
    if media == 0:
        # The sums are zeros too: they join the keys to the graph.
        nothing = key.sum(2, keepdim=True) + value.sum(2, keepdim=True)
        return query.masked_fill(query.new_ones((), dtype=torch.bool), 0) + nothing
    medium = torch.arange(media, device=key.device).repeat_interleave(media_length) + 1
    time = text_time[:, :, None]
    seen, blind = time >= medium, time < 1
    if only_latest:
        seen, blind = time == medium, blind | (time > media)
    # Who sees nothing looks at everything, lest there be a softmax of nothing.
    out = F.scaled_dot_product_attention(query, key, value, (seen | blind)[:, None], scale=scale)
    out = out.masked_fill(blind[:, None], 0)
    return _leaking(out, value, text_time, media, only_latest) if leak else out


def _leaking(out: Tensor, value: Tensor, text_time: Tensor, media: int, only_latest: bool) -> Tensor:
    """`out` with the mean of all values where OpenFlamingo masks all of a row and does not zero it."""
    if media == 0:
        return out
    masked = text_time > media if only_latest else text_time < 1
    return torch.where(masked[:, None, :, None], value.mean(2, keepdim=True), out)


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks."""

    query: Tensor
    key: Tensor
    value: Tensor
    text_time: Tensor
    media_length: int
    scale: float
    only_latest: bool
    leak: bool

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def differentiated(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self[:3])


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_time: Tensor,
    media_length: int,
    scale: float | None = None,
    *,
    only_latest: bool = True,
    leak: bool = False,
) -> Call:
    """The arguments of `gated_cross_attention`, checked."""
    where = "gated_cross_attention"
    if query.dim() != 4 or query.size(3) == 0:
        raise ValueError(f"{where}: query is {list(query.shape)}; expected [B, H, L, D] with D > 0")
    batch, heads, length, dim = query.shape
    if key.dim() != 4 or key.shape != value.shape or (*key.shape[:2], key.size(3)) != (batch, heads, dim):
        raise ValueError(
            f"{where}: key is {list(key.shape)}, value {list(value.shape)} and query {list(query.shape)}; expected "
            f"both [B, H, T · media_length, D] = [{batch}, {heads}, T · {media_length}, {dim}]"
        )
    if media_length < 1 or key.size(2) % media_length:
        raise ValueError(
            f"{where}: media_length is {media_length} and key {list(key.shape)}; expected at least 1 and a divisor of "
            f"the {key.size(2)} rows of all media"
        )
    if text_time.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: text_time is {text_time.dtype}; expected torch.int32 or torch.int64; see text_times")
    if text_time.shape != (batch, length):
        raise ValueError(
            f"{where}: text_time is {list(text_time.shape)} and query {list(query.shape)}; expected [B, L] = "
            f"[{batch}, {length}]"
        )
    if query.dtype not in DTYPES:
        raise TypeError(f"{where}: query is {query.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if query.dtype != torch.float64 and torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise TypeError(
                f"{where}: query is {query.dtype} and {name} is {x.dtype}; expected one dtype; cast one, or call under "
                "torch.autocast"
            )
    for name, x in (("key", key), ("value", value), ("text_time", text_time)):
        if x.device != query.device:
            raise ValueError(f"{where}: {name} is on {x.device} but query on {query.device}; move one")
    time = text_time.to(torch.int32).contiguous()
    return Call(query, key, value, time, media_length, dim**-0.5 if scale is None else scale, only_latest, leak)


def _cannot(call: Call, machine: Machine, backend: str) -> str | None:
    return kernels_cannot(backend, query=call.query, key=call.key, value=call.value)


# Of products, the kernel's own, from which it is refused where it saves too few (two cores of an Intel Xeon with AMX).
FEW_TOKENS_WORK, MATRIX_WORK = 2**22, 2**25


def _cpu_avoids(call: Call, machine: Machine) -> str | None:
    batch, heads, length, dim = call.query.shape
    keys, media = call.key.size(2), call.key.size(2) // call.media_length
    # Tokens are filled up to vectors. Those that see all media up to theirs see half of the keys, or somewhat more.
    seen = call.media_length if call.only_latest else call.media_length * (media + 1) // 2
    work, dense = (batch * heads * dim * n for n in (-(-length // 32) * 32 * seen, length * keys))
    if work >= FEW_TOKENS_WORK and 2 * dense < work:
        return f"L is {length}; the kernel would fill it up to {work} products, and the reference makes {dense}"
    matrix = only_reference_has_matrix(call.query.dtype, call.differentiated, "cpu")
    if matrix and work >= MATRIX_WORK and 2 * dense < 3 * work:
        return f"the kernel makes {work} products; of {dense} all in all the reference's matrix instructions are faster"
    return None


OP = Op(
    "gated_cross_attention",
    check,
    (
        Backend("cpu", partial(_cannot, backend="cpu"), _cpu_avoids),
        Backend("triton", partial(_cannot, backend="triton")),
        Backend("reference"),
    ),
)


def _fwd_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return heads_inside(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _wanted(tensors: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor | None]:
    return [heads_inside(x) if need else None for x, need in zip(tensors, needs, strict=True)]


def _bwd_fake(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> list[Tensor]:
    *_, needs, _ = arguments
    return [grad for grad in _wanted((query, key, value), needs) if grad is not None]


# What the CPU's kernels may use of a vector's bits; a test lowers it.
VECTOR_BITS = 8192


def _fwd_cpu(query: Tensor, key: Tensor, value: Tensor, text_time: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    out, lse = heads_inside(query), torch.empty(query.shape[:3], dtype=torch.float32)
    extension.module().gated_cross_attention_fwd_cpu(
        *map(extension.view, (query, key, value, text_time)),
        *settings,
        *map(extension.view, (out, lse)),
        VECTOR_BITS,
        torch.get_num_threads(),
    )
    return out, lse


def _bwd_cpu(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> list[Tensor]:
    text_time, *settings, needs = arguments
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    grads = _wanted((query, key, value), needs)
    extension.module().gated_cross_attention_bwd_cpu(
        *map(extension.view, (grad_out, query, out, lse, key, value, text_time)),
        *settings,
        *map(extension.optional_view, grads),
        VECTOR_BITS,
        torch.get_num_threads(),
    )
    return [grad for grad in grads if grad is not None]


def _fwd_triton(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from mmfast.kernels.gated_cross_attention import forward

    out, lse = heads_inside(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        forward(query, *arguments, out, lse)
    return out, lse


def _bwd_triton(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, key: Tensor, value: Tensor, *arguments: Any
) -> list[Tensor]:
    from mmfast.kernels.gated_cross_attention import backward

    *settings, needs = arguments
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    grads = _wanted((query, key, value), needs)
    with torch.cuda.device_of(query):
        backward(grad_out, query, out, lse, key, value, *settings, *grads)
    return [grad for grad in grads if grad is not None]


_KEYS = "Tensor key, Tensor value, Tensor text_time, int media_length, float scale, bool only_latest"
_FWD = backends.define(
    "gated_cross_attention_fwd",
    f"(Tensor query, {_KEYS}) -> (Tensor, Tensor)",
    _fwd_fake,
    {"cpu": _fwd_cpu, "triton": _fwd_triton},
)
_BWD = backends.define(
    "gated_cross_attention_bwd",
    f"(Tensor grad_out, Tensor query, Tensor out, Tensor lse, {_KEYS}, bool[] needs) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


class _GatedCrossAttention(torch.autograd.Function):
    """Saves its inputs, the output and the logarithms of the sums of exponentials; backward makes the weights again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, text_time, *settings = arguments
        out, lse = _FWD(*arguments)
        ctx.save_for_backward(query, out, lse, key, value, text_time)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        *settings, backend = ctx.settings
        needs = list(ctx.needs_input_grad[:3])
        found = iter(_BWD(grad_out, *ctx.saved_tensors, *settings, needs, backend))
        return (*(next(found) if need else None for need in needs), *[None] * 5)


def gated_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_time: Tensor,
    media_length: int,
    scale: float | None = None,
    *,
    only_latest: bool = True,
    leak: bool = False,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · query keyᵀ) value over the media that each token sees: `reference` says what exactly.

    There is no mask, and no score that is not needed: with `only_latest` L · media_length of them, not L · T ·
    media_length. Nothing is copied, whatever the layout of batch, heads and length. Saved for backward: the inputs, the
    output and one fp32 number a token and head. Results and gradients lie in memory as [B, length, H, D], as
    projections take them. Differentiable once, except on the reference.

    Args:
        query: [B, H, L, D] (fp32, fp16, bf16; fp64 on the reference; last stride 1 for the kernels).
        key, value: [B, H, T · media_length, D], medium t = 1 .. T owns rows (t - 1) · media_length .. t · media_length.
        text_time: [B, L] (int32, int64), the number of media at or before each token, from `text_times`.
        media_length: rows of each medium.
        scale: default D^-0.5.
        only_latest: whether a token sees the latest medium only, or all up to it.
        leak: let tokens that see nothing see all media alike where OpenFlamingo does.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [B, H, L, D] in the dtype of the query; under autocast in autocast's, to which all are cast. A token that sees
        no medium gives zero.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: scores, weights and sums in fp32 on the CPU; on a GPU the weights are rounded to 16 bits before a 16-bit
    product, as everywhere. Deterministic, on any number of threads.
    """
    call = check(query, key, value, text_time, media_length, scale, only_latest=only_latest, leak=leak)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call[:6], only_latest=only_latest, leak=leak)
    if call.differentiated:
        out = _GatedCrossAttention.apply(*call[:7], chosen)
    else:
        out = _FWD(*call[:7], chosen)[0]
    if not leak:
        return out
    return _leaking(out, call.value, call.text_time, call.key.size(2) // media_length, only_latest)
