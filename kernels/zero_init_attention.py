"""Triton kernels of zero_init_attention: the part of the prompts, of which a program holds those of one head."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Products of fp32 as three of TF32 each, exact but for the last bits: outside of tensor cores their operands would not
# fit into registers.
PRECISION: tl.constexpr = tl.constexpr("tf32x3")
ADD_TILE = {"BLOCK_C": 16, "BLOCK_N": 128, "num_warps": 4}


class Tile(NamedTuple):
    """Rows that a program reads together, and the sizes of prompts and head_dim that a product takes."""

    rows: int
    prompts: int
    dim: int
    num_warps: int

    def launch(self) -> dict[str, int]:
        return {"BLOCK_L": self.rows, "BLOCK_P": self.prompts, "BLOCK_D": self.dim, "num_warps": self.num_warps}


def tile(prompts: int, dim: int, element_size: int, backward: bool) -> Tile:
    """Rows such that what backward holds of them fits beside the sums for the prompts."""
    block_p, block_d = (max(triton.next_power_of_2(size), 16) for size in (prompts, dim))
    numbers = (2**11 if backward else 2**13) // (1 if element_size == 2 else 2 if backward else 4)
    many = block_d > 128 or (backward and element_size == 4)
    return Tile(max(min(numbers // block_d, 64), 16), block_p, block_d, 8 if many else 4)


@triton.jit
def _load_prompts(pointer, prompts, dim, o_p, o_d):
    mask = (o_p < prompts)[:, None] & (o_d < dim)[None, :]
    return tl.load(pointer + (o_p * dim)[:, None] + o_d[None, :], mask=mask, other=0)


@triton.jit
def _load_rows(pointer, stride, o_l, o_d, m):
    return tl.load(pointer + (o_l * stride)[:, None] + o_d[None, :], mask=m, other=0)


@triton.jit
def _attend(b_q, b_k, scale, prompts, o_p):
    scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    scores = tl.where((o_p < prompts)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


# Grid: blocks of rows × heads × samples. Traffic: query and words read once, out written once; prompts from L2.
@triton.jit
def _forward_kernel(
    words,  # [B, H, L, D]
    query,  # [B, H, L, D]; not read where there is one prompt
    prompt_key,  # [(B,) Hkv, P, D]
    prompt_value,
    act,  # [H] fp32
    out,  # [B, H, L, D]
    words_batch,
    words_head,
    words_row,
    query_batch,
    query_head,
    query_row,
    out_batch,
    out_head,
    out_row,
    prompt_batch,  # 0 where samples share the prompts
    act_stride,
    heads,
    group,
    length,
    prompts,
    dim,
    scale,
    ONE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK_L)
    o_l = i % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    i_h = i // blocks % heads
    i_b = i // blocks // heads
    o_d, o_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    m = (o_l < length)[:, None] & (o_d < dim)[None, :]
    at_prompts = i_b * prompt_batch + i_h // group * prompts * dim
    b_v = _load_prompts(prompt_value + at_prompts, prompts, dim, o_p, o_d)
    b_w = _load_rows(words + i_b * words_batch + i_h * words_head, words_row, o_l, o_d, m)
    gate = tl.load(act + i_h * act_stride)
    if ONE:
        part = tl.sum(b_v.to(tl.float32), 0)[None, :]
    else:
        b_q = _load_rows(query + i_b * query_batch + i_h * query_head, query_row, o_l, o_d, m)
        b_k = _load_prompts(prompt_key + at_prompts, prompts, dim, o_p, o_d)
        weights = _attend(b_q, b_k, scale, prompts, o_p)
        part = tl.dot(weights.to(b_v.dtype), b_v, input_precision=PRECISION)
    total = (b_w.to(tl.float32) + gate * part).to(b_w.dtype)
    # A closed gate gives the bits of words, whatever the prompts hold.
    total = tl.where(gate == 0, b_w, total)
    tl.store(out + i_b * out_batch + i_h * out_head + (o_l * out_row)[:, None] + o_d[None, :], total, mask=m)


# Grid: chunks of rows × heads × samples. A program goes through its rows once, with the sums for the prompts in
# registers. Traffic: query and grad read once, grad_query written once, parts for each chunk.
@triton.jit(do_not_specialize=("chunk_rows",))
def _backward_kernel(
    grad,  # [B, H, L, D]
    query,  # [B, H, L, D]
    prompt_key,  # [(B,) Hkv, P, D]
    prompt_value,
    act,  # [H] fp32
    grad_query,  # [B, H, L, D], or None
    key_parts,  # [B, H, chunks, P, D] fp32, or None
    value_parts,  # [B, H, chunks, P, D] fp32, or None
    act_parts,  # [B, H, chunks] fp32, or None
    grad_batch,
    grad_head,
    grad_row,
    query_batch,
    query_head,
    query_row,
    out_batch,
    out_head,
    out_row,
    prompt_batch,
    act_stride,
    heads,
    group,
    length,
    prompts,
    dim,
    scale,
    chunk_rows,
    ONE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    chunks = tl.cdiv(length, chunk_rows)
    i_h = i // chunks % heads
    i_b = i // chunks // heads
    o_d, o_p = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_P)
    at_prompts = i_b * prompt_batch + i_h // group * prompts * dim
    b_k = _load_prompts(prompt_key + at_prompts, prompts, dim, o_p, o_d)
    b_v = _load_prompts(prompt_value + at_prompts, prompts, dim, o_p, o_d)
    gate = tl.load(act + i_h * act_stride)
    p_query, p_grad = query + i_b * query_batch + i_h * query_head, grad + i_b * grad_batch + i_h * grad_head
    key_sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    value_sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    act_sums = tl.zeros([BLOCK_L], tl.float32)
    first = i % chunks * chunk_rows
    last = tl.minimum(first + chunk_rows, length)
    for start in range(0, last - first, BLOCK_L):
        o_l = first + start + tl.arange(0, BLOCK_L)
        m = (o_l < last)[:, None] & (o_d < dim)[None, :]
        b_g = _load_rows(p_grad, grad_row, o_l, o_d, m)
        if ONE:
            weights = tl.zeros([BLOCK_L, BLOCK_P], tl.float32) + tl.where(o_p == 0, 1.0, 0.0)[None, :]
        else:
            b_q = _load_rows(p_query, query_row, o_l, o_d, m)
            weights = _attend(b_q, b_k, scale, prompts, o_p)
        slopes = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
        mean = tl.sum(weights * slopes, 1)
        act_sums += mean
        if value_parts is not None:
            opened = (gate * weights).to(b_g.dtype)
            value_sums = tl.dot(tl.trans(opened), b_g, value_sums, input_precision=PRECISION)
        if grad_query is not None or key_parts is not None:
            slopes = (gate * weights * (slopes - mean[:, None])).to(b_g.dtype)
            if key_parts is not None:
                key_sums = tl.dot(tl.trans(slopes), b_q, key_sums, input_precision=PRECISION)
            if grad_query is not None:
                b_dq = tl.dot(slopes, b_k, input_precision=PRECISION) * scale
                b_dq = tl.where(gate == 0, 0.0, b_dq)
                p_dq = grad_query + i_b * out_batch + i_h * out_head + (o_l * out_row)[:, None] + o_d[None, :]
                tl.store(p_dq, b_dq.to(b_g.dtype), mask=m)
    m_p = (o_p < prompts)[:, None] & (o_d < dim)[None, :]
    o_part = i * prompts * dim + (o_p * dim)[:, None] + o_d[None, :]
    if key_parts is not None:
        tl.store(key_parts + o_part, tl.where(gate == 0, 0.0, key_sums * scale), mask=m_p)
    if value_parts is not None:
        tl.store(value_parts + o_part, tl.where(gate == 0, 0.0, value_sums), mask=m_p)
    if act_parts is not None:
        tl.store(act_parts + i, tl.sum(act_sums, 0))


# Grid: blocks of P · D × heads of the prompts (× samples that have their own). Adds the parts of the heads and samples
# that share them, in order, so that the result is always the same.
@triton.jit(do_not_specialize=("samples", "chunks"))
def _add_parts_kernel(
    parts,  # [B, H, chunks, P · D] fp32
    total,  # [(B,) Hkv, P · D]
    samples,  # that share a set of prompts: B or 1
    heads,
    group,
    chunks,
    size,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, BLOCK_N)
    o_n = i % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    i = i // blocks
    key_heads = heads // group
    each = group * chunks
    first = (i // key_heads * heads + i % key_heads * group) * chunks
    m_n = o_n < size
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, samples * each, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        row = first + o_c // each * heads * chunks + o_c % each
        mask = (o_c < samples * each)[:, None] & m_n[None, :]
        sums += tl.sum(tl.load(parts + (row * size)[:, None] + o_n[None, :], mask=mask, other=0), 0)
    tl.store(total + i * size + o_n, sums.to(total.dtype.element_ty), mask=m_n)


def forward(
    words: Tensor, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, act: Tensor, scale: float
) -> Tensor:
    """words + act · softmax(scale · query prompt_keyᵀ) prompt_value in the layout of words."""
    out = torch.empty_like(words)
    if out.numel() == 0:
        return out
    batch, heads, length, dim = query.shape
    prompt_key, prompt_value = prompt_key.contiguous(), prompt_value.contiguous()
    key_heads, prompts = prompt_key.shape[-3:-1]
    chosen = tile(prompts, dim, query.element_size(), backward=False)
    _forward_kernel[(triton.cdiv(length, chosen.rows) * heads * batch,)](
        words,
        query,
        prompt_key,
        prompt_value,
        act,
        out,
        *words.stride()[:3],
        *query.stride()[:3],
        *out.stride()[:3],
        prompt_key.stride(0) if prompt_key.dim() == 4 else 0,
        act.stride(0),
        heads,
        heads // key_heads,
        length,
        prompts,
        dim,
        scale,
        ONE=prompts == 1,
        **chosen.launch(),
    )
    return out


def chunk(length: int, heads: int, processors: int, rows: int) -> int:
    """Rows for each program of backward: whole tiles, so many that every processor has four programs."""
    wanted = triton.cdiv(4 * processors, heads)
    return triton.cdiv(triton.cdiv(length, wanted), rows) * rows


def backward(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    act: Tensor,
    scale: float,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    grad_act: Tensor | None,
) -> None:
    """Writes the gradients that are given; those of the prompts are contiguous."""
    batch, heads, length, dim = query.shape
    if query.numel() == 0:
        for gradient in (grad_key, grad_value, grad_act):
            if gradient is not None:
                gradient.zero_()
        return
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    prompt_key, prompt_value = prompt_key.contiguous(), prompt_value.contiguous()
    shared, (key_heads, prompts) = prompt_key.dim() == 3, prompt_key.shape[-3:-1]
    chosen, device = tile(prompts, dim, query.element_size(), backward=True), query.device
    # The interpreter has no processors: any number that makes several chunks of some calls.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    chunk_rows = chunk(length, batch * heads, processors, chosen.rows)
    chunks = triton.cdiv(length, chunk_rows)
    key_parts, value_parts = (
        None if gradient is None else torch.empty((batch, heads, chunks, prompts, dim), device=device)
        for gradient in (grad_key, grad_value)
    )
    act_parts = None if grad_act is None else torch.empty((batch, heads, chunks), device=device)
    _backward_kernel[(chunks * heads * batch,)](
        grad,
        query,
        prompt_key,
        prompt_value,
        act,
        grad_query,
        key_parts,
        value_parts,
        act_parts,
        *grad.stride()[:3],
        *query.stride()[:3],
        *((0, 0, 0) if grad_query is None else grad_query.stride()[:3]),
        0 if shared else prompt_key.stride(0),
        act.stride(0),
        heads,
        heads // key_heads,
        length,
        prompts,
        dim,
        scale,
        chunk_rows,
        ONE=prompts == 1,
        **chosen.launch(),
    )
    size = prompts * dim
    blocks = triton.cdiv(size, ADD_TILE["BLOCK_N"]) * key_heads * (1 if shared else batch)
    for parts, total in ((key_parts, grad_key), (value_parts, grad_value)):
        if parts is not None:
            _add_parts_kernel[(blocks,)](
                parts, total, batch if shared else 1, heads, heads // key_heads, chunks, size, **ADD_TILE
            )
    if grad_act is not None and act_parts is not None:
        torch.sum(act_parts, (0, 2), out=grad_act)


def compile_cases() -> list[dict[str, Any]]:
    """The kernels as the op launches them on a GPU, for scripts/compile_kernels.py; fp16 takes what bf16 takes."""
    cases = []
    small = [(10, 64, True), (20, 64, True), (10, 50, False), (1, 64, True)]
    large = [(10, 96, True), (20, 128, True), (32, 256, True), (1, 128, True)]
    kinds = [*product(("fp32", "bf16"), small), *product(("bf16",), large)]
    for dtype, (prompts, dim, aligned) in kinds:
        name, one = f"{prompts} of {dim} {dtype}", {"ONE": prompts == 1}
        matrices = dict.fromkeys(("query", "prompt_key", "prompt_value"), dtype)
        size = 4 if dtype == "fp32" else 2
        forward_tile, backward_tile = (tile(prompts, dim, size, backward=back).launch() for back in (False, True))
        pointers = {"words": dtype, **matrices, "act": "fp32", "out": dtype}
        cases.append(_case(f"forward {name}", _forward_kernel, pointers, one | forward_tile, aligned))
        parts = dict.fromkeys(("key_parts", "value_parts"), "fp32")
        pointers = {"grad": dtype, **matrices, "act": "fp32", "grad_query": dtype, **parts, "act_parts": "fp32"}
        forms = {"": {}, " without query": {"grad_query": None}, " for the gate": dict.fromkeys((*parts, "grad_query"))}
        if prompts == 1:
            forms = {"": {"grad_query": None, "key_parts": None}}
        for form, absent in forms.items():
            launch = one | backward_tile
            cases.append(_case(f"backward {name}{form}", _backward_kernel, pointers | absent, launch, aligned))
    for dtype in ("fp32", "bf16"):
        pointers = {"parts": "fp32", "total": dtype}
        cases.append(_case(f"add parts {dtype}", _add_parts_kernel, pointers, ADD_TILE, False))
    return cases


def _case(
    name: str, kernel: Any, pointers: dict[str, str | None], launch: dict[str, int], aligned: bool
) -> dict[str, Any]:
    constexprs = {key: size for key, size in launch.items() if key != "num_warps"}
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    kinds["scale"] = "fp32"
    strides = {argument for argument in kernel.arg_names if argument.endswith(("_batch", "_head", "_row"))}
    multiples = {*(pointers.keys() - constexprs), *(strides | {"dim"} if aligned else ())}
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": launch["num_warps"],
        "tensor_core": kernel is not _add_parts_kernel and not (kernel is _forward_kernel and constexprs["ONE"]),
    }
