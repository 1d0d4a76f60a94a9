"""Triton kernel of gated_residual; its gradients are a pass of bias_scale_linear."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile: 16 elements a thread.
TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}


# Grid: row blocks × column blocks, columns next to each other. Traffic: x and y read once, out written once.
@triton.jit
def _fwd_kernel(
    x,  # [M, N]
    y,  # [M, N]
    factor,  # [N] fp32
    out,  # [M, N]
    x_stride,
    y_stride,
    out_stride,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    o_n = i % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    m_n = o_n < columns
    mask = (o_m < rows)[:, None] & m_n[None, :]
    b_factor = tl.load(factor + o_n, mask=m_n, other=0)[None, :]
    b_x = tl.load(x + (o_m * x_stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)
    b_y = tl.load(y + (o_m * y_stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)
    p_out = out + (o_m * out_stride)[:, None] + o_n[None, :]
    tl.store(p_out, (b_x + b_factor * b_y).to(out.dtype.element_ty), mask=mask)


def forward(x: Tensor, y: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = x + factor · y, for x, y, out [M, N] (stride 1 in the last dimension) and factor [N] in fp32."""
    rows, columns = x.shape
    if x.numel() == 0:
        return
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
    _fwd_kernel[(blocks,)](x, y, factor, out, x.stride(0), y.stride(0), out.stride(0), rows, columns, **TILE)


def compile_cases() -> list[dict[str, Any]]:
    """The kernel as the op launches it on a GPU, for scripts/compile_kernels.py."""
    return [_case(dtype, aligned) for dtype, aligned in product(("fp32", "fp16", "bf16"), (True, False))]


def _case(dtype: str, aligned: bool) -> dict[str, Any]:
    pointers = {"x": dtype, "y": dtype, "factor": "fp32", "out": dtype}
    constexprs = {key: size for key, size in TILE.items() if key != "num_warps"}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    multiples = {*pointers, *(("x_stride", "y_stride", "out_stride", "columns") if aligned else ())}
    arguments = _fwd_kernel.arg_names
    return {
        "name": f"forward {dtype}{'' if aligned else ' unaligned'}",
        "fn": _fwd_kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in arguments},
        "constexprs": constexprs,
        "attrs": {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(arguments) if argument in multiples},
        "num_warps": TILE["num_warps"],
        "tensor_core": False,
    }
