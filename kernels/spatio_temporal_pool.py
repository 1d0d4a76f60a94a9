"""Triton kernels of spatio_temporal_pool. Rows: T' temporal ones, of which T are frames, then N spatial ones."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ADD_CHANNELS = 512


class Tile(NamedTuple):
    """What a program holds in registers: fp32 sums of so many patches and channels."""

    patches: int
    channels: int
    num_warps: int


class Plan(NamedTuple):
    """How a sample is cut among programs."""

    tile: Tile
    patch_blocks: int
    channel_blocks: int
    chunks: int  # of rows
    chunk_rows: int

    @property
    def split(self) -> bool:
        """Whether a mean is made of several programs' parts."""
        return self.patch_blocks * self.chunks > 1


def tiles(aligned: bool) -> tuple[Tile, ...]:
    """The tiles to choose from. Where rows are not aligned, an element costs an address: large tiles would spill."""
    return (Tile(16, 256, 4), Tile(64, 128, 8), Tile(256, 64, 16)) if aligned else (Tile(16, 128, 4), Tile(64, 64, 8))


def stages(element_size: int) -> int:
    """How many rows of a tile are on their way at a time: 64 KiB of shared memory, which every GPU has."""
    return 3 if element_size == 2 else 2


def plan(batch: int, rows: int, patches: int, channels: int, aligned: bool, processors: int) -> Plan:
    """The smallest tile that holds all patches, and chunks of rows until every processor has two programs."""
    choice = tiles(aligned)
    tile = next((tile for tile in choice if tile.patches >= patches), choice[-1])
    patch_blocks = max(triton.cdiv(patches, tile.patches), 1)
    channel_blocks = triton.cdiv(channels, tile.channels)
    wanted = triton.cdiv(2 * processors, batch * patch_blocks * channel_blocks)
    # Parts of the spatial means cost traffic: eight rows at least for each.
    chunk_rows = max(triton.cdiv(rows, wanted), min(rows, 8), 1)
    return Plan(tile, patch_blocks, channel_blocks, max(triton.cdiv(rows, chunk_rows), 1), chunk_rows)


@triton.jit
def _position(channels, patch_blocks, chunks, chunk_rows, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sample, patch block, chunk, first row, patches and channels of this program; in 64 bits, as offsets are."""
    i = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_D)
    o_d = i % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    i = i // channel_blocks
    i_n = i % patch_blocks
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i = i // patch_blocks
    i_k = i % chunks
    return i // chunks, i_n, i_k, i_k * chunk_rows, o_n, o_d


@triton.jit
def _real_frames(real, frames):
    """How many frames of the sample are real, at least 1."""
    if real is None:
        count = frames
    else:
        count = 0
        for start in range(0, frames, 256):
            o_t = start + tl.arange(0, 256)
            count += tl.sum(tl.load(real + o_t, mask=o_t < frames, other=0).to(tl.int32))
    return tl.maximum(count, 1)


@triton.jit
def _real_patches(real, t, frames, patches):
    """`patches` if row t of the temporal part is a real frame, else 0."""
    if real is None:
        return tl.where(t < frames, patches, 0)
    else:
        return patches * tl.load(real + t, mask=t < frames, other=0).to(tl.int32)


# Grid: B × chunks × patch blocks × channel blocks. A program goes through its rows once, with the sums of its
# patches in registers. Traffic: the features once; the pooled rows once, plus the parts if the plan is split.
@triton.jit(do_not_specialize=("frames", "rows", "patches", "patch_blocks", "chunks", "chunk_rows"))
def _fwd_kernel(
    features,
    real,  # [B, T] uint8, or None
    temporal,  # [B, patch blocks, T', D]: the means of frames, or the parts of them
    spatial,  # [B, chunks, N, D]
    stride_b,
    stride_t,
    stride_n,
    stride_d,
    temporal_b,
    temporal_k,
    spatial_b,
    spatial_k,
    frames,
    rows,
    patches,
    channels,
    patch_blocks,
    chunks,
    chunk_rows,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b, i_n, i_k, first, o_n, o_d = _position(channels, patch_blocks, chunks, chunk_rows, BLOCK_N, BLOCK_D)
    m_d = o_d < channels
    if real is not None:
        real += i_b * frames
    per_patch = 1.0 / tl.maximum(patches, 1)
    per_frame = 1.0 / _real_frames(real, frames)

    p_x = features + i_b * stride_b + first * stride_t + (o_n * stride_n)[:, None] + (o_d * stride_d)[None, :]
    p_temporal = temporal + i_b * temporal_b + i_n * temporal_k + first * channels + o_d
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for t in tl.range(first, tl.minimum(first + chunk_rows, rows), num_stages=STAGES):
        m_n = o_n < _real_patches(real, t, frames, patches)
        x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0).to(tl.float32)
        sums += x
        tl.store(p_temporal, (tl.sum(x, 0) * per_patch).to(temporal.dtype.element_ty), mask=m_d)
        p_x += stride_t
        p_temporal += channels
    p_spatial = spatial + i_b * spatial_b + i_k * spatial_k + (o_n * channels)[:, None] + o_d[None, :]
    tl.store(p_spatial, (sums * per_frame).to(spatial.dtype.element_ty), mask=(o_n < patches)[:, None] & m_d[None, :])


# Grid: B × rows of the result × channel blocks. Adds the parts in order, so that the result is always the same.
@triton.jit(do_not_specialize=("rows", "patches", "patch_blocks", "chunks"))
def _add_parts_kernel(
    temporal,  # [B, patch blocks, T', D]
    spatial,  # [B, chunks, N, D]
    pooled,  # [B, T' + N, D]
    rows,
    patches,
    channels,
    patch_blocks,
    chunks,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_D)
    o_d = i % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < channels
    i_row = i // channel_blocks
    i_b = i_row // (rows + patches)
    row = i_row % (rows + patches)
    total = tl.zeros([BLOCK_D], tl.float32)
    if row < rows:
        for k in range(0, patch_blocks):
            total += tl.load(temporal + ((i_b * patch_blocks + k) * rows + row) * channels + o_d, mask=m_d, other=0)
    else:
        for k in range(0, chunks):
            total += tl.load(spatial + ((i_b * chunks + k) * patches + row - rows) * channels + o_d, mask=m_d, other=0)
    tl.store(pooled + i_row * channels + o_d, total.to(pooled.dtype.element_ty), mask=m_d)


# Grid: as forward. A program keeps the gradients of its spatial rows and writes those of its frames, each once.
@triton.jit(do_not_specialize=("frames", "rows", "patches", "patch_blocks", "chunks", "chunk_rows"))
def _bwd_kernel(
    grad_pooled,  # [B, T' + N, D]
    real,  # [B, T] uint8, or None
    grad_features,  # [B, T, N, D]
    frames,
    rows,
    patches,
    channels,
    patch_blocks,
    chunks,
    chunk_rows,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, _, _, first, o_n, o_d = _position(channels, patch_blocks, chunks, chunk_rows, BLOCK_N, BLOCK_D)
    m_d = o_d < channels
    m_x = (o_n < patches)[:, None] & m_d[None, :]
    if real is not None:
        real += i_b * frames
    per_patch = 1.0 / tl.maximum(patches, 1)
    per_frame = 1.0 / _real_frames(real, frames)

    o_x = (o_n * channels)[:, None] + o_d[None, :]
    p_row = grad_pooled + i_b * (rows + patches) * channels
    spatial = tl.load(p_row + rows.to(tl.int64) * channels + o_x, mask=m_x, other=0).to(tl.float32) * per_frame
    for t in range(first, tl.minimum(first + chunk_rows, frames)):
        temporal = tl.load(p_row + t * channels + o_d, mask=m_d, other=0).to(tl.float32) * per_patch
        m_n = o_n < _real_patches(real, t, frames, patches)
        gradient = tl.where(m_n[:, None], spatial + temporal[None, :], 0)
        p_out = grad_features + (i_b * frames + t) * patches * channels + o_x
        tl.store(p_out, gradient.to(grad_features.dtype.element_ty), mask=m_x)


def _aligned(features: Tensor) -> bool:
    # As Triton sees it: what is a multiple of 16 may be read 16 bytes at a time.
    *strides, last = features.stride()
    return last == 1 and not any(n % 16 for n in (features.data_ptr(), features.size(3), *strides))


def _bytes(frame_mask: Tensor | None) -> Tensor | None:
    return None if frame_mask is None else frame_mask.contiguous().view(torch.uint8)


def _processors(device: torch.device) -> int:
    # The interpreter has none: any number that splits some calls and not others.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward(features: Tensor, frame_mask: Tensor | None, rows: int) -> Tensor:
    """The pooled rows [B, rows + N, D] of `features` [B, T, N, D]."""
    batch, frames, patches, channels = features.shape
    pooled = torch.empty((batch, rows + patches, channels), dtype=features.dtype, device=features.device)
    if pooled.numel() == 0:
        return pooled
    cut = plan(batch, rows, patches, channels, _aligned(features), _processors(features.device))
    if cut.split:
        parts = {"dtype": torch.float32, "device": features.device}
        temporal = torch.empty((batch, cut.patch_blocks, rows, channels), **parts)
        spatial = torch.empty((batch, cut.chunks, patches, channels), **parts)
    else:
        temporal, spatial = pooled[:, None, :rows], pooled[:, None, rows:]
    _fwd_kernel[(batch * cut.chunks * cut.patch_blocks * cut.channel_blocks,)](
        features,
        _bytes(frame_mask),
        temporal,
        spatial,
        *features.stride(),
        *temporal.stride()[:2],
        *spatial.stride()[:2],
        frames,
        rows,
        patches,
        channels,
        cut.patch_blocks,
        cut.chunks,
        cut.chunk_rows,
        BLOCK_N=cut.tile.patches,
        BLOCK_D=cut.tile.channels,
        STAGES=stages(features.element_size()),
        num_warps=cut.tile.num_warps,
    )
    if cut.split:
        _add_parts_kernel[(batch * (rows + patches) * triton.cdiv(channels, ADD_CHANNELS),)](
            temporal, spatial, pooled, rows, patches, channels, cut.patch_blocks, cut.chunks, BLOCK_D=ADD_CHANNELS
        )
    return pooled


def backward(grad_pooled: Tensor, frame_mask: Tensor | None, frames: int, patches: int) -> Tensor:
    """The gradient of the features, [B, frames, patches, D]."""
    batch, total, channels = grad_pooled.shape
    shape = (batch, frames, patches, channels)
    grad_features = torch.empty(shape, dtype=grad_pooled.dtype, device=grad_pooled.device)
    if grad_features.numel() == 0:
        return grad_features
    cut = plan(batch, frames, patches, channels, _aligned(grad_features), _processors(grad_pooled.device))
    _bwd_kernel[(batch * cut.chunks * cut.patch_blocks * cut.channel_blocks,)](
        grad_pooled.contiguous(),
        _bytes(frame_mask),
        grad_features,
        frames,
        total - patches,
        patches,
        channels,
        cut.patch_blocks,
        cut.chunks,
        cut.chunk_rows,
        BLOCK_N=cut.tile.patches,
        BLOCK_D=cut.tile.channels,
        num_warps=cut.tile.num_warps,
    )
    return grad_features


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that the op can launch, for scripts/compile_kernels.py; with a mask, without which they do less."""
    cases = []
    for dtype, aligned in product(("fp32", "fp16", "bf16"), (True, False)):
        for tile in tiles(aligned):
            name = f"{dtype} {tile.patches}x{tile.channels}{'' if aligned else ' unaligned'}"
            blocks = {"BLOCK_N": tile.patches, "BLOCK_D": tile.channels}
            pointers = {"grad_pooled": dtype, "real": "u8", "grad_features": dtype}
            cases.append(_case(f"backward {name}", _bwd_kernel, pointers, blocks, tile.num_warps, aligned))
            blocks = blocks | {"STAGES": stages(4 if dtype == "fp32" else 2)} | ({"stride_d": 1} if aligned else {})
            for part in dict.fromkeys((dtype, "fp32")):  # no set: its order is another in each process
                pointers = {"features": dtype, "real": "u8", "temporal": part, "spatial": part}
                case = f"forward {name}{'' if part == dtype else ', parts'}"
                cases.append(_case(case, _fwd_kernel, pointers, blocks, tile.num_warps, aligned))
        pointers = {"temporal": "fp32", "spatial": "fp32", "pooled": dtype}
        name = f"add parts {dtype}{'' if aligned else ' unaligned'}"
        cases.append(_case(name, _add_parts_kernel, pointers, {"BLOCK_D": ADD_CHANNELS}, 4, aligned))
    return cases


def _case(
    name: str, kernel: Any, pointers: dict[str, str], constexprs: dict[str, Any], num_warps: int, aligned: bool
) -> dict[str, Any]:
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    strided = ("stride_b", "stride_t", "stride_n", "temporal_b", "temporal_k", "spatial_b", "spatial_k", "channels")
    multiples = (*pointers, *(strided if aligned else ()))
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": num_warps,
        "tensor_core": False,
    }
