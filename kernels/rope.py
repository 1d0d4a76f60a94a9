"""Triton kernel of rope: queries and keys, or their gradients, in one launch."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, heads × half of a head: 16 a thread for each of the halves.
TILE = 1024
NUM_WARPS = 2


@triton.jit
def _rotate_heads(
    x,
    y,
    x_stride,
    y_stride,
    heads,
    half,
    o_d,
    b_cos1,
    b_cos2,
    b_sin1,
    b_sin2,
    C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    for start in range(0, heads, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        mask = (o_h < heads)[:, None] & (o_d < half)[None, :]
        p_x = x + (o_h * x_stride)[:, None] + o_d[None, :]
        p_y = y + (o_h * y_stride)[:, None] + o_d[None, :]
        a = tl.load(p_x, mask=mask, other=0).to(tl.float32)
        b = tl.load(p_x + half, mask=mask, other=0).to(tl.float32)
        # Products are rounded to the dtype of cos and sin, as PyTorch's are.
        first = (a * b_cos1).to(C).to(tl.float32) + (b * b_sin1).to(C).to(tl.float32)
        second = (b * b_cos2).to(C).to(tl.float32) + (a * b_sin2).to(C).to(tl.float32)
        tl.store(p_y, first.to(y.dtype.element_ty), mask=mask)
        tl.store(p_y + half, second.to(y.dtype.element_ty), mask=mask)


# Grid: tokens. A program rotates all heads of one. Traffic: q and k read once, written once; cos and sin once a token.
@triton.jit
def _rotate_kernel(
    q,  # [B, num_heads, L, D]
    k,  # [B, num_key_value_heads, L, D], or None
    cos,  # [B or 1, L, D]
    sin,
    q_out,
    k_out,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    num_heads,
    num_key_value_heads,
    length,
    half,
    ADJOINT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    batch, token = i // length, i % length
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < half
    p_cos = cos + batch * cos_batch + token * cos_token + o_d
    p_sin = sin + batch * sin_batch + token * sin_token + o_d
    b_cos1 = tl.load(p_cos, mask=m_d, other=0).to(tl.float32)[None, :]
    b_cos2 = tl.load(p_cos + half, mask=m_d, other=0).to(tl.float32)[None, :]
    b_sin1 = tl.load(p_sin, mask=m_d, other=0).to(tl.float32)[None, :]
    b_sin2 = tl.load(p_sin + half, mask=m_d, other=0).to(tl.float32)[None, :]
    # What the second half is multiplied with on its way to the first, and the first on its way to the second.
    if ADJOINT:
        to_first, to_second = b_sin2, -b_sin1
    else:
        to_first, to_second = -b_sin1, b_sin2
    C: tl.constexpr = cos.dtype.element_ty
    p_q = q + batch * q_batch + token * q_token
    p_q_out = q_out + batch * q_out_batch + token * q_out_token
    _rotate_heads(
        p_q, p_q_out, q_head, q_out_head, num_heads, half, o_d, b_cos1, b_cos2, to_first, to_second, C, BLOCK_H
    )
    if k is not None:
        p_k = k + batch * k_batch + token * k_token
        p_k_out = k_out + batch * k_out_batch + token * k_out_token
        _rotate_heads(
            p_k,
            p_k_out,
            k_head,
            k_out_head,
            num_key_value_heads,
            half,
            o_d,
            b_cos1,
            b_cos2,
            to_first,
            to_second,
            C,
            BLOCK_H,
        )


def launch(width: int) -> dict[str, int]:
    """The tile for heads of `width` elements."""
    block = triton.next_power_of_2(max(width // 2, 1))
    return {"BLOCK_H": max(TILE // block, 1), "BLOCK_D": block, "num_warps": NUM_WARPS}


def rotate(tensors: list[Tensor], cos: Tensor, sin: Tensor, results: list[Tensor], adjoint: bool) -> None:
    """Writes the results, for one or two tensors [B, heads, L, D]; the last dimension of all has stride 1."""
    if not any(x.numel() for x in tensors):
        return
    q, k = tensors[0], tensors[1] if len(tensors) > 1 else None
    q_out, k_out = results[0], results[1] if len(results) > 1 else None
    batch, _, length, width = q.shape
    strides = [
        step
        for x in (q, k, q_out, k_out)
        for step in ((0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2)))
    ]
    for x in (cos, sin):
        strides += [x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)]
    _rotate_kernel[(batch * length,)](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        *strides,
        q.shape[1],
        0 if k is None else k.shape[1],
        length,
        width // 2,
        ADJOINT=adjoint,
        **launch(width),
    )


def compile_cases() -> list[dict[str, Any]]:
    """The kernel as the op launches it on a GPU, for scripts/compile_kernels.py; fp16 takes what bf16 takes."""
    dtypes = [("fp32",) * 3, ("bf16",) * 3, ("bf16", "fp32", "fp32")]
    widths = [(64, True), (128, True), (256, True), (256, False)]
    forms = [(False, True), (True, True), (True, False)]
    return [_case(width, *kinds, *form, aligned) for (width, aligned), kinds, form in product(widths, dtypes, forms)]


def _case(
    width: int, source: str, angles: str, target: str, adjoint: bool, with_k: bool, aligned: bool
) -> dict[str, Any]:
    shape = launch(width)
    pointers = {"q": source, "cos": angles, "sin": angles, "q_out": target}
    pointers |= {"k": source, "k_out": target} if with_k else {}
    constexprs: dict[str, Any] = {key: size for key, size in shape.items() if key != "num_warps"}
    constexprs |= {"ADJOINT": adjoint} | ({} if with_k else {"k": None, "k_out": None})
    kinds = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    sizes = [name for name in _rotate_kernel.arg_names if name not in kinds and name not in ("num_heads", "length")]
    multiples = {*pointers, *(sizes if aligned else ())} - {"num_key_value_heads"}
    name = f"{'adjoint' if adjoint else 'rotate'} {width} {source} {angles} {target}"
    return {
        "name": f"{name}{'' if with_k else ' one tensor'}{'' if aligned else ' unaligned'}",
        "fn": _rotate_kernel,
        "signature": {name: kinds.get(name, "i32") for name in _rotate_kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(_rotate_kernel.arg_names) if name in multiples
        },
        "num_warps": NUM_WARPS,
        "tensor_core": False,
    }
