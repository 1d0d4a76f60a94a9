"""Means of video features over the patches of each frame and over the frames at each patch, side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, extension
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def reference(features: Tensor, num_temporal_tokens: int | None = None, frame_mask: Tensor | None = None) -> Tensor:
    """The definition: what Video-ChatGPT feeds to its projector.

        out[:, t] = Σ_n features[:, t, n] / N                      for a real frame t, else 0
        out[:, T' + n] = Σ_t features[:, t, n] / (real frames)     over the real frames t; 0 if there is none

    Args:
        features: [B, T, N, D] (fp32, fp16, bf16, fp64; any strides; any size may be 0), N patches of T frames.
        num_temporal_tokens: T' ≥ T, rows of the temporal part; those beyond T are zero. Default T.
        frame_mask: [B, T] (bool), True where the frame is real. A frame that is not (padding) counts nowhere,
            whatever it holds, NaN included, and gets a zero gradient. Default: every frame is real.

    Returns:
        [B, T' + N, D] in the dtype of `features`, also under autocast.

    Numerics: sums in fp32 (fp64 for fp64), rounded once.

    Source: Maaz et al., "Video-ChatGPT" (arXiv 2306.05424), section 3.1; mbzuai-oryx/Video-ChatGPT,
    scripts/save_spatio_temporal_clip_features.py:46-57, with T' = 100. `frame_mask` is ours.
    """
    _, frames, patches, _ = features.shape
    rows = frames if num_temporal_tokens is None else num_temporal_tokens
    real_frames: Any = max(frames, 1)
    if frame_mask is not None:
        features = features.masked_fill(~frame_mask[:, :, None, None], 0)
        real_frames = frame_mask.sum(1).clamp(min=1)[:, None, None]
    accumulate = torch.promote_types(features.dtype, torch.float32)
    temporal = features.sum(2, dtype=accumulate) / max(patches, 1)
    spatial = features.sum(1, dtype=accumulate) / real_frames
    if rows > frames:
        temporal = F.pad(temporal, (0, 0, 0, rows - frames))
    return torch.cat([temporal, spatial], 1).to(features.dtype)


class Call(NamedTuple):
    """The checked arguments."""

    features: Tensor
    num_temporal_tokens: int
    frame_mask: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.features.device


def check(features: Tensor, num_temporal_tokens: int | None = None, frame_mask: Tensor | None = None) -> Call:
    """The arguments of `spatio_temporal_pool`, checked."""
    where = "spatio_temporal_pool"
    if features.dim() != 4:
        raise ValueError(f"{where}: features has shape {list(features.shape)}; expected [B, T, N, D]")
    if features.dtype not in DTYPES:
        raise TypeError(f"{where}: features is {features.dtype}; expected {', '.join(map(str, DTYPES))}")
    batch, frames = features.shape[:2]
    rows = frames if num_temporal_tokens is None else num_temporal_tokens
    if rows < frames:
        raise ValueError(
            f"{where}: num_temporal_tokens is {rows} but features has {frames} frames; expected at least that many; "
            "sample fewer frames"
        )
    if frame_mask is not None:
        if frame_mask.dtype != torch.bool:
            raise TypeError(f"{where}: frame_mask is {frame_mask.dtype}; expected torch.bool, True where real")
        if frame_mask.shape != (batch, frames):
            raise ValueError(
                f"{where}: frame_mask has shape {list(frame_mask.shape)} but features {list(features.shape)}; "
                f"expected [B, T] = [{batch}, {frames}]"
            )
        if frame_mask.device != features.device:
            raise ValueError(
                f"{where}: frame_mask is on {frame_mask.device} but features on {features.device}; move one"
            )
        frame_mask = frame_mask.contiguous()
    return Call(features, rows, frame_mask)


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.features.dtype == torch.float64 else None


def _cpu_cannot(call: Call, machine: Machine) -> str | None:
    channels, stride = call.features.size(3), call.features.stride(3)
    if channels > 1 and stride != 1:
        return f"the last dimension of features has stride {stride}; the kernel needs 1"
    return _no_float64(call, machine)


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    # On a CPU forward alone and 16-bit features are faster at every size.
    if not call.features.requires_grad or call.features.dtype != torch.float32:
        return ()
    return (Size("float32 backward", call.features.numel(), "features, of which a gradient is wanted, has {} numbers"),)


def _cuda_cannot(call: Call, machine: Machine) -> str | None:
    features, vector = call.features, 16 // call.features.element_size()
    if any(n % vector for n in (features.size(3), features.storage_offset(), *features.stride()[:3])):
        return f"each row of features must start at a multiple of 16 bytes ({vector} elements)"
    return _cpu_cannot(call, machine)


OP = Op(
    "spatio_temporal_pool",
    check,
    (
        Backend("cuda", _cuda_cannot, avoids=lambda call, machine: "it is not measured against Triton yet"),
        Backend("cpu", _cpu_cannot),
        Backend("triton", _no_float64),
        Backend("reference"),
    ),
    _sizes,
)


def _fwd_fake(features: Tensor, frame_mask: Tensor | None, num_temporal_tokens: int, backend: str) -> Tensor:
    batch, _, patches, channels = features.shape
    return features.new_empty((batch, num_temporal_tokens + patches, channels))


def _bwd_fake(grad_pooled: Tensor, frame_mask: Tensor | None, frames: int, patches: int, backend: str) -> Tensor:
    batch, _, channels = grad_pooled.shape
    return grad_pooled.new_empty((batch, frames, patches, channels))


def _fwd_cpu(features: Tensor, frame_mask: Tensor | None, num_temporal_tokens: int) -> Tensor:
    batch, _, patches, channels = features.shape
    pooled = torch.empty((batch, num_temporal_tokens + patches, channels), dtype=features.dtype)
    extension.module().spatio_temporal_pool_fwd_cpu(
        extension.view(features), extension.optional_view(frame_mask), extension.view(pooled), torch.get_num_threads()
    )
    return pooled


def _bwd_cpu(grad_pooled: Tensor, frame_mask: Tensor | None, frames: int, patches: int) -> Tensor:
    batch, _, channels = grad_pooled.shape
    grad_pooled = grad_pooled.contiguous()
    grad_features = torch.empty((batch, frames, patches, channels), dtype=grad_pooled.dtype)
    extension.module().spatio_temporal_pool_bwd_cpu(
        extension.view(grad_pooled),
        extension.optional_view(frame_mask),
        extension.view(grad_features),
        torch.get_num_threads(),
    )
    return grad_features


def _fwd_cuda(features: Tensor, frame_mask: Tensor | None, num_temporal_tokens: int) -> Tensor:
    batch, _, patches, channels = features.shape
    device, kernels = features.device, extension.module()
    with torch.cuda.device_of(features):
        shape = (batch, num_temporal_tokens + patches, channels)
        pooled = torch.empty(shape, dtype=features.dtype, device=device)
        patch_blocks, chunks = kernels.spatio_temporal_pool_parts_cuda(extension.view(features), num_temporal_tokens)
        split = patch_blocks * chunks > 1
        temporal = torch.empty((batch, patch_blocks * split, num_temporal_tokens, channels), device=device)
        spatial = torch.empty((batch, chunks * split, patches, channels), device=device)
        kernels.spatio_temporal_pool_fwd_cuda(
            extension.view(features),
            extension.optional_view(frame_mask),
            extension.view(pooled),
            extension.view(temporal),
            extension.view(spatial),
            extension.stream(device),
        )
    return pooled


def _bwd_cuda(grad_pooled: Tensor, frame_mask: Tensor | None, frames: int, patches: int) -> Tensor:
    batch, _, channels = grad_pooled.shape
    with torch.cuda.device_of(grad_pooled):
        grad_pooled = grad_pooled.contiguous()
        shape = (batch, frames, patches, channels)
        grad_features = torch.empty(shape, dtype=grad_pooled.dtype, device=grad_pooled.device)
        extension.module().spatio_temporal_pool_bwd_cuda(
            extension.view(grad_pooled),
            extension.optional_view(frame_mask),
            extension.view(grad_features),
            extension.stream(grad_pooled.device),
        )
    return grad_features


def _fwd_triton(features: Tensor, frame_mask: Tensor | None, num_temporal_tokens: int) -> Tensor:
    from mmfast.kernels.spatio_temporal_pool import forward

    with torch.cuda.device_of(features):
        return forward(features, frame_mask, num_temporal_tokens)


def _bwd_triton(grad_pooled: Tensor, frame_mask: Tensor | None, frames: int, patches: int) -> Tensor:
    from mmfast.kernels.spatio_temporal_pool import backward

    with torch.cuda.device_of(grad_pooled):
        return backward(grad_pooled, frame_mask, frames, patches)


_FWD = backends.define(
    "spatio_temporal_pool_fwd",
    "(Tensor features, Tensor? frame_mask, SymInt num_temporal_tokens) -> Tensor",
    _fwd_fake,
    {"cuda": _fwd_cuda, "cpu": _fwd_cpu, "triton": _fwd_triton},
)
_BWD = backends.define(
    "spatio_temporal_pool_bwd",
    "(Tensor grad_pooled, Tensor? frame_mask, SymInt frames, SymInt patches) -> Tensor",
    _bwd_fake,
    {"cuda": _bwd_cuda, "cpu": _bwd_cpu, "triton": _bwd_triton},
)


class _SpatioTemporalPool(torch.autograd.Function):
    """Linear in the features, so that nothing is saved but the mask."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, frame_mask: Tensor | None, num_temporal_tokens: int, backend: str
    ) -> Tensor:
        ctx.save_for_backward(frame_mask)
        ctx.frames, ctx.patches, ctx.backend = features.size(1), features.size(2), backend
        return _FWD(features, frame_mask, num_temporal_tokens, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        grad_features = None
        if ctx.needs_input_grad[0]:
            (frame_mask,) = ctx.saved_tensors
            grad_features = _BWD(grad_pooled, frame_mask, ctx.frames, ctx.patches, ctx.backend)
        return grad_features, None, None, None


def spatio_temporal_pool(
    features: Tensor,
    num_temporal_tokens: int | None = None,
    frame_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Means over the patches of each frame, then means over the frames at each patch: `reference` says which.

    Reads the features once, in any layout of batch, frames and patches. Saves the mask for backward and nothing
    else; the gradient has the dtype of `features`. Differentiable once, except on the reference.

    Args:
        features: [B, T, N, D] (fp32, fp16, bf16; fp64 on the reference), N patches of T frames.
        num_temporal_tokens: rows of the temporal part, at least T; those beyond T are zero. Default T.
        frame_mask: [B, T] (bool), True where the frame is real. Default: every frame is.
        backend: "cuda", "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [B, num_temporal_tokens + N, D] in the dtype of `features`, also under autocast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    call = check(features, num_temporal_tokens, frame_mask)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call)
    arguments = call.features, call.frame_mask, call.num_temporal_tokens, chosen
    if torch.is_grad_enabled() and call.features.requires_grad:
        return _SpatioTemporalPool.apply(*arguments)
    return _FWD(*arguments)
