"""Triton kernels of mixture_adapter: y = x + h U_bᵀ + b_b with h = drop(act(x Aᵀ + a)), and its gradients.

Letters: B samples of T tokens, H columns, R ranks of all projections, padded to 16 at least and masked. Channels of a
group see P of them, in `up` [B, P + 1, H], whose last row is the bias; to a product the other ranks are zeros, which
costs nothing where ranks are padded anyway. Sums are fp32; operands of products have the dtype of x. What several
programs sum is written as parts that are added in a fixed order.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.dropout import kept
from mmfast.kernels.lora_linear import processors

# Rows that a program of `_outer_kernel` takes at least: its part costs as much as two rows of traffic for each rank.
LEAST_ROWS = 256


class Tile(NamedTuple):
    """What a program works on at a time, and how."""

    rows: int
    columns: int
    ranks: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_R": self.ranks}
        return blocks | {"num_warps": self.num_warps, "num_stages": self.num_stages}


def row_tile(ranks: int, element_size: int) -> Tile:
    """The tile of the kernels that own rows."""
    block = max(triton.next_power_of_2(ranks), 16)
    if element_size == 4:
        # Without tensor cores a thread holds its factors in registers.
        return Tile(32 if block <= 16 else 16, 32 if block <= 64 else 16, block, 4, 2)
    if block <= 32:
        return Tile(64, 128, block, 4, 3)
    return Tile(64 if block == 64 else 32, 64, block, 8, 3 if block == 64 else 2)


def outer_tile(ranks: int, element_size: int) -> Tile:
    """The tile of `_outer_kernel`, which owns columns."""
    block = max(triton.next_power_of_2(ranks), 16)
    if element_size == 4:
        return Tile(16, 64, block, 4, 2) if block <= 32 else Tile(16, 32, block, 8, 2)
    return Tile(32, 128, block, 4, 3) if block <= 32 else Tile(64, 64, block, 8, 2)


def chunk(tokens: int, batch: int, blocks: int, rows: int, count: int) -> int:
    """Tokens for each program of `_outer_kernel`: so many that each of `count` processors has two programs."""
    wanted = triton.cdiv(2 * count, batch * blocks)
    return max(triton.cdiv(triton.cdiv(tokens, wanted), rows) * rows, LEAST_ROWS)


@triton.jit
def _act(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        gate = tl.sigmoid(z)
        return gate * (1 + z * (1 - gate))


@triton.jit
def _drop(h, seed, threshold, scale, o_m, BLOCK_R: tl.constexpr):
    if seed is None:
        return h
    else:
        return tl.where(kept(tl.load(seed), threshold, o_m, 0, BLOCK_R), h * scale, 0.0)


# Each of the `each` ranks of a projection belongs to one of the groups; a group sees `seen` of them.
@triton.jit
def _row_of(o_r, each, seen):
    return o_r // each * seen + o_r % each % seen


@triton.jit
def _visible(o_r, o_n, each, seen, width):
    return o_r % each // seen == o_n // width


# Grid: B × row blocks. Traffic: x twice, the second time from L2; y once; A and `up` of the sample from L2.
@triton.jit(do_not_specialize=("tokens", "threshold"))
def _fwd_kernel(
    x,  # [B, T, H]
    down,  # [R, H], of the dtype of x
    down_bias,  # [R] fp32, or None
    up,  # [B, P + 1, H] fp32
    y,  # [B, T, H]
    z,  # [B · T, R] fp32, or None
    seed,  # [1] int64, or None
    stride_b,
    stride_t,
    tokens,
    columns,
    ranks,
    each,
    seen,
    width,
    threshold,
    kept_scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_m = i_b * tokens + o_t
    m_t = o_t < tokens
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < ranks
    x += i_b * stride_b + o_t * stride_t
    dtype = x.dtype.element_ty

    b_z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in tl.range(0, columns, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < columns
        b_x = tl.load(x + o_n[None, :], mask=m_t & m_n[None, :], other=0)
        p_down = down + o_r[None, :] * columns + o_n[:, None]
        b_down = tl.load(p_down, mask=m_n[:, None] & m_r[None, :], other=0)
        b_z = tl.dot(b_x, b_down, b_z, input_precision="ieee")
    if down_bias is not None:
        b_z += tl.load(down_bias + o_r, mask=m_r, other=0)[None, :]
    if z is not None:
        tl.store(z + o_m * ranks + o_r[None, :], b_z, mask=m_t & m_r[None, :])
    b_h = _drop(_act(b_z, ACTIVATION), seed, threshold, kept_scale, o_m, BLOCK_R).to(dtype)

    up += i_b * (ranks // each * seen + 1) * columns
    p_rows = up + _row_of(o_r, each, seen)[:, None] * columns
    p_bias = up + ranks // each * seen * columns
    y += o_m * columns
    for n in tl.range(0, columns, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_n = o_n < columns
        m_up = (m_r[:, None] & m_n[None, :]) & _visible(o_r[:, None], o_n[None, :], each, seen, width)
        b_up = tl.load(p_rows + o_n[None, :], mask=m_up, other=0).to(dtype)
        b_y = tl.load(x + o_n[None, :], mask=m_t & m_n[None, :], other=0).to(tl.float32)
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0)[None, :]
        b_y = tl.dot(b_h, b_up, b_y, input_precision="ieee")
        tl.store(y + o_n[None, :], b_y.to(dtype), mask=m_t & m_n[None, :])


# Grid: B × row blocks. Traffic: the gradient twice, the second time from L2; grad_x once; A and `up` from L2.
@triton.jit(do_not_specialize=("tokens", "threshold"))
def _bwd_rows_kernel(
    grad,  # [B, T, H]
    z,  # [B · T, R] fp32, or None
    down,  # [R, H], of the dtype of grad
    up,  # [B, P + 1, H] fp32
    grad_x,  # [B, T, H], or None
    grad_z,  # [B · T, R] fp32, or None
    h,  # [B · T, R] fp32, or None
    seed,  # [1] int64, or None
    stride_b,
    stride_t,
    tokens,
    columns,
    ranks,
    each,
    seen,
    width,
    threshold,
    kept_scale,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    blocks = tl.cdiv(tokens, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_m = i_b * tokens + o_t
    m_t = o_t < tokens
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < ranks
    m_z = m_t & m_r[None, :]
    grad += i_b * stride_b + o_t * stride_t
    dtype = grad.dtype.element_ty
    b_z = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if z is not None:
        b_z = tl.load(z + o_m * ranks + o_r[None, :], mask=m_z, other=0)
    if h is not None:
        b_h = _drop(_act(b_z, ACTIVATION), seed, threshold, kept_scale, o_m, BLOCK_R)
        tl.store(h + o_m * ranks + o_r[None, :], b_h, mask=m_z)

    if grad_z is not None:
        up += i_b * (ranks // each * seen + 1) * columns
        p_rows = up + _row_of(o_r, each, seen)[None, :] * columns
        b_grad = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for n in tl.range(0, columns, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            m_n = o_n < columns
            m_up = (m_n[:, None] & m_r[None, :]) & _visible(o_r[None, :], o_n[:, None], each, seen, width)
            b_up = tl.load(p_rows + o_n[:, None], mask=m_up, other=0).to(dtype)
            b_y = tl.load(grad + o_n[None, :], mask=m_t & m_n[None, :], other=0)
            b_grad = tl.dot(b_y, b_up, b_grad, input_precision="ieee")
        if ACTIVATION != "identity":
            b_grad *= _slope(b_z, ACTIVATION)
        b_grad = _drop(b_grad, seed, threshold, kept_scale, o_m, BLOCK_R)
        tl.store(grad_z + o_m * ranks + o_r[None, :], b_grad, mask=m_z)
        if grad_x is not None:
            b_factor = b_grad.to(dtype)
            grad_x += o_m * columns
            for n in tl.range(0, columns, BLOCK_N):
                o_n = n + tl.arange(0, BLOCK_N)
                m_n = o_n < columns
                p_down = down + o_r[:, None] * columns + o_n[None, :]
                b_down = tl.load(p_down, mask=m_r[:, None] & m_n[None, :], other=0)
                b_x = tl.load(grad + o_n[None, :], mask=m_t & m_n[None, :], other=0).to(tl.float32)
                b_x = tl.dot(b_factor, b_down, b_x, input_precision="ieee")
                tl.store(grad_x + o_n[None, :], b_x.to(dtype), mask=m_t & m_n[None, :])


# Grid: B × chunks of rows × column blocks, these next to each other: they share `left`. A program goes through its rows
# with the sums of its columns in registers. Traffic: `right` once, `left` from L2, a part for each chunk.
@triton.jit(do_not_specialize=("tokens", "chunk_rows", "chunks"))
def _outer_kernel(
    left,  # [B · T, R] fp32
    right,  # [B, T, H]
    parts,  # [B, chunks, P, H] fp32, and one more row if WITH_SUM
    stride_b,
    stride_t,
    tokens,
    columns,
    ranks,
    each,
    seen,
    width,
    chunk_rows,
    chunks,
    WITH_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    column_blocks = tl.cdiv(columns, BLOCK_N)
    i = tl.program_id(0)
    o_n = i % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    i_c = i // column_blocks % chunks
    i_b = (i // column_blocks // chunks).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_n, m_r = o_n < columns, o_r < ranks
    first = i_c.to(tl.int64) * chunk_rows
    last = tl.minimum(first + chunk_rows, tokens)
    b_out = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, last - first, BLOCK_M):
        o_t = first + start + tl.arange(0, BLOCK_M)[:, None]
        p_left = left + (i_b * tokens + o_t) * ranks + o_r[None, :]
        b_left = tl.load(p_left, mask=(o_t < last) & m_r[None, :], other=0).to(right.dtype.element_ty)
        p_right = right + i_b * stride_b + o_t * stride_t + o_n[None, :]
        b_right = tl.load(p_right, mask=(o_t < last) & m_n[None, :], other=0)
        b_out = tl.dot(tl.trans(b_right), b_left, b_out, input_precision="ieee")
        if WITH_SUM:
            b_sum += tl.sum(b_right.to(tl.float32), 0)
    rows = ranks // each * seen
    parts += (i_b * chunks + i_c) * (rows + WITH_SUM) * columns
    p_parts = parts + _row_of(o_r, each, seen)[None, :] * columns + o_n[:, None]
    m_out = (m_n[:, None] & m_r[None, :]) & _visible(o_r[None, :], o_n[:, None], each, seen, width)
    tl.store(p_parts, b_out, mask=m_out)
    if WITH_SUM:
        tl.store(parts + rows * columns + o_n, b_sum, mask=m_n)


def _kept_scale(seed: Tensor | None, threshold: int) -> float:
    return 1.0 if seed is None else 65536 / (65536 - threshold)


def forward(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    """y [B, T, H], and z [B · T, R] (fp32) if it is to be kept, for x [B, T, H], down [R, H] and up [B, P + 1, H]."""
    x = x if x.stride(2) == 1 else x.contiguous()
    batch, tokens, columns = x.shape
    ranks, each = down.shape[0], down.shape[0] // downs
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    z = torch.empty((batch * tokens, ranks), dtype=torch.float32, device=x.device) if keep else None
    tile = row_tile(ranks, x.element_size())
    if y.numel():
        _fwd_kernel[(batch * triton.cdiv(tokens, tile.rows),)](
            x,
            down.to(x.dtype).contiguous(),
            None if down_bias is None else down_bias.float().contiguous(),
            up.float().contiguous(),
            y,
            z,
            seed,
            *x.stride()[:2],
            tokens,
            columns,
            ranks,
            each,
            each // groups,
            columns // groups,
            threshold,
            _kept_scale(seed, threshold),
            ACTIVATION=activation,
            **tile.launch(),
        )
    return [y] if z is None else [y, z]


def backward(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    down: Tensor,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    need_x: bool,
    need_down: bool,
    need_bias: bool,
    need_up: bool,
) -> list[Tensor]:
    """The gradients of x, in its dtype, and of down, its bias and up, in fp32: those that are needed."""
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    batch, tokens, columns = grad.shape
    ranks, each = down.shape[0], down.shape[0] // downs
    fp32 = {"dtype": torch.float32, "device": grad.device}
    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if need_x else None
    grad_z = torch.empty((batch * tokens, ranks), **fp32) if need_x or need_down or need_bias else None
    h = torch.empty((batch * tokens, ranks), **fp32) if need_up else None
    tile = row_tile(ranks, grad.element_size())
    if grad.numel():
        _bwd_rows_kernel[(batch * triton.cdiv(tokens, tile.rows),)](
            grad,
            z,
            down.to(grad.dtype).contiguous(),
            up.float().contiguous(),
            grad_x,
            grad_z,
            h,
            seed,
            *grad.stride()[:2],
            tokens,
            columns,
            ranks,
            each,
            each // groups,
            columns // groups,
            threshold,
            _kept_scale(seed, threshold),
            ACTIVATION=activation,
            **tile.launch(),
        )
    found = [] if grad_x is None else [grad_x]
    if need_down and x is not None and grad_z is not None:
        rows = x.reshape(1, batch * tokens, columns)
        found.append(_sum_outer(grad_z, rows, ranks, ranks, columns, with_sum=False)[0])
    if need_bias and grad_z is not None:
        found.append(grad_z.sum(0))
    if h is not None:
        found.append(_sum_outer(h, grad, each, each // groups, columns // groups, with_sum=True))
    return found


def _sum_outer(left: Tensor, right: Tensor, each: int, seen: int, width: int, *, with_sum: bool) -> Tensor:
    """[B, P, H]: Σ_t left · right of each sample, for the ranks that a column sees; and Σ_t right with `with_sum`."""
    right = right if right.stride(2) == 1 else right.contiguous()
    batch, tokens, columns = right.shape
    ranks = left.shape[1]
    tile = outer_tile(ranks, right.element_size())
    blocks = triton.cdiv(columns, tile.columns)
    chunk_rows = chunk(tokens, max(batch, 1), max(blocks, 1), tile.rows, processors(right.device))
    chunks = triton.cdiv(tokens, chunk_rows)
    parts = torch.empty(
        (batch, chunks, ranks // each * seen + with_sum, columns), dtype=torch.float32, device=right.device
    )
    if parts.numel():
        _outer_kernel[(batch * chunks * blocks,)](
            left,
            right,
            parts,
            *right.stride()[:2],
            tokens,
            columns,
            ranks,
            each,
            seen,
            width,
            chunk_rows,
            chunks,
            WITH_SUM=with_sum,
            **tile.launch(),
        )
    return parts[:, 0] if chunks == 1 else parts.sum(1)


def compile_cases() -> list[dict[str, Any]]:
    """The forms of every kernel that calls of usual shapes launch, for scripts/compile_kernels.py; fp16 as bf16."""
    cases = []
    for dtype, ranks in product(("fp32", "bf16"), (8, 32, 64, 128)):
        size = 4 if dtype == "fp32" else 2
        tile, outer = row_tile(ranks, size), outer_tile(ranks, size)
        for activation, seed in (
            ("identity", "i64"),
            ("identity", None),
            ("gelu", None),
            ("relu", None),
            ("silu", None),
        ):
            if ranks != 8 and activation in ("gelu", "silu"):
                continue
            vectors = {"down_bias": "fp32", "up": "fp32", "z": "fp32", "seed": seed}
            pointers = {"x": dtype, "down": dtype, "y": dtype, **vectors}
            mark = f"{activation} {dtype}{' dropout' if seed else ''}"
            cases.append(_case(f"forward {mark}", _fwd_kernel, pointers, {"ACTIVATION": activation}, tile))
            pointers = {"grad": dtype, "down": dtype, "grad_x": dtype, "z": "fp32", "up": "fp32"}
            pointers |= {"grad_z": "fp32", "h": "fp32", "seed": seed}
            cases.append(_case(f"backward {mark}", _bwd_rows_kernel, pointers, {"ACTIVATION": activation}, tile))
        for with_sum in (False, True):
            pointers = {"left": "fp32", "right": dtype, "parts": "fp32"}
            name = f"outer{' and sum' if with_sum else ''} {dtype}"
            cases.append(_case(name, _outer_kernel, pointers, {"WITH_SUM": with_sum}, outer))
    return cases


def _case(
    name: str, kernel: Any, pointers: dict[str, str | None], constants: dict[str, Any], tile: Tile
) -> dict[str, Any]:
    blocks = {key: size for key, size in tile.launch().items() if key.startswith("BLOCK")}
    constexprs: dict[str, Any] = constants | blocks
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items() if kind} | {"kept_scale": "fp32"}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    aligned = {*pointers, "stride_b", "stride_t", "columns", "width"} - constexprs.keys()
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
        "tensor_core": "fp32" not in (pointers.get("x"), pointers.get("grad"), pointers.get("right")),
    }
