"""Triton kernels of rms_norm. Rows are packed; a program holds one row at a time in registers."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Parts of the weight's gradient that are added up at a time, and their columns.
ADD_TILE = {"BLOCK_C": 16, "BLOCK_N": 128, "num_warps": 4}


# Grid: rows. Traffic: x and residual read once, sum and y written once; the weight stays in L2.
@triton.jit
def _forward_kernel(
    x,  # [rows, H]
    weight,  # [H], the dtype of x or fp32
    residual,  # [rows, H], or None
    y,  # [rows, H], the dtype of weight
    total,  # [rows, H] of the dtype of x: x + residual; None without one
    rstd,  # [rows] fp32, or None
    eps,
    width,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    mask = o_n < width
    first = row * width
    h = tl.load(x + first + o_n, mask=mask, other=0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + first + o_n, mask=mask, other=0).to(tl.float32)
        rounded = h.to(x.dtype.element_ty)
        tl.store(total + first + o_n, rounded, mask=mask)
        h = rounded.to(tl.float32)
    b_rstd = 1 / tl.sqrt_rn(tl.sum(h * h, 0) / width + eps)
    if rstd is not None:
        tl.store(rstd + row, b_rstd)
    scaled = (h * b_rstd).to(x.dtype.element_ty).to(tl.float32)
    b_weight = tl.load(weight + o_n, mask=mask, other=0).to(tl.float32)
    tl.store(y + first + o_n, (b_weight * scaled).to(y.dtype.element_ty), mask=mask)


# Grid: chunks of rows. A program goes through its rows once, with its part of the weight's gradient in registers.
# Traffic: grad_y, h and grad_sum read once, grad_x written once, one row of parts for each chunk.
@triton.jit(do_not_specialize=("chunk_rows",))
def _backward_kernel(
    grad_y,  # [rows, H], the dtype of weight
    grad_sum,  # [rows, H], or None
    h,  # [rows, H]
    weight,  # [H]
    rstd,  # [rows] fp32
    grad_x,  # [rows, H], or None
    parts,  # [chunks, H] fp32, or None
    rows,
    width,
    chunk_rows,
    BLOCK_N: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)
    mask = o_n < width
    first = chunk * chunk_rows
    count = tl.minimum(first + chunk_rows, rows) - first
    part = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, count):
        row = first + i
        offsets = row * width + o_n
        b_rstd = tl.load(rstd + row)
        g = tl.load(grad_y + offsets, mask=mask, other=0).to(tl.float32)
        scaled = tl.load(h + offsets, mask=mask, other=0).to(tl.float32) * b_rstd
        if parts is not None:
            part += g * scaled.to(h.dtype.element_ty).to(tl.float32)  # what forward multiplied the weight with
        if grad_x is not None:
            g *= tl.load(weight + o_n, mask=mask, other=0).to(tl.float32)
            grad = (g - scaled * (tl.sum(g * scaled, 0) / width)) * b_rstd
            if grad_sum is not None:
                grad += tl.load(grad_sum + offsets, mask=mask, other=0).to(tl.float32)
            tl.store(grad_x + offsets, grad.to(grad_x.dtype.element_ty), mask=mask)
    if parts is not None:
        tl.store(parts + chunk * width + o_n, part, mask=mask)


# Grid: column blocks. Adds the parts in order, so that the result is always the same.
@triton.jit(do_not_specialize=("chunks",))
def _add_parts_kernel(
    parts,  # [chunks, H] fp32
    total,  # [H] fp32
    width,
    chunks,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < width
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, chunks, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = (o_c < chunks)[:, None] & m_n[None, :]
        b_total += tl.sum(tl.load(parts + (o_c * width)[:, None] + o_n[None, :], mask=mask, other=0), 0)
    tl.store(total + o_n, b_total, mask=m_n)


def launch(width: int) -> dict[str, int]:
    """The block that holds a row, and its warps: 8 elements a thread, so that backward's five vectors fit."""
    block = triton.next_power_of_2(max(width, 1))
    return {"BLOCK_N": block, "num_warps": max(block // 256, 1)}


def chunk(rows: int, width: int, processors: int) -> int:
    """Rows for each program of backward: so many that every processor has 32 warps."""
    return max(triton.cdiv(rows, processors * (32 // launch(width)["num_warps"])), 1)


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    y: Tensor,
    total: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Writes y, total (x + residual) and rstd [rows], the last two if they are given. Tensors are contiguous."""
    width = x.shape[-1]
    if x.numel():
        grid = (x.numel() // width,)
        _forward_kernel[grid](x, weight, residual, y, total, rstd, eps, width, **launch(width))


def backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Writes grad_x and grad_weight [H] (fp32), those that are given. Tensors are contiguous."""
    rows, width, device = rstd.numel(), h.shape[-1], h.device
    if h.numel() == 0:
        if grad_weight is not None:
            grad_weight.zero_()
        return
    # The interpreter has no processors: any number that makes several chunks of some calls.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    # A row each where there are no sums to keep: the more programs, the evener their work.
    chunk_rows = 1 if grad_weight is None else chunk(rows, width, processors)
    chunks = triton.cdiv(rows, chunk_rows)
    parts = None if grad_weight is None else torch.empty((chunks, width), dtype=torch.float32, device=device)
    _backward_kernel[(chunks,)](
        grad_y, grad_sum, h, weight, rstd, grad_x, parts, rows, width, chunk_rows, **launch(width)
    )
    if parts is not None:
        grid = (triton.cdiv(width, ADD_TILE["BLOCK_N"]),)
        _add_parts_kernel[grid](parts, grad_weight, width, chunks, **ADD_TILE)


def compile_cases() -> list[dict[str, Any]]:
    """The kernels as the op launches them on a GPU, for scripts/compile_kernels.py; fp16 takes what bf16 takes."""
    cases = []
    # Above 4096 the op refuses rows that are not aligned: the masks of single elements would take too many registers.
    widths = ((64, True), (2048, True), (4096, True), (4096, False), (8192, True))
    dtypes = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
    for (width, aligned), (dtype, other) in product(widths, dtypes):
        suffix = f"{width} {dtype} weight {other}{'' if aligned else ' unaligned'}"
        shape = launch(width)
        added = {"x": dtype, "weight": other, "residual": dtype, "y": other, "total": dtype, "rstd": "fp32"}
        alone = added | {"residual": None, "total": None}
        full = {"grad_y": other, "grad_sum": dtype, "h": dtype, "weight": other, "rstd": "fp32", "grad_x": dtype}
        full["parts"] = "fp32"
        cases += [
            _case(f"add and norm {suffix}", _forward_kernel, added, shape, aligned),
            _case(f"norm {suffix}", _forward_kernel, alone, shape, aligned),
            _case(f"backward {suffix}", _backward_kernel, full, shape, aligned),
            _case(f"backward, frozen weight {suffix}", _backward_kernel, full | {"parts": None}, shape, aligned),
        ]
    vectors = {"parts": "fp32", "total": "fp32"}
    for aligned in (True, False):
        cases.append(
            _case(f"add parts{'' if aligned else ' unaligned'}", _add_parts_kernel, vectors, ADD_TILE, aligned)
        )
    return cases


def _case(
    name: str, kernel: Any, pointers: dict[str, str | None], shape: dict[str, int], aligned: bool
) -> dict[str, Any]:
    constexprs = {key: size for key, size in shape.items() if key != "num_warps"}
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    kinds["eps"] = "fp32"
    multiples = {*(pointers.keys() - constexprs), *(("width",) if aligned else ())}
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": shape["num_warps"],
        "tensor_core": False,
    }
