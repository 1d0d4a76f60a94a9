"""Attention of few queries to media and to latents, two segments of keys that are never concatenated."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import backends, crossovers, extension, products
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Of a head: what the kernels were written for.
MOST_DIM = {"cpu": 256, "triton": 128}
# Products of scores from which the C++ kernels are faster than the reference.
LEAST = crossovers.CPU.cpu("resampler_attention")


def reference(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None = None,
    latent_value: Tensor | None = None,
    media_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition: the attention of a perceiver resampler, of a Q-Former (no latents) and of Qwen-VL's resampler.

        out = softmax(scale · query [media_key; latent_key]ᵀ) [media_value; latent_value]

    Args:
        query: [B, H, Q, D] (fp32, fp16, bf16, fp64; any strides; any size but D may be 0).
        media_key, media_value: [B, H, N, D].
        latent_key, latent_value: [B, H, Q2, D], further keys that every query sees; both or neither.
        media_mask: [B, N] (bool), True where the medium is real. One that is not (padding) counts nowhere, whatever it
            holds, NaN included, and gets a zero gradient. Default: all are real.
        scale: default D^-0.5.

    Returns:
        [B, H, Q, D] in the dtype of the query. A query that sees no key at all gives exactly zero and no gradients.

    Numerics: those of `scaled_dot_product_attention`, which computes it.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), section 3.1.1; mlfoundations/open_flamingo,
    open_flamingo/src/helpers.py:41-65, whose keys are in the same order. `media_mask` is ours.
    """
    if media_mask is not None:
        padding = ~media_mask[:, None, :, None]
        media_key, media_value = media_key.masked_fill(padding, 0), media_value.masked_fill(padding, 0)
    key, value = media_key, media_value
    if latent_key is not None and latent_value is not None:
        key, value = torch.cat([media_key, latent_key], 2), torch.cat([media_value, latent_value], 2)
    if key.size(2) == 0:
        # The sums are zeros too: they join the keys to the graph.
        nothing = key.sum(2, keepdim=True) + value.sum(2, keepdim=True)
        return query.masked_fill(query.new_ones((), dtype=torch.bool), 0) + nothing
    if media_mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    seen = F.pad(media_mask, (0, key.size(2) - media_mask.size(1)), value=True)
    blind = ~seen.any(1)
    # Who sees nothing looks at the zeros of padding, lest there be a softmax of nothing.
    attn_mask = (seen | blind[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask.expand(-1, 1, query.size(2), -1), scale=scale)
    return out.masked_fill(blind[:, None, None, None], 0)


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks."""

    query: Tensor
    media_key: Tensor
    media_value: Tensor
    latent_key: Tensor | None
    latent_value: Tensor | None
    media_mask: Tensor | None
    scale: float

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def keys(self) -> tuple[Tensor, ...]:
        latents = self.latent_key, self.latent_value
        return (self.media_key, self.media_value, *(x for x in latents if x is not None))

    @property
    def differentiated(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, *self.keys))


def check(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None = None,
    latent_value: Tensor | None = None,
    media_mask: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    """The arguments of `resampler_attention`, checked."""
    where = "resampler_attention"
    if query.dim() != 4 or query.size(3) == 0:
        raise ValueError(f"{where}: query is {list(query.shape)}; expected [B, H, Q, D] with D > 0")
    if (latent_key is None) != (latent_value is None):
        alone = "latent_value" if latent_key is None else "latent_key"
        raise ValueError(f"{where}: {alone} is given alone; give latent_key and latent_value, or neither")
    batch, heads, _, dim = query.shape
    for name, key, value, letter in (
        ("media", media_key, media_value, "N"),
        ("latent", latent_key, latent_value, "Q2"),
    ):
        if key is None or value is None:
            continue
        if key.dim() != 4 or key.shape != value.shape or (*key.shape[:2], key.size(3)) != (batch, heads, dim):
            raise ValueError(
                f"{where}: {name}_key is {list(key.shape)}, {name}_value {list(value.shape)} and query "
                f"{list(query.shape)}; expected both [B, H, {letter}, D] = [{batch}, {heads}, {letter}, {dim}]"
            )
    if query.dtype not in DTYPES:
        raise TypeError(f"{where}: query is {query.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    tensors = {"media_key": media_key, "media_value": media_value}
    if latent_key is not None and latent_value is not None:
        tensors |= {"latent_key": latent_key, "latent_value": latent_value}
    if query.dtype != torch.float64 and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, tensors = query.to(dtype), {name: x.to(dtype) for name, x in tensors.items()}
    for name, x in tensors.items():
        if x.dtype != query.dtype:
            raise TypeError(
                f"{where}: query is {query.dtype} and {name} is {x.dtype}; expected one dtype; cast one, or call under "
                "torch.autocast"
            )
    if media_mask is not None:
        if media_mask.dtype != torch.bool:
            raise TypeError(f"{where}: media_mask is {media_mask.dtype}; expected torch.bool, True where real")
        if media_mask.shape != (batch, media_key.size(2)):
            raise ValueError(
                f"{where}: media_mask is {list(media_mask.shape)} and media_key {list(media_key.shape)}; expected "
                f"[B, N] = [{batch}, {media_key.size(2)}]"
            )
        tensors["media_mask"] = media_mask = media_mask.contiguous()
    for name, x in tensors.items():
        if x.device != query.device:
            raise ValueError(f"{where}: {name} is on {x.device} but query on {query.device}; move one")
    return Call(
        query,
        tensors["media_key"],
        tensors["media_value"],
        tensors.get("latent_key"),
        tensors.get("latent_value"),
        media_mask,
        dim**-0.5 if scale is None else scale,
    )


def kernels_cannot(backend: str, **heads: Tensor | None) -> str | None:
    """Why kernels that are written as these cannot take `heads`, which are [B, H, length, D]; None if they can."""
    for name, x in heads.items():
        if x is None:
            continue
        dim, most = x.size(3), MOST_DIM[backend]
        if x.dtype == torch.float64:
            return "there is no float64 kernel"
        if dim > most:
            return f"D is {dim}; the kernel takes at most {most}"
        if dim > 1 and x.stride(3) != 1:
            return f"the last dimension of {name} has stride {x.stride(3)}; the kernel needs 1"
    return None


def _cannot(call: Call, machine: Machine, backend: str) -> str | None:
    names = "query", "media_key", "media_value", "latent_key", "latent_value"
    return kernels_cannot(backend, **dict(zip(names, call[:5], strict=True)))


def _work(query: Tensor, media_key: Tensor, latent_key: Tensor | None) -> int:
    """B · H · Q · (N + Q2) · D: the products of scores."""
    return query.numel() * (media_key.size(2) + (0 if latent_key is None else latent_key.size(2)))


def only_reference_has_matrix(dtype: torch.dtype, differentiated: bool, device: str) -> bool:
    """Whether the reference multiplies in matrix instructions of the CPU, and the kernels in vectors.

    PyTorch's 16-bit attention makes little of such instructions backward; the kernels know them for bfloat16, as AMX.
    """
    if differentiated or (dtype == torch.bfloat16 and extension.has_amx()):
        return False
    return products.multiplies_16_bit(dtype, device)


def _key(dtype: torch.dtype, differentiated: bool, device: str) -> str:
    if dtype == torch.float32:
        return "float32"
    if differentiated:
        return "16-bit backward"
    return "16-bit matrix forward" if only_reference_has_matrix(dtype, False, device) else "16-bit forward"


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    key = _key(call.query.dtype, call.differentiated, machine.device)
    work = _work(call.query, call.media_key, call.latent_key)
    return (Size(key, work, "B · H · Q · (N + Q2) · D is {}"),)


OP = Op(
    "resampler_attention",
    check,
    (
        Backend("cpu", partial(_cannot, backend="cpu")),
        Backend("triton", partial(_cannot, backend="triton")),
        Backend("reference"),
    ),
    _sizes,
)


def heads_inside(x: Tensor) -> Tensor:
    """Fresh memory of the shape of x [B, H, L, D] that lies as [B, L, H, D], as projections take and give it."""
    batch, heads, length, dim = x.shape
    return torch.empty((batch, length, heads, dim), dtype=x.dtype, device=x.device).transpose(1, 2)


def _fwd_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return heads_inside(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _bwd_fake(grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    *keys, _, _, needs, _ = arguments
    return [heads_inside(x) for x, need in zip((query, *keys), needs, strict=True) if need and x is not None]


# What the CPU's kernels may use of a vector's bits, a tile of AMX being one of 8,192; a test lowers it.
VECTOR_BITS = 8192


def _fwd_cpu(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *keys, scale = arguments
    out, lse = heads_inside(query), torch.empty(query.shape[:3], dtype=torch.float32)
    extension.module().resampler_attention_fwd_cpu(
        extension.view(query),
        *map(extension.optional_view, keys),
        scale,
        extension.view(out),
        extension.view(lse),
        VECTOR_BITS,
        torch.get_num_threads(),
    )
    return out, lse


def _bwd_cpu(grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    *keys, media_mask, scale, needs = arguments
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    grads = [heads_inside(x) if need and x is not None else None for x, need in zip((query, *keys), needs, strict=True)]
    extension.module().resampler_attention_bwd_cpu(
        *map(extension.optional_view, (grad_out, query, out, lse, *keys, media_mask)),
        scale,
        *map(extension.optional_view, grads),
        VECTOR_BITS,
        torch.get_num_threads(),
    )
    return [grad for grad in grads if grad is not None]


def _fwd_triton(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from mmfast.kernels.resampler_attention import forward

    out, lse = heads_inside(query), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        forward(query, *arguments, out, lse)
    return out, lse


def _bwd_triton(grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    from mmfast.kernels.resampler_attention import backward

    *keys, media_mask, scale, needs = arguments
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    grads = [heads_inside(x) if need and x is not None else None for x, need in zip((query, *keys), needs, strict=True)]
    with torch.cuda.device_of(query):
        backward(grad_out, query, out, lse, *keys, media_mask, scale, *grads)
    return [grad for grad in grads if grad is not None]


_KEYS = "Tensor media_key, Tensor media_value, Tensor? latent_key, Tensor? latent_value, Tensor? media_mask"
_FWD = backends.define(
    "resampler_attention_fwd",
    f"(Tensor query, {_KEYS}, float scale) -> (Tensor, Tensor)",
    _fwd_fake,
    {"cpu": _fwd_cpu, "triton": _fwd_triton},
)
_BWD = backends.define(
    "resampler_attention_bwd",
    f"(Tensor grad_out, Tensor query, Tensor out, Tensor lse, {_KEYS}, float scale, bool[] needs) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


class _ResamplerAttention(torch.autograd.Function):
    """Saves its inputs, the output and the logarithms of the sums of exponentials; backward makes the weights again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, scale, backend = arguments
        out, lse = _FWD(*arguments)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.settings = scale, backend
        return out

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, query, *keys = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        found = iter(_BWD(grad_out, query, out, lse, *keys, ctx.settings[0], needs, ctx.settings[1]))
        return (*(next(found) if need else None for need in needs), None, None, None)


_APPLY = backends.straight(_ResamplerAttention)


def _at_once(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None,
    latent_value: Tensor | None,
    scale: float | None,
    backend: str | None,
) -> Tensor | None:
    """The result on a CPU, if nothing is wrong, nobody listens and C++ can take it; else None.

    What `check`, `OP.select` and `_FWD` would find and do, in less time than they take of a small call.
    """
    keys = media_key, media_value, latent_key, latent_value
    if (
        backends.fits(backend, "bhqd bhqd bhnd= bhnd= bhld=? bhld=?", query, *keys) <= 0
        or (latent_key is None) != (latent_value is None)
        or query.dtype == torch.float64
        or torch._C._is_any_autocast_enabled()
        or extension.overheard()()
    ):
        return None
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, *keys))
    if _work(query, media_key, latent_key) < LEAST[_key(query.dtype, differentiated, "cpu")]:
        return reference(query, *keys, None, scale)
    dim = query.size(3)
    if dim > MOST_DIM["cpu"] or any(x is not None and x.stride(3) != 1 for x in (query, *keys)):
        return None
    scale = dim**-0.5 if scale is None else scale
    if differentiated:
        out: Tensor = _APPLY(query, *keys, None, scale, "cpu")
        return out
    return _fwd_cpu(query, *keys, None, scale)[0]


def resampler_attention(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None = None,
    latent_value: Tensor | None = None,
    media_mask: Tensor | None = None,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale · query [media_key; latent_key]ᵀ) [media_value; latent_value]: `reference` says what exactly.

    Nothing is concatenated or copied, whatever the layout of batch, heads and length: heads of a projection's output
    and halves of a joint projection to keys and values are read where they lie. Padding is never read. Saved for
    backward: the inputs, the output and one fp32 number a query and head. Results and gradients lie in memory as
    [B, length, H, D], as projections take them. Differentiable once, except on the reference.

    Args:
        query: [B, H, Q, D] (fp32, fp16, bf16; fp64 on the reference; last stride 1 for the kernels).
        media_key, media_value: [B, H, N, D].
        latent_key, latent_value: [B, H, Q2, D], or None.
        media_mask: [B, N] (bool), True where the medium is real. Default: all are.
        scale: default D^-0.5.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [B, H, Q, D] in the dtype of the query; under autocast in autocast's, to which all are cast. A query that sees
        nothing gives zero.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: scores, weights and sums in fp32 on the CPU; on a GPU and in AMX tiles the weights are rounded to 16 bits
    before a 16-bit product, as everywhere. Deterministic, on any number of threads.
    """
    if media_mask is None:
        out = _at_once(query, media_key, media_value, latent_key, latent_value, scale, backend)
        if out is not None:
            return out
    arguments = query, media_key, media_value, latent_key, latent_value, media_mask, scale
    if _is_small(*arguments[:6], backend):
        return backends.checked_late(reference, check, *arguments)
    call = check(*arguments)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call)
    if call.differentiated:
        return _ResamplerAttention.apply(*call, chosen)
    return _FWD(*call, chosen)[0]


def _is_small(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None,
    latent_value: Tensor | None,
    media_mask: Tensor | None,
    backend: str | None,
) -> bool:
    """Whether `OP.select` would take the reference for a call whose mistakes, if it has any, PyTorch's ops find."""
    tensors = query, media_key, media_value, latent_key, latent_value
    if not backends.plain(tensors, backend) or query.dim() != 4:
        return False
    shape = query.shape
    # What broadcasting would let pass; whether latents are like media, `torch.cat` will find.
    if media_key.shape != media_value.shape or media_key.shape[:2] != shape[:2] or shape[3] == 0:
        return False
    if (latent_key is None) != (latent_value is None):
        return False
    if media_mask is not None and (
        media_mask.dtype != torch.bool or media_mask.shape != (shape[0], media_key.size(2)) or not media_mask.is_cpu
    ):
        return False
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return _work(query, media_key, latent_key) < LEAST[_key(query.dtype, differentiated, "cpu")]
