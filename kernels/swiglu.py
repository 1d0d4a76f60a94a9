"""Triton kernels of swiglu: matrices [M, N] whose rows are packed."""

from __future__ import annotations

from itertools import product
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Rows and columns of a tile: 16 elements a thread.
TILE = {"BLOCK_M": 8, "BLOCK_N": 256, "num_warps": 4}


@triton.jit
def _tile(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns and mask of this program; in 64 bits, as offsets are."""
    i = tl.program_id(0).to(tl.int64)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    o_n = i % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = i // column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    return o_m, o_n, (o_m < rows)[:, None] & (o_n < columns)[None, :]


@triton.jit
def _load(matrix, stride, o_m, o_n, mask):
    return tl.load(matrix + (o_m * stride)[:, None] + o_n[None, :], mask=mask, other=0).to(tl.float32)


@triton.jit
def _store(matrix, stride, o_m, o_n, mask, block):
    tl.store(matrix + (o_m * stride)[:, None] + o_n[None, :], block.to(matrix.dtype.element_ty), mask=mask)


# Grid: row blocks × column blocks, columns next to each other. Traffic: gate and up read once, out written once.
@triton.jit
def _fwd_kernel(
    gate,  # [M, N]
    up,  # [M, N]
    out,  # [M, N]
    gate_stride,
    up_stride,
    out_stride,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m, o_n, mask = _tile(rows, columns, BLOCK_M, BLOCK_N)
    x = _load(gate, gate_stride, o_m, o_n, mask)
    silu = (x * tl.sigmoid(x)).to(out.dtype.element_ty).to(tl.float32)
    _store(out, out_stride, o_m, o_n, mask, silu * _load(up, up_stride, o_m, o_n, mask))


# Grid: as forward. Traffic: grad, gate and up read once, both gradients written once.
@triton.jit
def _bwd_kernel(
    grad,  # [M, N]
    gate,  # [M, N]
    up,  # [M, N], or None
    grad_gate,  # [M, N], or None; comes with up
    grad_up,  # [M, N], or None
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_m, o_n, mask = _tile(rows, columns, BLOCK_M, BLOCK_N)
    x = _load(gate, gate_stride, o_m, o_n, mask)
    g = _load(grad, grad_stride, o_m, o_n, mask)
    sigmoid = tl.sigmoid(x)
    silu = x * sigmoid
    if grad_up is not None:
        _store(grad_up, grad_up_stride, o_m, o_n, mask, g * silu.to(grad_up.dtype.element_ty).to(tl.float32))
    if grad_gate is not None:
        slope = sigmoid + silu * (1.0 - sigmoid)
        _store(grad_gate, grad_gate_stride, o_m, o_n, mask, g * _load(up, up_stride, o_m, o_n, mask) * slope)


def forward(*matrices: Tensor) -> None:
    """out = silu(gate) · up, for gate, up, out [M, N] of one dtype, stride 1 in the last dimension."""
    _launch(_fwd_kernel, *matrices)


def backward(*matrices: Tensor | None) -> None:
    """grad_gate and grad_up, each if it is given, of grad, gate, up (which comes with grad_gate), all [M, N]."""
    _launch(_bwd_kernel, *matrices)


def _launch(kernel: Any, *matrices: Tensor | None) -> None:
    first: Any = matrices[0]
    rows, columns = first.shape
    if first.numel() == 0:
        return
    strides = (0 if matrix is None else matrix.stride(0) for matrix in matrices)
    blocks = triton.cdiv(rows, TILE["BLOCK_M"]) * triton.cdiv(columns, TILE["BLOCK_N"])
    kernel[(blocks,)](*matrices, *strides, rows, columns, **TILE)


def compile_cases() -> list[dict[str, Any]]:
    """The kernels as the forms of the op launch them on a GPU, for scripts/compile_kernels.py."""
    cases = []
    for dtype, aligned in product(("fp32", "fp16", "bf16"), (True, False)):
        suffix = f"{dtype}{'' if aligned else ' unaligned'}"
        both = dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), dtype)
        cases += [
            _case(f"forward {suffix}", _fwd_kernel, dict.fromkeys(("gate", "up", "out"), dtype), aligned),
            _case(f"backward {suffix}", _bwd_kernel, both, aligned),
            _case(f"backward of gate {suffix}", _bwd_kernel, both | {"grad_up": None}, aligned),
            _case(f"backward of up {suffix}", _bwd_kernel, both | {"up": None, "grad_gate": None}, aligned),
        ]
    return cases


def _case(name: str, kernel: Any, pointers: dict[str, str | None], aligned: bool) -> dict[str, Any]:
    constexprs: dict[str, Any] = {key: size for key, size in TILE.items() if key != "num_warps"}
    constexprs |= {argument: None for argument, kind in pointers.items() if kind is None}
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    strided = {"columns", *(argument for argument in kernel.arg_names if argument.endswith("_stride"))}
    multiples = (pointers.keys() - constexprs) | (strided if aligned else set())
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names) if argument in multiples
        },
        "num_warps": TILE["num_warps"],
        "tensor_core": False,
    }
