"""Triton kernels of resampler_attention. Keys are two segments, media and latents, in blocks that never span both."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """What a program works on: so many queries and keys of padded dimension at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def padded(count: int) -> int:
    """The power of two that a dimension is filled up to."""
    return max(32, triton.next_power_of_2(count))


def forward_tile(queries: int, dim: int, element_size: int) -> Tile:
    """The tile of the forward kernel: 16 bits take all queries, up to 64 of them. Larger tiles spill on sm_80."""
    wide = padded(dim) > 64
    if element_size == 4:
        return Tile(32, 16 if wide else 32, 8, 1)
    return Tile(min(64, padded(queries)), 64, 8 if wide else 4, 2)


def backward_tile(dim: int, element_size: int) -> Tile:
    """The tile of the backward kernel."""
    return Tile(16, 16, 8, 1) if element_size == 4 else Tile(32, 64, 8, 1)


class Plan(NamedTuple):
    """How the keys of a head are cut among programs."""

    media_blocks: int
    latent_blocks: int
    splits: int
    split_blocks: int


def plan(heads: int, query_blocks: int, media: int, latents: int, keys: int, processors: int) -> Plan:
    """Splits of the keys until every processor has two programs, of four blocks each at least."""
    media_blocks, latent_blocks = triton.cdiv(media, keys), triton.cdiv(latents, keys)
    blocks = media_blocks + latent_blocks
    wanted = triton.cdiv(2 * processors, max(heads * query_blocks, 1))
    split_blocks = max(triton.cdiv(blocks, wanted), min(blocks, 4), 1)
    return Plan(media_blocks, latent_blocks, max(triton.cdiv(blocks, split_blocks), 1), split_blocks)


@triton.jit
def load_rows(p_rows, stride, o_n, o_d, m_n, dim, BLOCK_D: tl.constexpr):
    """Rows o_n of a head, zeros where m_n is false and beyond its dimension."""
    pointers = p_rows + (o_n.to(tl.int64) * stride)[:, None] + o_d[None, :]
    return tl.load(pointers, mask=m_n[:, None] & (o_d < dim)[None, :], other=0)


@triton.jit
def _attend(
    b_q,
    scale,
    b_max,
    b_sum,
    b_out,
    p_k,
    p_v,
    real,
    stride_k,
    stride_v,
    first,
    last,
    count,
    dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The running softmax of the queries after the blocks of keys first .. last of a segment of `count` keys.

    Scores are powers of two: `scale` has the factor log2 e.
    """
    o_d = tl.arange(0, BLOCK_D)
    for block in tl.range(first, last):
        o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < count
        if real is not None:
            m_n = m_n & (tl.load(real + o_n, mask=m_n, other=0) != 0)
        b_k = load_rows(p_k, stride_k, o_n, o_d, m_n, dim, BLOCK_D)
        b_v = load_rows(p_v, stride_v, o_n, o_d, m_n, dim, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # While nothing is seen, the maximum is -inf: 0 in its place, lest there be inf - inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_shrink = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_out


# Grid: B × H × splits × blocks of queries. A program reads its queries once and its keys and values once.
@triton.jit(
    do_not_specialize=("queries", "media", "latents", "media_blocks", "latent_blocks", "splits", "split_blocks")
)
def _fwd_kernel(
    query,
    media_key,
    media_value,
    latent_key,
    latent_value,
    real,  # [B, N] uint8, or None
    out,  # as the query, or fp32 parts [splits, B, Q, H, D]
    lse,  # [B, H, Q], or parts [splits, B, H, Q]; natural logarithms
    query_b,
    query_h,
    query_l,
    media_key_b,
    media_key_h,
    media_key_l,
    media_value_b,
    media_value_h,
    media_value_l,
    latent_key_b,
    latent_key_h,
    latent_key_l,
    latent_value_b,
    latent_value_h,
    latent_value_l,
    out_s,
    out_b,
    out_h,
    out_l,
    scale,
    batch,
    heads,
    queries,
    media,
    latents,
    dim,
    media_blocks,
    latent_blocks,
    splits,
    split_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    query_blocks = tl.cdiv(queries, BLOCK_M)
    i_m = i % query_blocks
    i = i // query_blocks
    i_s = i % splits
    i = i // splits
    i_b, i_h = i // heads, i % heads
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_m = o_m < queries
    if real is not None:
        real += i_b * media
    b_q = load_rows(query + i_b * query_b + i_h * query_h, query_l, o_m, o_d, m_m, dim, BLOCK_D)
    scale *= 1.4426950408889634
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = i_s.to(tl.int32) * split_blocks
    last = tl.minimum(first + split_blocks, media_blocks + latent_blocks)
    b_max, b_sum, b_out = _attend(
        b_q,
        scale,
        b_max,
        b_sum,
        b_out,
        media_key + i_b * media_key_b + i_h * media_key_h,
        media_value + i_b * media_value_b + i_h * media_value_h,
        real,
        media_key_l,
        media_value_l,
        tl.minimum(first, media_blocks),
        tl.minimum(last, media_blocks),
        media,
        dim,
        BLOCK_N,
        BLOCK_D,
    )
    if latent_key is not None:
        b_max, b_sum, b_out = _attend(
            b_q,
            scale,
            b_max,
            b_sum,
            b_out,
            latent_key + i_b * latent_key_b + i_h * latent_key_h,
            latent_value + i_b * latent_value_b + i_h * latent_value_h,
            None,
            latent_key_l,
            latent_value_l,
            tl.maximum(first - media_blocks, 0),
            tl.maximum(last - media_blocks, 0),
            latents,
            dim,
            BLOCK_N,
            BLOCK_D,
        )
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    b_lse = (b_max + tl.log2(tl.where(b_sum == 0, 1.0, b_sum))) * 0.6931471805599453
    p_out = out + i_s * out_s + i_b * out_b + i_h * out_h + (o_m * out_l)[:, None] + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & (o_d < dim)[None, :])
    tl.store(lse + ((i_s * batch + i_b) * heads + i_h) * queries + o_m, b_lse, mask=m_m)


# Grid: B × H × queries. Adds the parts of a query in order, each weighted as its exponentials are.
@triton.jit(do_not_specialize=("batch", "queries", "splits"))
def _merge_kernel(
    parts,  # [splits, B, Q, H, D]
    part_lse,  # [splits, B, H, Q]
    out,  # [B, Q, H, D]
    lse,  # [B, H, Q]
    batch,
    heads,
    queries,
    dim,
    splits,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    i_q, i_h, i_b = i % queries, i // queries % heads, i // queries // heads
    o_d = tl.arange(0, BLOCK_D)
    rows = batch.to(tl.int64) * heads * queries
    row = (i_b * queries + i_q) * heads + i_h
    largest = tl.full([], float("-inf"), tl.float32)
    for s in range(0, splits):
        largest = tl.maximum(largest, tl.load(part_lse + s * rows + i))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([], tl.float32)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    for s in range(0, splits):
        weight = tl.exp2((tl.load(part_lse + s * rows + i) - shift) * 1.4426950408889634)
        total += weight
        b_out += weight * tl.load(parts + (s * rows + row) * dim + o_d, mask=o_d < dim, other=0)
    total_or_1 = tl.where(total == 0, 1.0, total)
    tl.store(out + row * dim + o_d, (b_out / total_or_1).to(out.dtype.element_ty), mask=o_d < dim)
    tl.store(lse + i, largest + tl.log2(total_or_1) * 0.6931471805599453)


# Grid: B × H × blocks of keys, first those of media. A program owns the gradients of its keys and values; of those of
# the queries it writes a part. Traffic: keys and values once, their gradients once; queries and parts once a block.
@triton.jit(do_not_specialize=("queries", "media", "latents", "media_blocks", "latent_blocks"))
def _bwd_kernel(
    grad_out,
    query,
    out,
    lse,  # [B, H, Q]
    media_key,
    media_value,
    latent_key,
    latent_value,
    real,  # [B, N] uint8, or None
    parts,  # [blocks, B, Q, H, D] fp32, or None
    grad_media_key,  # [B, N, H, D] as all gradients, or None
    grad_media_value,
    grad_latent_key,
    grad_latent_value,
    grad_b,
    grad_h,
    grad_l,
    query_b,
    query_h,
    query_l,
    media_key_b,
    media_key_h,
    media_key_l,
    media_value_b,
    media_value_h,
    media_value_l,
    latent_key_b,
    latent_key_h,
    latent_key_l,
    latent_value_b,
    latent_value_h,
    latent_value_l,
    scale,
    batch,
    heads,
    queries,
    media,
    latents,
    dim,
    media_blocks,
    latent_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    blocks = media_blocks + latent_blocks
    block = i % blocks
    i = i // blocks
    i_b, i_h = i // heads, i % heads
    o_d = tl.arange(0, BLOCK_D)
    is_media = block < media_blocks
    if is_media or latent_key is None:
        o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_store = o_n < media
        m_n = m_store
        if real is not None:
            m_n = m_n & (tl.load(real + i_b * media + o_n, mask=m_n, other=0) != 0)
        b_k = load_rows(media_key + i_b * media_key_b + i_h * media_key_h, media_key_l, o_n, o_d, m_n, dim, BLOCK_D)
        b_v = load_rows(
            media_value + i_b * media_value_b + i_h * media_value_h, media_value_l, o_n, o_d, m_n, dim, BLOCK_D
        )
    else:
        o_n = (block - media_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_store = o_n < latents
        m_n = m_store
        b_k = load_rows(latent_key + i_b * latent_key_b + i_h * latent_key_h, latent_key_l, o_n, o_d, m_n, dim, BLOCK_D)
        p_v = latent_value + i_b * latent_value_b + i_h * latent_value_h
        b_v = load_rows(p_v, latent_value_l, o_n, o_d, m_n, dim, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(0, queries, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < queries
        b_q = load_rows(query + i_b * query_b + i_h * query_h, query_l, o_m, o_d, m_m, dim, BLOCK_D)
        b_do = load_rows(grad_out + i_b * grad_b + i_h * grad_h, grad_l, o_m, o_d, m_m, dim, BLOCK_D)
        # The output lies as fresh memory does.
        row = i_b * queries * heads + i_h
        b_o = load_rows(out + row * dim, heads * dim, o_m, o_d, m_m, dim, BLOCK_D)
        b_mean = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        b_lse = tl.load(lse + (i_b * heads + i_h) * queries + o_m, mask=m_m, other=0) * 1.4426950408889634
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * (scale * 1.4426950408889634)
        m_p = m_n[:, None] & m_m[None, :]
        b_p = tl.where(m_p, tl.exp2(tl.where(m_p, b_s - b_lse[None, :], 0.0)), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision="ieee") - b_mean[None, :])
        b_ds = b_ds.to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
        if parts is not None:
            b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision="ieee") * scale
            p_dq = parts + (block * batch * heads * queries + row) * dim
            p_dq += (o_m.to(tl.int64) * heads * dim)[:, None] + o_d[None, :]
            tl.store(p_dq, b_dq, mask=m_m[:, None] & (o_d < dim)[None, :])
    m_out = m_store[:, None] & (o_d < dim)[None, :]
    o_out = (o_n.to(tl.int64) * heads * dim)[:, None] + o_d[None, :]
    b_dk *= scale
    if is_media or latent_key is None:
        o_out += (i_b * media * heads + i_h) * dim
        if grad_media_key is not None:
            tl.store(grad_media_key + o_out, b_dk.to(grad_media_key.dtype.element_ty), mask=m_out)
        if grad_media_value is not None:
            tl.store(grad_media_value + o_out, b_dv.to(grad_media_value.dtype.element_ty), mask=m_out)
    else:
        o_out += (i_b * latents * heads + i_h) * dim
        if grad_latent_key is not None:
            tl.store(grad_latent_key + o_out, b_dk.to(grad_latent_key.dtype.element_ty), mask=m_out)
        if grad_latent_value is not None:
            tl.store(grad_latent_value + o_out, b_dv.to(grad_latent_value.dtype.element_ty), mask=m_out)


ADD = 1024


# Grid: blocks of elements of the queries' gradient. Adds its parts in order, so that the result is always the same.
@triton.jit(do_not_specialize=("blocks",))
def _add_parts_kernel(parts, grad_query, elements, blocks, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    p_part = parts + o
    for _ in range(0, blocks):
        total += tl.load(p_part, mask=o < elements, other=0)
        p_part += elements
    tl.store(grad_query + o, total.to(grad_query.dtype.element_ty), mask=o < elements)


def _processors(device: torch.device) -> int:
    # The interpreter has none: any number that splits some calls and not others.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def forward(
    query: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None,
    latent_value: Tensor | None,
    media_mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fills out [B, H, Q, D], which lies as [B, Q, H, D], and lse [B, H, Q]."""
    batch, heads, queries, dim = query.shape
    if query.numel() == 0:
        return
    media, latents = media_key.size(2), 0 if latent_key is None else latent_key.size(2)
    tile = forward_tile(queries, dim, query.element_size())
    query_blocks = triton.cdiv(queries, tile.queries)
    cut = plan(batch * heads, query_blocks, media, latents, tile.keys, _processors(query.device))
    target, target_lse = out[None], lse
    if cut.splits > 1:
        fp32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
        target = torch.empty((cut.splits, batch, queries, heads, dim), **fp32).transpose(2, 3)
        target_lse = torch.empty((cut.splits, batch, heads, queries), **fp32)
    _fwd_kernel[(batch * heads * cut.splits * query_blocks,)](
        query,
        media_key,
        media_value,
        latent_key,
        latent_value,
        _bytes(media_mask),
        target,
        target_lse,
        *strides(query),
        *strides(media_key),
        *strides(media_value),
        *strides(latent_key),
        *strides(latent_value),
        *target.stride()[:4],
        scale,
        batch,
        heads,
        queries,
        media,
        latents,
        dim,
        *cut,
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        BLOCK_D=padded(dim),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if cut.splits > 1:
        _merge_kernel[(batch * heads * queries,)](
            target,
            target_lse,
            out,
            lse,
            batch,
            heads,
            queries,
            dim,
            cut.splits,
            BLOCK_D=padded(dim),
            num_warps=1,
            num_stages=3,
        )


def backward(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    media_key: Tensor,
    media_value: Tensor,
    latent_key: Tensor | None,
    latent_value: Tensor | None,
    media_mask: Tensor | None,
    scale: float,
    grad_query: Tensor | None,
    grad_media_key: Tensor | None,
    grad_media_value: Tensor | None,
    grad_latent_key: Tensor | None,
    grad_latent_value: Tensor | None,
) -> None:
    """Fills the gradients that are given, [B, H, L, D] that lie as [B, L, H, D]."""
    batch, heads, queries, dim = query.shape
    media, latents = media_key.size(2), 0 if latent_key is None else latent_key.size(2)
    tile = backward_tile(dim, query.element_size())
    media_blocks, latent_blocks = triton.cdiv(media, tile.keys), triton.cdiv(latents, tile.keys)
    blocks = media_blocks + latent_blocks
    parts = None
    if grad_query is not None:
        parts = torch.empty((blocks, batch, queries, heads, dim), dtype=torch.float32, device=query.device)
    if batch * heads * blocks:
        _bwd_kernel[(batch * heads * blocks,)](
            grad_out,
            query,
            out,
            lse,
            media_key,
            media_value,
            latent_key,
            latent_value,
            _bytes(media_mask),
            parts,
            grad_media_key,
            grad_media_value,
            grad_latent_key,
            grad_latent_value,
            *strides(grad_out),
            *strides(query),
            *strides(media_key),
            *strides(media_value),
            *strides(latent_key),
            *strides(latent_value),
            scale,
            batch,
            heads,
            queries,
            media,
            latents,
            dim,
            media_blocks,
            latent_blocks,
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            BLOCK_D=padded(dim),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    if grad_query is not None and grad_query.numel():
        elements = grad_query.numel()
        _add_parts_kernel[(triton.cdiv(elements, ADD),)](parts, grad_query, elements, blocks, BLOCK=ADD)


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that the op can launch, for scripts/compile_kernels.py; with a mask and latents."""
    cases = []
    names = ("query", "media_key", "media_value", "latent_key", "latent_value")
    one_warp, four_warps = Tile(0, 0, 1, 3), Tile(0, 0, 4, 3)
    for dtype, dim in product(("fp32", "fp16", "bf16"), (32, 64, 128)):
        size = 4 if dtype == "fp32" else 2
        inputs = dict.fromkeys(names, dtype) | {"real": "u8", "lse": "fp32"}
        for tile in dict.fromkeys(forward_tile(queries, dim, size) for queries in (32, 64)):
            blocks = {"BLOCK_D": dim, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
            for part in dict.fromkeys((dtype, "fp32")):
                name = f"forward {dtype} {tile.queries} queries, D {dim}{'' if part == dtype else ', parts'}"
                cases.append(compile_case(name, _fwd_kernel, inputs | {"out": part}, blocks, tile, size == 2))
        tile = backward_tile(dim, size)
        blocks = {"BLOCK_D": dim, "BLOCK_M": tile.queries, "BLOCK_N": tile.keys}
        outputs = dict.fromkeys(("grad_out", "out", *(f"grad_{name}" for name in names[1:])), dtype)
        pointers = inputs | outputs | {"parts": "fp32"}
        cases.append(compile_case(f"backward {dtype}, D {dim}", _bwd_kernel, pointers, blocks, tile, size == 2))
        pointers = {"parts": "fp32", "part_lse": "fp32", "lse": "fp32", "out": dtype}
        cases.append(
            compile_case(f"merge {dtype}, D {dim}", _merge_kernel, pointers, {"BLOCK_D": dim}, one_warp, False)
        )
    for dtype in ("fp32", "fp16", "bf16"):
        pointers = {"parts": "fp32", "grad_query": dtype}
        cases.append(compile_case(f"add parts {dtype}", _add_parts_kernel, pointers, {"BLOCK": ADD}, four_warps, False))
    return cases


def compile_case(
    name: str, kernel: Any, pointers: dict[str, str], constexprs: dict[str, Any], tile: Tile, tensor_core: bool
) -> dict[str, Any]:
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | {"scale": "fp32"}
    kinds |= dict.fromkeys(constexprs, "constexpr")
    multiples = (*pointers, "dim", *(n for n in kernel.arg_names if n.endswith(("_b", "_h", "_l", "_s"))))
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "tensor_core": tensor_core,
    }
