"""Triton kernels of gated_cross_attention. A block of tokens visits the keys of its media alone, and the other way."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.resampler_attention import (
    backward_tile,
    compile_case,
    forward_tile,
    load_rows,
    padded,
    strides,
)


@triton.jit
def _keys_of(text_time, o_m, m_m, media, media_length, ONLY_LATEST: tl.constexpr):
    """The first key that each token sees, and the one after the last; 0 and 0 if it sees none."""
    b_time = tl.load(text_time + o_m, mask=m_m, other=0)
    if ONLY_LATEST:
        b_time = tl.where((b_time > 0) & (b_time <= media), b_time, 0)
        return tl.maximum(b_time - 1, 0) * media_length, b_time * media_length
    b_time = tl.minimum(tl.maximum(b_time, 0), media)
    return b_time * 0, b_time * media_length


@triton.jit
def _first_of(b_first, b_last):
    """The first key that any token of a block sees; the last of all where none sees any."""
    return tl.min(tl.where(b_first < b_last, b_first, 2147483647), 0)


# Grid: B × H × blocks of tokens. A program reads its queries once, and the keys and values that they see.
@triton.jit(do_not_specialize=("length", "media"))
def _fwd_kernel(
    query,
    key,
    value,
    text_time,  # [B, L] int32
    out,  # [B, L, H, D]
    lse,  # [B, H, L], natural logarithms
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    scale,
    heads,
    length,
    media,
    media_length,
    dim,
    ONLY_LATEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK_M)
    i_m, i_b, i_h = i % blocks, i // blocks // heads, i // blocks % heads
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < length
    b_first, b_last = _keys_of(text_time + i_b * length, o_m, m_m, media, media_length, ONLY_LATEST)
    b_q = load_rows(query + i_b * query_b + i_h * query_h, query_l, o_m, o_d, m_m, dim, BLOCK_D)
    p_k, p_v = key + i_b * key_b + i_h * key_h, value + i_b * value_b + i_h * value_h
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(b_last, 0)
    for first in tl.range(_first_of(b_first, b_last), last, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_k = load_rows(p_k, key_l, o_n, o_d, m_n, dim, BLOCK_D)
        b_v = load_rows(p_v, value_l, o_n, o_d, m_n, dim, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * 1.4426950408889634)
        m_s = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_last[:, None])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # While nothing is seen, the maximum is -inf: 0 in its place, lest there be inf - inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_shrink = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_max = b_new
    b_total = tl.where(b_sum == 0, 1.0, b_sum)
    p_out = out + ((i_b * length + o_m) * heads + i_h)[:, None] * dim + o_d[None, :]
    tl.store(p_out, (b_out / b_total[:, None]).to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < dim)[None, :])
    tl.store(lse + (i_b * heads + i_h) * length + o_m, (b_max + tl.log2(b_total)) * 0.6931471805599453, mask=m_m)


# Grid: B × H × blocks of tokens. A program owns the gradients of its queries.
@triton.jit(do_not_specialize=("length", "media"))
def _bwd_query_kernel(
    grad_out,
    query,
    key,
    value,
    text_time,
    out,
    lse,
    grad_query,  # [B, L, H, D]
    grad_b,
    grad_h,
    grad_l,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    scale,
    heads,
    length,
    media,
    media_length,
    dim,
    ONLY_LATEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK_M)
    i_m, i_b, i_h = i % blocks, i // blocks // heads, i // blocks % heads
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < length
    b_first, b_last = _keys_of(text_time + i_b * length, o_m, m_m, media, media_length, ONLY_LATEST)
    b_q = load_rows(query + i_b * query_b + i_h * query_h, query_l, o_m, o_d, m_m, dim, BLOCK_D)
    b_do = load_rows(grad_out + i_b * grad_b + i_h * grad_h, grad_l, o_m, o_d, m_m, dim, BLOCK_D)
    row = (i_b * length * heads + i_h) * dim
    b_o = load_rows(out + row, heads * dim, o_m, o_d, m_m, dim, BLOCK_D)
    b_mean = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    b_lse = tl.load(lse + (i_b * heads + i_h) * length + o_m, mask=m_m, other=0) * 1.4426950408889634
    p_k, p_v = key + i_b * key_b + i_h * key_h, value + i_b * value_b + i_h * value_h
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = tl.max(b_last, 0)
    for first in tl.range(_first_of(b_first, b_last), last, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        b_k = load_rows(p_k, key_l, o_n, o_d, m_n, dim, BLOCK_D)
        b_v = load_rows(p_v, value_l, o_n, o_d, m_n, dim, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * (scale * 1.4426950408889634)
        m_s = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_last[:, None])
        b_p = tl.where(m_s, tl.exp2(tl.where(m_s, b_s - b_lse[:, None], 0.0)), 0.0)
        b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision="ieee") - b_mean[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    p_dq = grad_query + row + (o_m * heads * dim)[:, None] + o_d[None, :]
    tl.store(p_dq, (b_dq * scale).to(grad_query.dtype.element_ty), mask=m_m[:, None] & (o_d < dim)[None, :])


# Grid: B × H × blocks of keys, which may span media. A program owns the gradients of its keys and values; it looks at
# the times of all tokens, and reads those blocks of tokens of which one sees one of its keys.
@triton.jit(do_not_specialize=("length", "media"))
def _bwd_key_kernel(
    grad_out,
    query,
    key,
    value,
    text_time,
    out,
    lse,
    grad_key,  # [B, T · media_length, H, D] as grad_value, or None
    grad_value,
    grad_b,
    grad_h,
    grad_l,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    scale,
    heads,
    length,
    media,
    media_length,
    dim,
    ONLY_LATEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    keys = media * media_length
    blocks = tl.cdiv(keys, BLOCK_N)
    i_n, i_b, i_h = i % blocks, i // blocks // heads, i // blocks % heads
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = o_n < keys
    b_k = load_rows(key + i_b * key_b + i_h * key_h, key_l, o_n, o_d, m_n, dim, BLOCK_D)
    b_v = load_rows(value + i_b * value_b + i_h * value_h, value_l, o_n, o_d, m_n, dim, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = (i_b * length * heads + i_h) * dim
    for first in tl.range(0, length, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < length
        b_first, b_last = _keys_of(text_time + i_b * length, o_m, m_m, media, media_length, ONLY_LATEST)
        m_p = (o_n[:, None] >= b_first[None, :]) & (o_n[:, None] < b_last[None, :])
        if tl.max(((b_first < i_n * BLOCK_N + BLOCK_N) & (b_last > i_n * BLOCK_N)).to(tl.int32), 0) > 0:
            b_q = load_rows(query + i_b * query_b + i_h * query_h, query_l, o_m, o_d, m_m, dim, BLOCK_D)
            b_do = load_rows(grad_out + i_b * grad_b + i_h * grad_h, grad_l, o_m, o_d, m_m, dim, BLOCK_D)
            b_o = load_rows(out + row, heads * dim, o_m, o_d, m_m, dim, BLOCK_D)
            b_mean = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
            b_lse = tl.load(lse + (i_b * heads + i_h) * length + o_m, mask=m_m, other=0) * 1.4426950408889634
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * 1.4426950408889634)
            b_p = tl.where(m_p, tl.exp2(tl.where(m_p, b_s - b_lse[None, :], 0.0)), 0.0)
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
            b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_mean[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    m_out = m_n[:, None] & (o_d < dim)[None, :]
    o_out = ((i_b * keys + o_n) * heads + i_h)[:, None] * dim + o_d[None, :]
    if grad_key is not None:
        tl.store(grad_key + o_out, (b_dk * scale).to(grad_key.dtype.element_ty), mask=m_out)
    if grad_value is not None:
        tl.store(grad_value + o_out, b_dv.to(grad_value.dtype.element_ty), mask=m_out)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_time: Tensor,
    media_length: int,
    scale: float,
    only_latest: bool,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out [B, H, L, D], which lies as [B, L, H, D], and lse [B, H, L]."""
    batch, heads, length, dim = query.shape
    if query.numel() == 0:
        return
    tile = forward_tile(length, dim, query.element_size())
    _fwd_kernel[(batch * heads * triton.cdiv(length, tile.queries),)](
        query,
        key,
        value,
        text_time,
        out,
        lse,
        *strides(query),
        *strides(key),
        *strides(value),
        scale,
        heads,
        length,
        key.size(2) // media_length,
        media_length,
        dim,
        ONLY_LATEST=only_latest,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_D=padded(dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def backward(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor,
    value: Tensor,
    text_time: Tensor,
    media_length: int,
    scale: float,
    only_latest: bool,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    """Fills the gradients that are given, [B, H, length, D] that lie as [B, length, H, D]."""
    batch, heads, length, dim = query.shape
    tile = backward_tile(dim, query.element_size())
    tensors = grad_out, query, key, value, text_time, out, lse
    settings = (
        *(step for x in tensors[:4] for step in strides(x)),
        scale,
        heads,
        length,
        key.size(2) // media_length,
        media_length,
        dim,
    )
    options: dict[str, Any] = {
        "ONLY_LATEST": only_latest,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_D": padded(dim),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if grad_query is not None and grad_query.numel():
        grid = (batch * heads * triton.cdiv(length, tile.queries),)
        _bwd_query_kernel[grid](*tensors, grad_query, *settings, **options)
    if (grad_key is not None or grad_value is not None) and key.numel():
        grid = (batch * heads * triton.cdiv(key.size(2), tile.keys),)
        _bwd_key_kernel[grid](*tensors, grad_key, grad_value, *settings, **options)


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that the op can launch, for scripts/compile_kernels.py; fp16 has the forms of bf16."""
    cases = []
    for dtype, dim, only_latest in product(("fp32", "bf16"), (32, 64, 128), (True, False)):
        size = 4 if dtype == "fp32" else 2
        inputs = dict.fromkeys(("query", "key", "value", "out"), dtype) | {"text_time": "i32", "lse": "fp32"}
        what = f"{dtype}, D {dim}, {'latest' if only_latest else 'all'}"
        for tile in dict.fromkeys(forward_tile(length, dim, size) for length in (32, 64)):
            blocks = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "BLOCK_D": dim, "ONLY_LATEST": only_latest}
            name = f"forward {what}, {tile.queries} tokens"
            cases.append(compile_case(name, _fwd_kernel, inputs, blocks, tile, size == 2))
        tile = backward_tile(dim, size)
        blocks = {"BLOCK_M": tile.queries, "BLOCK_N": tile.keys, "BLOCK_D": dim, "ONLY_LATEST": only_latest}
        for part, kernel, grads in (
            ("query", _bwd_query_kernel, ("grad_query",)),
            ("key", _bwd_key_kernel, ("grad_key", "grad_value")),
        ):
            pointers = inputs | dict.fromkeys(("grad_out", *grads), dtype)
            cases.append(compile_case(f"backward {part} {what}", kernel, pointers, blocks, tile, size == 2))
    return cases
