"""All of lora_linear's forward in one Triton kernel: the update is more terms of the large product's sum."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.lora_linear import Tile, aligned, case, padded, processors

# Programs next to each other take blocks of so many rows of x for each block of W: both are found in L2.
GROUP = 8
# Bytes of shared memory that a program can have on compute capability 9.0 and 10.0.
HOPPER_SHARED_MEMORY = 232448


def fused_tile(rows: int, columns: int, element_size: int, processors: int, shared_memory: int) -> Tile:
    """The tile of `_fused_kernel`: the largest that gives every processor one. Its `ranks` is the step of the sum."""
    if element_size == 4:
        return Tile(padded(rows, 64), 64, 16, 4, 2)
    large = Tile(128, 256, 64, 8, 3)
    enough = triton.cdiv(rows, large.rows) * triton.cdiv(columns, large.columns) >= processors
    # It takes 144 KiB. Compute capability 8.0 has them too, but not the registers: there it spills.
    if enough and shared_memory >= HOPPER_SHARED_MEMORY:
        return large
    return Tile(128, 128, 64, 8, 3) if rows > 64 else Tile(padded(rows, 64), 128, 64, 4, 3)


# Grid: tiles of the output, grouped so that programs which run together share rows of x and of W in L2. One sum of
# K + R terms: the loop goes through tiles of (x, W), then through tiles of (s, B) by a switch of pointers.
# Traffic: as a plain product; s and B on top. The last step is padded: BLOCK_K terms for up to so many ranks.
@triton.jit(do_not_specialize=("rows",))
def _fused_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    s,  # [M, R]
    b,  # [N, R], already scaled
    bias,  # [N], or None
    out,  # [M, N]
    stride_x,
    stride_w,
    stride_s,
    stride_b,
    stride_out,
    rows,
    columns,
    features,
    ranks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i = tl.program_id(0)
    m_blocks = tl.cdiv(rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(columns, BLOCK_N)
    first = i // in_group * GROUP
    height = tl.minimum(m_blocks - first, GROUP)
    i_m = first + i % in_group % height
    i_n = i % in_group // height

    o_m = (i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = (i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + o_m * stride_x + o_k[None, :]
    p_w = weight + o_n * stride_w + o_k[:, None]
    p_s = s + o_m * stride_s + o_k[None, :]
    p_b = b + o_n * stride_b + o_k[:, None]
    x_steps = tl.cdiv(features, BLOCK_K)
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, x_steps + tl.cdiv(ranks, BLOCK_K)):
        low = step >= x_steps
        k = tl.where(low, step - x_steps, step) * BLOCK_K
        m_k = k + o_k < tl.where(low, ranks, features)
        b_left = tl.load(tl.where(low, p_s, p_x) + k, mask=(o_m < rows) & m_k[None, :], other=0)
        b_right = tl.load(tl.where(low, p_b, p_w) + k, mask=m_k[:, None] & (o_n < columns), other=0)
        b_out = tl.dot(b_left, b_right, b_out, input_precision="ieee")
    if bias is not None:
        b_out += tl.load(bias + o_n, mask=o_n < columns, other=0).to(tl.float32)
    tl.store(out + o_m * stride_out + o_n, b_out.to(out.dtype.element_ty), mask=(o_m < rows) & (o_n < columns))


def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


def fused(
    x: Tensor, weight: Tensor, s: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float, out: Tensor
) -> None:
    """out [M, N] = x weightᵀ + scaling · s lora_bᵀ + bias, in one kernel.

    lora_b is scaled beforehand and rounded to its dtype, so that both products share one sum.
    """
    (rows, columns), features = out.shape, x.shape[1]
    if out.numel() == 0:
        return
    s, scaled = aligned(s), aligned((lora_b.float() * scaling).to(x.dtype))
    tile = fused_tile(rows, columns, x.element_size(), processors(x.device), _shared_memory(x.device))
    _fused_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x,
        weight,
        s,
        scaled,
        None if bias is None else bias.contiguous(),
        out,
        x.stride(0),
        weight.stride(0),
        s.stride(0),
        scaled.stride(0),
        out.stride(0),
        rows,
        columns,
        features,
        s.shape[1],
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.ranks,
        GROUP=GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that aligned calls can launch, for scripts/compile_kernels.py."""
    cases = []
    for dtype in ("fp32", "fp16", "bf16"):
        size = 4 if dtype == "fp32" else 2
        tiles = {fused_tile(rows, 4096, size, 132, HOPPER_SHARED_MEMORY) for rows in (16384, 512, 64, 16)}
        for tile in sorted(tiles):
            pointers = dict.fromkeys(("x", "weight", "s", "b", "bias", "out"), dtype)
            blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.ranks, "GROUP": GROUP}
            added = case(dtype, _fused_kernel, pointers, blocks, tile, "")
            cases.append(added | ({"capabilities": (90, 100)} if tile.columns > 128 else {}))
    return cases
