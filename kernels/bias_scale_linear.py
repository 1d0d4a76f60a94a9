"""Triton kernels of bias_scale_linear: the passes over what its product gives or takes, matrices [M, N]."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile: 16 elements a thread, of which two fp32 sums stay in registers in backward.
TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}
# Parts that are added up at a time, and their columns.
ADD_TILE = {"BLOCK_C": 16, "BLOCK_N": 128, "num_warps": 4}
# Rows that a program of backward takes at least: its part of the sums costs as much as two rows of traffic.
LEAST_ROWS = 64


# Grid: row blocks × column blocks, columns next to each other. Traffic: z read once, out written once.
@triton.jit
def _apply_kernel(
    z,  # [M, N]
    bias,  # [N] fp32, or None
    scale,  # [N] fp32, or None
    out,  # [M, N], may be z
    z_stride,
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
    y = tl.load(z + (o_m * z_stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + o_n, mask=m_n, other=0)[None, :]
    if scale is not None:
        y *= tl.load(scale + o_n, mask=m_n, other=0)[None, :]
    tl.store(out + (o_m * out_stride)[:, None] + o_n[None, :], y.to(out.dtype.element_ty), mask=mask)


# Grid: chunks of rows × column blocks. A program goes through its rows once, with the sums of its columns in registers.
# Traffic: grad and z read once, out written once, two rows of parts for each chunk.
@triton.jit(do_not_specialize=("chunk_rows",))
def _read_grad_kernel(
    grad,  # [M, N]
    z,  # [M, N], or None
    bias,  # [N] fp32, or None
    scale,  # [N] fp32, or None
    out,  # [M, N], or None; may be grad
    parts,  # [chunks, 2, N] fp32: Σ grad · scale, Σ grad · (z + bias)
    grad_stride,
    z_stride,
    out_stride,
    rows,
    columns,
    chunk_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    chunk = i // column_blocks
    o_n = i % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < columns
    b_bias = tl.zeros([BLOCK_N], tl.float32)
    if bias is not None:
        b_bias = tl.load(bias + o_n, mask=m_n, other=0)
    b_scale = tl.full([BLOCK_N], 1.0, tl.float32)
    if scale is not None:
        b_scale = tl.load(scale + o_n, mask=m_n, other=0)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = chunk * chunk_rows
    last = tl.minimum(first + chunk_rows, rows)
    for start in tl.range(0, last - first, BLOCK_M, num_stages=STAGES):
        o_m = first + start + tl.arange(0, BLOCK_M)
        mask = (o_m < last)[:, None] & m_n[None, :]
        g = tl.load(grad + (o_m * grad_stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)
        scaled = g * b_scale[None, :]
        sums += scaled
        if z is not None:
            b_z = tl.load(z + (o_m * z_stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)
            products += g * (b_z + b_bias[None, :])
        if out is not None:
            p_out = out + (o_m * out_stride)[:, None] + o_n[None, :]
            tl.store(p_out, scaled.to(out.dtype.element_ty), mask=mask)
    p_parts = parts + chunk * 2 * columns + o_n
    tl.store(p_parts, tl.sum(sums, 0), mask=m_n)
    if z is not None:
        tl.store(p_parts + columns, tl.sum(products, 0), mask=m_n)


@triton.jit
def _add_in_order(parts, total, columns, chunks, o_n, BLOCK_C: tl.constexpr):
    m_n = o_n < columns
    b_total = tl.load(total + o_n, mask=m_n, other=0)
    for start in range(0, chunks, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        mask = (o_c < chunks)[:, None] & m_n[None, :]
        b_total += tl.sum(tl.load(parts + (o_c * 2 * columns)[:, None] + o_n[None, :], mask=mask, other=0), 0)
    tl.store(total + o_n, b_total, mask=m_n)


# Grid: column blocks. Adds the parts to the totals in order, so that the result is always the same.
@triton.jit(do_not_specialize=("chunks",))
def _add_parts_kernel(
    parts,  # [chunks, 2, N] fp32
    grad_bias,  # [N] fp32, or None
    grad_scale,  # [N] fp32, or None
    columns,
    chunks,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if grad_bias is not None:
        _add_in_order(parts, grad_bias, columns, chunks, o_n, BLOCK_C)
    if grad_scale is not None:
        _add_in_order(parts + columns, grad_scale, columns, chunks, o_n, BLOCK_C)


def apply(z: Tensor, bias: Tensor | None, scale: Tensor | None, out: Tensor) -> None:
    """out = (z + bias) · scale, for z, out [M, N] (stride 1 in the last dimension) and vectors [N] in fp32."""
    rows, columns = z.shape
    if z.numel() == 0:
        return
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
    _apply_kernel[(blocks,)](z, bias, scale, out, z.stride(0), out.stride(0), rows, columns, **TILE)


def stages(element_size: int) -> int:
    """How many tiles of a matrix are on their way at a time: 16 KiB of shared memory for grad and z."""
    return 3 if element_size == 2 else 2


def chunk(rows: int, columns: int, processors: int) -> int:
    """Rows for each program of backward: so many that every processor has four programs."""
    wanted = triton.cdiv(4 * processors, triton.cdiv(columns, TILE["BLOCK_N"]))
    return max(triton.cdiv(triton.cdiv(rows, wanted), TILE["BLOCK_M"]) * TILE["BLOCK_M"], LEAST_ROWS)


def read_grad(
    grad: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """out = grad · scale, grad_bias += Σ_m grad · scale, grad_scale += Σ_m grad · (z + bias), each if it is given.

    Matrices are [M, N] (stride 1 in the last dimension), vectors [N] in fp32; grad_scale comes with z.
    """
    rows, columns = grad.shape
    if grad.numel() == 0:
        return
    # The interpreter has no processors: any number that makes several chunks of some calls.
    device = grad.device
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    chunk_rows = chunk(rows, columns, processors)
    chunks = triton.cdiv(rows, chunk_rows)
    parts = torch.empty((chunks, 2, columns), dtype=torch.float32, device=device)
    z_stride, out_stride = (0 if matrix is None else matrix.stride(0) for matrix in (z, out))
    _read_grad_kernel[(chunks * triton.cdiv(columns, TILE["BLOCK_N"]),)](
        grad,
        z,
        bias,
        scale,
        out,
        parts,
        grad.stride(0),
        z_stride,
        out_stride,
        rows,
        columns,
        chunk_rows,
        STAGES=stages(grad.element_size()),
        **TILE,
    )
    if grad_bias is not None or grad_scale is not None:
        _add_parts_kernel[(triton.cdiv(columns, ADD_TILE["BLOCK_N"]),)](
            parts, grad_bias, grad_scale, columns, chunks, **ADD_TILE
        )


def compile_cases() -> list[dict[str, Any]]:
    """The kernels as the forms of the op launch them on a GPU, for scripts/compile_kernels.py."""
    cases = []
    for dtype, aligned in product(("fp32", "fp16", "bf16"), (True, False)):
        suffix = f"{dtype}{'' if aligned else ' unaligned'}"
        reading = TILE | {"STAGES": stages(4 if dtype == "fp32" else 2)}
        matrices = {"grad": dtype, "z": dtype, "out": dtype}
        vectors = {"bias": "fp32", "scale": "fp32"}
        full = matrices | vectors | {"parts": "fp32"}
        cases += [
            _case(f"apply {suffix}", _apply_kernel, {"z": dtype, **vectors, "out": dtype}, TILE, aligned),
            _case(f"read output's grad {suffix}", _read_grad_kernel, full, reading, aligned),
            _case(f"read input's grad {suffix}", _read_grad_kernel, full | {"bias": None}, reading, aligned),
            _case(
                f"read grad for the bias {suffix}",
                _read_grad_kernel,
                {**dict.fromkeys(full), "grad": dtype, "parts": "fp32"},
                reading,
                aligned,
            ),
        ]
    vectors = dict.fromkeys(("parts", "grad_bias", "grad_scale"), "fp32")
    for aligned in (True, False):
        name = f"add parts{'' if aligned else ' unaligned'}"
        cases.append(_case(name, _add_parts_kernel, vectors, ADD_TILE, aligned))
    return cases


def _case(
    name: str, kernel: Any, pointers: dict[str, str | None], launch: dict[str, int], aligned: bool
) -> dict[str, Any]:
    constexprs = {key: size for key, size in launch.items() if key != "num_warps"}
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    strided = ("grad_stride", "z_stride", "out_stride", "columns")
    multiples = {*(pointers.keys() - constexprs), *(strided if aligned else ())}
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": launch["num_warps"],
        "tensor_core": False,
    }
