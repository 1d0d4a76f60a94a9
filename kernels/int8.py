"""Triton kernels of int8 weights: dequantise, and x Wᵀ for few rows of x."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels.nf4 import X_ROWS, add_parts, case, plan, processors

# Rows of W and columns that a program of the linear kernels takes at a time: 16 bytes a thread.
ROWS, COLUMNS = 16, 128
# Steps of the columns that are on their way to the tensor cores at a time.
STAGES = 4
# Elements that a program of the dequantising kernel takes.
ELEMENTS = 2048


# Grid: rows × ceil(K / ELEMENTS). Traffic: the values once, the dense weight once.
@triton.jit
def _dequantize_kernel(
    values,  # [rows, K]
    scale,  # [rows] fp32
    out,  # [rows, K]
    columns,
    ELEMENTS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = o_k < columns
    value = tl.load(values + n * columns + o_k, mask=mask, other=0).to(tl.float32) * tl.load(scale + n)
    tl.store(out + n * columns + o_k, value.to(out.dtype.element_ty), mask=mask)


# Grid: row blocks of W × parts of its columns × rows of x. Traffic: the values once for each row of x.
@triton.jit(do_not_specialize=("x_rows", "rows", "steps"))
def _row_kernel(
    x,  # [M, K]
    values,  # [N, K]
    sums,  # [parts, M, N] fp32, without the scale
    x_rows,
    rows,
    columns,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part, m = tl.program_id(1), tl.program_id(2)
    p_x = x + m.to(tl.int64) * columns
    p_w = values + (o_n * columns)[:, None]
    m_n = (o_n < rows)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        o_k = step * COLUMNS + tl.arange(0, COLUMNS)
        weight = tl.load(p_w + o_k[None, :], mask=m_n & (o_k < columns)[None, :], other=0).to(tl.float32)
        total += weight * tl.load(p_x + o_k, mask=o_k < columns, other=0).to(tl.float32)[None, :]
    p_sums = sums + (part.to(tl.int64) * x_rows + m) * rows + o_n
    tl.store(p_sums, tl.sum(total, 1), mask=o_n < rows)


# Grid: row blocks of W × parts of its columns. Traffic: the values once. x has X_ROWS rows at most.
@triton.jit(do_not_specialize=("x_rows", "rows", "steps"))
def _dot_kernel(
    x,  # [M, K]
    values,  # [N, K]
    sums,  # [parts, M, N] fp32, without the scale
    x_rows,
    rows,
    columns,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    X_ROWS: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_m = tl.arange(0, X_ROWS)
    part = tl.program_id(1)
    p_w = values + (o_n * columns)[:, None]
    m_n, m_m = (o_n < rows)[:, None], (o_m < x_rows)[None, :]
    total = tl.zeros([ROWS, X_ROWS], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        o_k = step * COLUMNS + tl.arange(0, COLUMNS)
        weight = tl.load(p_w + o_k[None, :], mask=m_n & (o_k < columns)[None, :], other=0)
        p_x = x + o_k[:, None] + (o_m * columns)[None, :]
        rows_of_x = tl.load(p_x, mask=(o_k < columns)[:, None] & m_m, other=0)
        total = tl.dot(weight.to(x.dtype.element_ty), rows_of_x, total)  # whole numbers to 127 are exact in 16 bits
    p_sums = sums + (part.to(tl.int64) * x_rows + o_m)[None, :] * rows + o_n[:, None]
    tl.store(p_sums, total, mask=(o_n < rows)[:, None] & m_m)


def dequantize_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    """Fills `out` [last - first, K] with rows first to last of the weight."""
    values, scale = tensors
    if out.numel() == 0:
        return
    _dequantize_kernel[(last - first, triton.cdiv(out.shape[1], ELEMENTS))](
        values[first:last], scale[first:last], out, out.shape[1], ELEMENTS=ELEMENTS
    )


def small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    """out [M, N] = x Wᵀ + bias for x [M, K] of `X_ROWS` rows at most."""
    values, scale = tensors
    (x_rows, columns), rows = x.shape, out.shape[1]
    single = x_rows == 1 or x.dtype == torch.float32
    row_blocks = triton.cdiv(rows, ROWS)
    cut = plan(row_blocks * (x_rows if single else 1), columns, COLUMNS, processors(x.device))
    sums = torch.empty((cut.parts, x_rows, rows), dtype=torch.float32, device=x.device)
    arguments = (x, values, sums, x_rows, rows, columns, cut.steps)
    options = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
    if single:
        _row_kernel[(row_blocks, cut.parts, x_rows)](*arguments, **options)
    else:
        _dot_kernel[(row_blocks, cut.parts)](*arguments, X_ROWS=X_ROWS, num_stages=STAGES, **options)
    add_parts(sums, scale, bias, out)


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that the op can launch, for scripts/compile_kernels.py; nf4 lists the one that adds parts."""
    cases = []
    rows = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    for dtype, multiples in product(("fp32", "fp16", "bf16"), ((), ("columns",))):
        name = f"{dtype}{'' if multiples else ' unaligned'}"
        pointers = {"values": "i8", "scale": "fp32", "out": dtype}
        constants: dict[str, Any] = {"ELEMENTS": ELEMENTS}
        cases.append(case(f"dequantize {name}", _dequantize_kernel, pointers, constants, 4, multiples=multiples))
        pointers = {"x": dtype, "values": "i8", "sums": "fp32"}
        cases.append(case(f"row {name}", _row_kernel, pointers, rows, 4, multiples=multiples))
        if dtype != "fp32":
            constants = rows | {"X_ROWS": X_ROWS}
            cases.append(case(f"dot {name}", _dot_kernel, pointers, constants, 4, True, multiples, STAGES))
    return cases
