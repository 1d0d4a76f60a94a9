"""Triton kernels of lora_linear: the low-rank products around the large one.

Letters: M rows, K features of x, N of the output, R (r) ranks, any number: tiles are padded to 16 and masked. Sums are
fp32, and fp32 operands are multiplied without tensor cores. What several programs sum is written as fp32 parts that
`_add_parts_kernel` adds in order, so that the same call gives the same bits. Tiles fit the shared memory of every
supported GPU (99 KiB on 8.6 and 8.9, where less of it is used).
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.dropout import kept

ADD_PARTS = 8
ADD_BLOCK = 512


class Tile(NamedTuple):
    """What a program works on at a time, and how."""

    rows: int
    columns: int
    ranks: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """A tile, and the chunks into which the summed dimension is cut among programs."""

    tile: Tile
    chunk: int  # in tiles
    chunks: int


def padded(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


def _cut(tile: Tile, length: int, step: int, least: int, blocks: int, processors: int) -> Plan:
    """Chunks of `length` until the processors have a program each, but none shorter than `least`."""
    steps = triton.cdiv(length, step)
    wanted = max(processors // max(blocks, 1), 1)
    chunk = max(triton.cdiv(steps, wanted), least // step)
    return Plan(tile, chunk, max(triton.cdiv(steps, chunk), 1))


def down_plan(rows: int, columns: int, ranks: int, element_size: int, processors: int) -> Plan:
    """The tile of `_down_kernel`; A is read for each block of rows, so the columns are cut before these get small."""
    if element_size == 4:
        # Without tensor cores a thread holds all of its factors in registers: steps of 16.
        tile = Tile(padded(rows, 64), 16, padded(ranks, 64), 4, 2)
    elif rows >= 96 * processors:
        tile = Tile(128, 64, padded(ranks, 128), 8, 3)
    else:
        tile = Tile(padded(rows, 64), 64, padded(ranks, 128), 8 if ranks > 64 else 4, 3)
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(ranks, tile.ranks)
    return _cut(tile, columns, tile.columns, 512, blocks, processors)


def up_tile(rows: int, ranks: int, element_size: int) -> Tile:
    """The tile of `_up_kernel`, whose traffic is the output: large, so that s and B are seldom read again."""
    if element_size == 4:
        return Tile(padded(rows, 64), 64, 16, 8 if rows > 32 else 4, 2)
    if rows <= 64:
        return Tile(padded(rows, 64), 128, padded(ranks, 64), 4, 2)
    return Tile(128, 128, padded(ranks, 64), 8, 2)


def outer_plan(rows: int, columns: int, ranks: int, element_size: int, processors: int) -> Plan:
    """The tile of `_outer_kernel`, and chunks of rows until every processor has two programs: parts are small."""
    if element_size == 4:
        tile = Tile(16, 64, padded(ranks, 64), 4, 2)
    else:
        tile = Tile(64, 128, padded(ranks, 128), 8, 3)
    blocks = triton.cdiv(columns, tile.columns) * triton.cdiv(ranks, tile.ranks)
    return _cut(tile, rows, tile.rows, 256, blocks, 2 * processors)


def read_grad_plan(rows: int, columns: int, ranks: int, element_size: int, processors: int) -> Plan | None:
    """How `_read_grad_kernel` reads the gradient once; None if two reads by the other kernels are the better way.

    A program keeps the sums of a block of columns, so ds comes in one fp32 part for each of these blocks. With 512
    columns in a block the parts of ds are ranks / 256 of a 16-bit gradient: an eighth for 32 ranks, written and read.
    For 64 ranks the sums of no more than 256 columns fit in registers, and parts of a half, written and read, are what
    the second read is. In fp32, without tensor cores, the products take longer than both reads.
    """
    if element_size == 4 or ranks > 32:
        return None
    tile = Tile(32, 512, padded(ranks, 32), 8, 3)
    return _cut(tile, rows, tile.rows, 128, triton.cdiv(columns, tile.columns), 2 * processors)


# Grid: row blocks × chunks of columns × rank blocks, the last next to each other: they share x in L2. A program owns a
# block [BLOCK_M, BLOCK_R] of the result (or of its part). Traffic: x once, A once for each row block (from L2).
@triton.jit(do_not_specialize=("rows", "chunk", "chunks", "threshold"))
def _down_kernel(
    x,  # [M, K]
    a,  # [R, K] with any strides
    s,  # [chunks, M, R], the result if there is one chunk, else fp32
    seed,  # [1] int64, or None
    stride_x,
    stride_ar,
    stride_ak,
    rows,
    columns,
    ranks,
    chunk,
    chunks,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i = tl.program_id(0)
    r_blocks = tl.cdiv(ranks, BLOCK_R)
    i_r = i % r_blocks
    i_k = i // r_blocks % chunks
    i_m = (i // r_blocks // chunks).to(tl.int64)
    first = i_k * chunk
    last = tl.minimum(first + chunk, tl.cdiv(columns, BLOCK_K))

    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    o_k = tl.arange(0, BLOCK_K)
    p_x = x + o_m * stride_x + (first * BLOCK_K + o_k)[None, :]
    p_a = a + o_r.to(tl.int64) * stride_ar + (first * BLOCK_K + o_k)[:, None].to(tl.int64) * stride_ak
    if seed is not None:
        seed_value = tl.load(seed)
    b_s = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for step in tl.range(first, last):
        k = step * BLOCK_K
        m_k = k + o_k < columns
        b_x = tl.load(p_x, mask=(o_m < rows) & m_k[None, :], other=0)
        if seed is not None:
            b_x = tl.where(kept(seed_value, threshold, o_m, k, BLOCK_K), b_x, 0)
        b_a = tl.load(p_a, mask=m_k[:, None] & (o_r < ranks), other=0)
        b_s = tl.dot(b_x, b_a, b_s, input_precision="ieee")
        p_x += BLOCK_K
        p_a += BLOCK_K * stride_ak
    p_s = s + (i_k.to(tl.int64) * rows + o_m) * ranks + o_r
    tl.store(p_s, (b_s * scaling).to(s.dtype.element_ty), mask=(o_m < rows) & (o_r < ranks))


# Grid: row blocks × column blocks, the latter next to each other: they share s. A program owns a tile of the output.
# Traffic: the output once; s and B from L2, (BLOCK_M + BLOCK_N) · R elements for a tile.
@triton.jit(do_not_specialize=("rows", "threshold"))
def _up_kernel(
    s,  # [M, R]
    b,  # [N, R] with any strides
    bias,  # [N], or None
    out,  # [M, N]
    seed,  # [1] int64, or None
    stride_s,
    stride_bn,
    stride_br,
    stride_out,
    rows,
    columns,
    ranks,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i = tl.program_id(0)
    n_blocks = tl.cdiv(columns, BLOCK_N)
    first = i % n_blocks * BLOCK_N
    o_m = ((i // n_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = first + tl.arange(0, BLOCK_N)[None, :]
    o_r = tl.arange(0, BLOCK_R)
    p_s = s + o_m * stride_s + o_r[None, :]
    p_b = b + o_n.to(tl.int64) * stride_bn + o_r[:, None].to(tl.int64) * stride_br
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in tl.range(0, ranks, BLOCK_R):
        m_r = r + o_r < ranks
        b_s = tl.load(p_s, mask=(o_m < rows) & m_r[None, :], other=0)
        b_b = tl.load(p_b, mask=m_r[:, None] & (o_n < columns), other=0)
        b_out = tl.dot(b_s, b_b, b_out, input_precision="ieee")
        p_s += BLOCK_R
        p_b += BLOCK_R * stride_br
    b_out *= scaling
    if seed is not None:
        b_out = tl.where(kept(tl.load(seed), threshold, o_m, first, BLOCK_N), b_out, 0)
    if bias is not None:
        b_out += tl.load(bias + o_n, mask=o_n < columns, other=0).to(tl.float32)
    tl.store(out + o_m * stride_out + o_n, b_out.to(out.dtype.element_ty), mask=(o_m < rows) & (o_n < columns))


# Grid: column blocks × chunks of rows × rank blocks, the last next to each other: they share x in L2. A program keeps
# the sums of its columns and goes through its rows. Traffic: x once, ds once for each column block (from L2), the
# result as often as there are chunks.
@triton.jit(do_not_specialize=("rows", "chunk", "chunks", "threshold"))
def _outer_kernel(
    ds,  # [M, R]
    x,  # [M, K]
    out,  # [chunks] of [R, K] with any strides, fp32
    seed,  # [1] int64, or None
    stride_ds,
    stride_x,
    stride_or,
    stride_ok,
    rows,
    columns,
    ranks,
    chunk,
    chunks,
    scaling,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i = tl.program_id(0)
    r_blocks = tl.cdiv(ranks, BLOCK_R)
    i_r = i % r_blocks
    i_m = i // r_blocks % chunks
    first_column = i // r_blocks // chunks * BLOCK_K
    first = i_m * chunk
    last = tl.minimum(first + chunk, tl.cdiv(rows, BLOCK_M))

    o_k = first_column + tl.arange(0, BLOCK_K)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_m = first.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    p_x = x + o_m * stride_x + o_k[None, :]
    p_ds = ds + o_m * stride_ds + o_r[None, :]
    if seed is not None:
        seed_value = tl.load(seed)
    b_out = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for _ in tl.range(first, last):
        b_x = tl.load(p_x, mask=(o_m < rows) & (o_k < columns)[None, :], other=0)
        if seed is not None:
            b_x = tl.where(kept(seed_value, threshold, o_m, first_column, BLOCK_K), b_x, 0)
        b_ds = tl.load(p_ds, mask=(o_m < rows) & (o_r < ranks)[None, :], other=0)
        b_out = tl.dot(tl.trans(b_x), b_ds, b_out, input_precision="ieee")
        o_m += BLOCK_M
        p_x += BLOCK_M * stride_x
        p_ds += BLOCK_M * stride_ds
    p_out = out + i_m.to(tl.int64) * ranks * columns
    p_out += o_k.to(tl.int64)[:, None] * stride_ok + o_r.to(tl.int64)[None, :] * stride_or
    tl.store(p_out, b_out * scaling, mask=(o_k < columns)[:, None] & (o_r < ranks)[None, :])


# Grid: column blocks × chunks of rows. A program keeps B and the sums of its columns, and goes through its rows, of
# whose ds it makes a part. Traffic: the gradient once; s once for each column block (from L2); ds in fp32 as often as
# there are column blocks, grad_b as often as there are chunks.
@triton.jit(do_not_specialize=("rows", "chunk", "chunks"))
def _read_grad_kernel(
    grad,  # [M, N]
    b,  # [N, R]: R is BLOCK_R
    s,  # [M, R]
    ds,  # [column blocks, M, R], the result if there is one block, else fp32
    grad_b,  # [chunks, N, R] fp32
    stride_grad,
    stride_b,
    stride_s,
    rows,
    columns,
    chunk,
    chunks,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    i = tl.program_id(0)
    i_m = i % chunks
    i_n = i // chunks
    first = i_m * chunk
    last = tl.minimum(first + chunk, tl.cdiv(rows, BLOCK_M))

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.arange(0, BLOCK_R)[None, :]
    o_m = first.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_n = (o_n < columns)[:, None]
    b_b = tl.load(b + o_n.to(tl.int64)[:, None] * stride_b + o_r, mask=m_n, other=0)
    p_grad = grad + o_m * stride_grad + o_n[None, :]
    p_s = s + o_m * stride_s + o_r
    p_ds = ds + (i_n.to(tl.int64) * rows + o_m) * BLOCK_R + o_r
    b_sum = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    for _ in tl.range(first, last):
        m_m = o_m < rows
        b_grad = tl.load(p_grad, mask=m_m & (o_n < columns)[None, :], other=0)
        b_s = tl.load(p_s, mask=m_m, other=0)
        b_ds = tl.dot(b_grad, b_b) * scaling
        tl.store(p_ds, b_ds.to(ds.dtype.element_ty), mask=m_m)
        b_sum = tl.dot(tl.trans(b_grad), b_s, b_sum)
        o_m += BLOCK_M
        p_grad += BLOCK_M * stride_grad
        p_s += BLOCK_M * stride_s
        p_ds += BLOCK_M * BLOCK_R
    p_sum = grad_b + (i_m.to(tl.int64) * columns + o_n[:, None]) * BLOCK_R + o_r
    tl.store(p_sum, b_sum * scaling, mask=m_n)


# Grid: blocks of elements. Traffic: the parts once. The order of the sum is always the same.
@triton.jit(do_not_specialize=("chunks",))
def _add_parts_kernel(parts, out, size, chunks, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    o_part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros([1, BLOCK], tl.float32)
    for k in range(0, chunks, PARTS):
        p_parts = parts + (k + o_part).to(tl.int64) * size + o
        b_parts = tl.load(p_parts, mask=(k + o_part < chunks) & (o < size), other=0)
        total += tl.sum(b_parts, 0, keep_dims=True)
    tl.store(out + o, total.to(out.dtype.element_ty), mask=o < size)


def processors(device: torch.device) -> int:
    # The interpreter has none: any number that splits some calls and not others.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _kept_scale(seed: Tensor | None, threshold: int) -> float:
    return 1.0 if seed is None else 65536 / (65536 - threshold)


def aligned(factor: Tensor) -> Tensor:
    """s or B [., R] itself, or a copy whose ranks are padded by zeros, so that rows start at multiples of 16 elements.

    Triton reads 16 bytes at a time, and ahead of time, only what it knows to be so aligned.
    """
    missing = -factor.shape[1] % 16
    if missing == 0 and factor.stride(1) == 1 and factor.stride(0) % 16 == 0 and factor.data_ptr() % 16 == 0:
        return factor
    return F.pad(factor, (0, missing)).contiguous()


def _add_parts(parts: Tensor, out: Tensor) -> Tensor:
    """`out` = the sum over the first dimension of `parts`; both contiguous."""
    if out.numel():
        grid = (triton.cdiv(out.numel(), ADD_BLOCK),)
        _add_parts_kernel[grid](parts, out, out.numel(), parts.shape[0], PARTS=ADD_PARTS, BLOCK=ADD_BLOCK)
    return out


def _project(x: Tensor, a: Tensor, seed: Tensor | None, threshold: int, scaling: float) -> Tensor:
    """scaling · drop(x) aᵀ [M, R] for x [M, K] and a [R, K], the latter with any strides."""
    (rows, columns), ranks = x.shape, a.shape[0]
    s = torch.empty((rows, ranks), dtype=x.dtype, device=x.device)
    if s.numel() == 0:
        return s
    tile, chunk, chunks = down_plan(rows, columns, ranks, x.element_size(), processors(x.device))
    parts = torch.empty((chunks, rows, ranks), dtype=torch.float32, device=x.device) if chunks > 1 else s
    _down_kernel[(triton.cdiv(rows, tile.rows) * chunks * triton.cdiv(ranks, tile.ranks),)](
        x,
        a,
        parts,
        seed,
        x.stride(0),
        *a.stride(),
        rows,
        columns,
        ranks,
        chunk,
        chunks,
        scaling,
        threshold,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return s if chunks == 1 else _add_parts(parts, s)


def _expand(
    s: Tensor, b: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int, scaling: float, out: Tensor
) -> None:
    """out [M, N] = mask ⊙ (scaling · s bᵀ) + bias for s [M, R] and b [N, R], the latter with any strides."""
    (rows, columns), ranks = out.shape, s.shape[1]
    if out.numel() == 0:
        return
    tile = up_tile(rows, ranks, s.element_size())
    _up_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        s,
        b,
        None if bias is None else bias.contiguous(),
        out,
        seed,
        s.stride(0),
        *b.stride(),
        out.stride(0),
        rows,
        columns,
        ranks,
        scaling,
        threshold,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_R=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _sum_outer(ds: Tensor, x: Tensor, seed: Tensor | None, threshold: int, scaling: float, out: Tensor) -> Tensor:
    """out [R, K] (fp32, dense in some order) = scaling · dsᵀ drop(x) for ds [M, R] and x [M, K]."""
    (rows, columns), ranks = x.shape, ds.shape[1]
    if out.numel() == 0:
        return out
    tile, chunk, chunks = outer_plan(rows, columns, ranks, x.element_size(), processors(x.device))
    parts = torch.empty((chunks, out.numel()), dtype=torch.float32, device=x.device) if chunks > 1 else out
    _outer_kernel[(triton.cdiv(columns, tile.columns) * chunks * triton.cdiv(ranks, tile.ranks),)](
        ds,
        x,
        parts,
        seed,
        ds.stride(0),
        x.stride(0),
        *out.stride(),
        rows,
        columns,
        ranks,
        chunk,
        chunks,
        scaling,
        threshold,
        BLOCK_M=tile.rows,
        BLOCK_K=tile.columns,
        BLOCK_R=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out if chunks == 1 else _add_parts(parts, out)


def down(x: Tensor, lora_a: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """s [M, R] = drop(x) lora_aᵀ for x [M, K] and lora_a [R, K]; without `seed` nothing is dropped."""
    return _project(x, lora_a, seed, threshold, _kept_scale(seed, threshold))


def up(s: Tensor, lora_b: Tensor, bias: Tensor | None, scaling: float, out: Tensor) -> None:
    """out [M, N] = scaling · s lora_bᵀ + bias for s [M, r], lora_b [N, r] and bias [N] of any floating dtype."""
    _expand(s, lora_b, bias, None, 0, scaling, out)


def grad_x(ds: Tensor, lora_a: Tensor, seed: Tensor | None, threshold: int, out: Tensor) -> None:
    """out [M, K] = ds lora_a, dropped and scaled as x was, for ds [M, R] and lora_a [R, K]."""
    _expand(ds, lora_a.t(), None, seed, threshold, _kept_scale(seed, threshold), out)


def grad_a(ds: Tensor, x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """dsᵀ drop(x) [R, K] in fp32, for ds [M, R] and x [M, K]."""
    out = torch.empty((ds.shape[1], x.shape[1]), dtype=torch.float32, device=x.device)
    return _sum_outer(ds, x, seed, threshold, _kept_scale(seed, threshold), out)


def read_grad(
    grad: Tensor, lora_b: Tensor, s: Tensor | None, scaling: float, need_b: bool
) -> tuple[Tensor, Tensor | None]:
    """ds [M, r] = scaling · grad lora_b, and scaling · gradᵀ s [N, r] in fp32 if `need_b`.

    Args:
        grad [M, N]: read once if `read_grad_plan` has a way, else once for each result.
        lora_b [N, r].
        s [M, r]: not read unless `need_b`.
        scaling: the factor on both.
        need_b: whether the second result is wanted; else it is None.
    """
    if not need_b or s is None:
        return _project(grad, lora_b.t(), None, 0, scaling), None
    (rows, columns), ranks = grad.shape, lora_b.shape[1]
    fp32 = {"dtype": torch.float32, "device": grad.device}
    plan = read_grad_plan(rows, columns, ranks, grad.element_size(), processors(grad.device))
    if plan is None or grad.numel() == 0:
        grad_b = torch.empty((columns, ranks), **fp32)
        _sum_outer(s, grad, None, 0, scaling, grad_b.t())
        return _project(grad, lora_b.t(), None, 0, scaling), grad_b
    tile, chunk, chunks = plan
    s, lora_b = aligned(s), aligned(lora_b)
    blocks = triton.cdiv(columns, tile.columns)
    ds, grad_b = s.new_empty(s.shape), torch.empty((columns, tile.ranks), **fp32)
    ds_parts = torch.empty((blocks, *ds.shape), **fp32) if blocks > 1 else ds
    b_parts = torch.empty((chunks, *grad_b.shape), **fp32) if chunks > 1 else grad_b
    _read_grad_kernel[(blocks * chunks,)](
        grad,
        lora_b,
        s,
        ds_parts,
        b_parts,
        grad.stride(0),
        lora_b.stride(0),
        s.stride(0),
        rows,
        columns,
        chunk,
        chunks,
        scaling,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_R=tile.ranks,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if blocks > 1:
        _add_parts(ds_parts, ds)
    if chunks > 1:
        _add_parts(b_parts, grad_b)
    return ds[:, :ranks], grad_b[:, :ranks].contiguous()


def compile_cases() -> list[dict[str, Any]]:
    """The forms of every kernel that calls of usual shapes launch, for scripts/compile_kernels.py."""
    cases = []
    for dtype, seed in product(("fp32", "fp16", "bf16"), (None, "i64")):
        size, mark = 4 if dtype == "fp32" else 2, " dropout" if seed else ""
        shapes = list(product((16384, 512, 16), (16, 64, 128)))
        for tile in sorted({down_plan(rows, 4096, ranks, size, 132).tile for rows, ranks in shapes}):
            pointers = {"x": dtype, "a": dtype, "s": dtype, "seed": seed}
            cases.append(case(f"down {dtype}{mark}", _down_kernel, pointers, {"stride_ak": 1}, tile, "MKR"))
        for tile in sorted({up_tile(rows, ranks, size) for rows, ranks in shapes}):
            # Forward: B [N, R], and a bias; backward: Aᵀ, and a mask.
            pointers = {"s": dtype, "b": dtype, "bias": None if seed else "fp32", "out": dtype, "seed": seed}
            one = {"stride_bn": 1} if seed else {"stride_br": 1}
            cases.append(case(f"up {dtype}{mark}", _up_kernel, pointers, one, tile, "MNR"))
        for tile in sorted({outer_plan(rows, 4096, ranks, size, 132).tile for rows, ranks in shapes}):
            # A gradient [R, K] of A; without a mask also the transposed one [N, R] of B.
            pointers = {"ds": dtype, "x": dtype, "out": "fp32", "seed": seed}
            one = {"stride_ok": 1} if seed else {"stride_or": 1}
            cases.append(case(f"outer {dtype}{mark}", _outer_kernel, pointers, one, tile, "MKR"))
    for dtype in ("fp32", "fp16", "bf16"):
        size = 4 if dtype == "fp32" else 2
        for ranks in (16, 32):
            if plan := read_grad_plan(16384, 4096, ranks, size, 132):
                pointers = {"grad": dtype, "b": dtype, "s": dtype, "ds": "fp32", "grad_b": "fp32"}
                cases.append(case(f"read grad {dtype}", _read_grad_kernel, pointers, {}, plan.tile, "MNR"))
        pointers, blocks = {"parts": "fp32", "out": dtype}, {"PARTS": ADD_PARTS, "BLOCK": ADD_BLOCK}
        added = case(f"add parts {dtype}", _add_parts_kernel, pointers, blocks, Tile(1, ADD_BLOCK, 1, 4, 2), "")
        cases.append(added | {"tensor_core": False})
    return cases


def case(
    name: str, kernel: Any, pointers: dict[str, str | None], constants: dict[str, int], tile: Tile, blocks: str
) -> dict[str, Any]:
    sizes = {"M": tile.rows, "N": tile.columns, "K": tile.columns, "R": tile.ranks}
    constexprs: dict[str, Any] = constants | {f"BLOCK_{letter}": sizes[letter] for letter in blocks}
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items() if kind} | {"scaling": "fp32"}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    aligned = [
        argument
        for argument in kernel.arg_names
        if argument not in constexprs
        and (
            argument in pointers
            or argument.startswith("stride_")
            or argument in ("columns", "features", "ranks", "size")
        )
    ]
    return {
        "name": f"{name} {tile.rows}x{tile.columns} R={tile.ranks}",
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in aligned
        },
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "tensor_core": "fp32" not in (pointers.get("x"), pointers.get("s"), pointers.get("grad")),
    }
