"""The two products with a frozen weight, x Wᵀ and grad W, each by the fastest way that the device has for them.

They are steps of ops, so they check nothing. Matrices are contiguous in their last dimension, and `out` has the dtype
in which the product is made: that of `compute_dtype`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from mmfast.ops import extension, weights

# On a CPU a weight is brought into the dtype of the product so many elements at a time, a buffer that stays in cache...
BLOCK_ELEMENTS = 2**21
# ...for so many rows of x, among which that work is shared.
CHUNK_ROWS = 1024
# So many rows of x from which fp32 products are faster in AMX tiles than PyTorch's.
TILED_F32_ROWS = 128
# As many from which these are faster with a quantised weight too, of which dense blocks are then made in a buffer.
DEQUANTIZED_F32_ROWS = 512
# Up to so many rows, x Wᵀ in 16 bits is made of dot products and as fast as memory, with or without such instructions.
DOT_ROWS = 8

_buffers = threading.local()


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], the last stride 1; a copy only where no view can be."""
    matrix = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def add_scaled(x: Tensor, update: Tensor, scale: float) -> Tensor:
    """x + scale · update, for references, whose update may be a product of matrices."""
    if torch.compiler.is_compiling():
        # Inductor makes one addmm of add(x, a @ b, alpha=scale), and drops the scale (seen with torch 2.13).
        return x + scale * update
    return torch.add(x, update, alpha=scale)


def compute_dtype(x: Tensor, backend: str, *, grad: bool = False) -> torch.dtype:
    """The dtype in which products with x [M, ...] are made: its own, or fp32 where that is much faster.

    PyTorch's 16-bit products on a CPU without instructions for them run at a fifth (x Wᵀ) to a hundredth (grad W)
    of the speed of fp32 ones.

    Args:
        x: the left factor.
        backend: of the op; only "cpu" ever makes them in another dtype.
        grad: whether the product is grad W.
    """
    return torch.float32 if backend == "cpu" and is_slow(x.dtype, x.shape[0], grad=grad) else x.dtype


def is_slow(dtype: torch.dtype, rows: int, *, grad: bool) -> bool:
    """Whether PyTorch's own products with so many rows of this dtype on the CPU are: see `compute_dtype`."""
    return not _has_products(dtype) and (grad or rows > DOT_ROWS)


def multiplies_16_bit(dtype: torch.dtype, backend: str) -> bool:
    """Whether `backend` runs on a CPU with matrix instructions for this 16-bit dtype."""
    return backend == "cpu" and dtype != torch.float32 and _has_products(dtype)


_found: dict[torch.dtype, bool] = {}


def _has_products(dtype: torch.dtype) -> bool:
    """Whether the CPU multiplies matrices of this dtype as fast as it should."""
    if dtype not in _found:
        name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
        _found[dtype] = name is None or bool(getattr(torch.ops.mkldnn, name)())
    return _found[dtype]


def calls_sgemm() -> bool:
    """Whether C++ makes a product of packed fp32 matrices on a CPU as PyTorch would: by its SGEMM.

    Not where the user lets PyTorch make them in bf16 (`torch.set_float32_matmul_precision`).
    """
    return extension.has_sgemm() and _keeps_fp32()


def tiles_f32(rows: int, backend: str) -> bool:
    """Whether `backend` makes products of fp32 matrices with so many rows in AMX tiles, for it does so faster.

    They are as exact as PyTorch's, and not made so where the user lets PyTorch make them in bf16, which is faster yet.
    """
    if backend != "cpu" or rows < TILED_F32_ROWS or torch.compiler.is_compiling():  # which cannot trace the questions
        return False
    return extension.has_amx() and _keeps_fp32()


def _keeps_fp32() -> bool:
    return _fp32_precision() in ("none", "ieee")


_ask_precision = getattr(torch._C, "_get_fp32_precision_getter", None)


def _fp32_precision() -> str:
    if _ask_precision is not None:
        return str(_ask_precision("mkldnn", "matmul"))
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "bf16"  # before PyTorch 2.9


def has_tiles(dtype: torch.dtype, backend: str) -> bool:
    """Whether `backend` has kernels that multiply this dtype in tiles: bfloat16 on a CPU with AMX."""
    return backend == "cpu" and dtype == torch.bfloat16 and extension.has_amx()


def decodes(dtype: torch.dtype, backend: str, rows: int) -> bool:
    """Whether `backend` has kernels that multiply so many rows of this dtype with a quantised weight as they decode it,
    and nothing faster.
    """
    if backend == "cpu" and dtype == torch.float32 and extension.has_avx512():
        return rows < DEQUANTIZED_F32_ROWS or not tiles_f32(rows, "cpu")
    return has_tiles(dtype, backend)


# torch.compile cannot trace an op that returns no tensor. The marker is that of torch.compiler.assume_constant_result,
# which itself would import all of Dynamo. (Of a cached function Dynamo warns.)
_has_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """x Wᵀ + bias + other, rounded once, on a CPU that `multiplies_16_bit` and where nobody asks for a gradient.

    It is what Inductor makes of such a sum; the pass that adds takes a quarter of a product with 64 features.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "add")
    return y


def row_chunks(x: Tensor, dtype: torch.dtype) -> list[slice]:
    """The parts in which rows of x [M, K] are taken: all at once, unless they must be cast to `dtype`. Never none."""
    rows = x.shape[0]
    if dtype == x.dtype:
        return [slice(0, rows)]
    return [slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, max(rows, 1), CHUNK_ROWS)]


def linear(
    out: Tensor, x: Tensor, weight: list[Tensor], backend: str, *, add: bool = False, bias: Tensor | None = None
) -> None:
    """out [M, N] = x Wᵀ, or += with `add`, or x Wᵀ + bias [N] of its dtype; x is [M, K], the tensors are those of W."""
    if weight[0].dtype == out.dtype:
        multiply(out, x, weight[0].t(), backend, add, bias)
        return
    quantised = weights.FORMATS.get(weight[0].dtype)
    if quantised and quantised.takes_small(x, weight, backend):
        target = torch.empty_like(out) if add else out
        quantised.small_linear(x, weight, target, backend, bias)
        if add:
            out += target
        return
    if quantised and decodes(out.dtype, backend, x.shape[0]):
        bias = None if bias is None else bias.float().contiguous()
        views = [extension.view(part) for part in weight]
        extension.module().quantized_linear(
            extension.view(x), views, extension.optional_view(bias), add, extension.view(out), torch.get_num_threads()
        )
        return
    for rows, block in _blocks(weight, out.dtype, backend):
        multiply(out[:, rows], x, block.t(), backend, add, None if bias is None else bias[rows])


def multiply(
    out: Tensor, x: Tensor, factor: Tensor, backend: str, add: bool = False, bias: Tensor | None = None
) -> None:
    """out [M, N] = x factor, or += with `add`, or x factor + bias [N], all of one dtype; factor is [K, N]."""
    in_tiles = out.dtype == torch.float32 and tiles_f32(x.shape[0], backend)
    if in_tiles and x.shape[1] > 0 and x.stride(1) == 1 and 1 in factor.stride():
        bias = None if bias is None else bias.contiguous()
        view, bias_view, threads = extension.view, extension.optional_view(bias), torch.get_num_threads()
        extension.module().product_f32(view(x), view(factor), bias_view, add, view(out), threads)
    elif add:
        torch.addmm(out, x, factor, out=out)
    elif bias is None:
        torch.mm(x, factor, out=out)
    else:  # added where the product is written, not by a pass of its own
        torch.addmm(bias, x, factor, out=out)


def linear_grad(out: Tensor, grad: Tensor, weight: list[Tensor], backend: str, *, add: bool = False) -> None:
    """out [M, K] = grad W, or += with `add`, for grad [M, N] and the tensors of W [N, K]."""
    if weight[0].dtype == out.dtype:
        multiply(out, grad, weight[0], backend, add)
        return
    if weights.shape(weight)[0] == 0 and not add:
        out.zero_()
    if weight[0].dtype in weights.FORMATS and decodes(out.dtype, backend, grad.shape[0]):
        views = [extension.view(part) for part in weight]
        extension.module().quantized_grad(
            extension.view(grad), views, add, extension.view(out), torch.get_num_threads()
        )
        return
    for rows, block in _blocks(weight, out.dtype, backend):
        multiply(out, grad[:, rows], block, backend, add)
        add = True


def _blocks(weight: list[Tensor], dtype: torch.dtype, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Rows of W, which has another dtype or format, in `dtype`, block by block; a block is overwritten by the next."""
    rows, columns = weights.shape(weight)
    quantised = weights.FORMATS.get(weight[0].dtype)
    if rows == 0:
        return
    step = rows
    if weight[0].device.type == "cpu" and dtype == torch.float32:  # in 16 bits each block would round the sum anew
        step = max(1, BLOCK_ELEMENTS // max(columns, 1))
        multiple = quantised.row_step(weight) if quantised else 1
        step = min(rows, -(-step // multiple) * multiple)
    buffer = _buffer(step * columns, dtype, weight[0].device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block = buffer[: (last - first) * columns].view(last - first, columns)
        if quantised:
            quantised.dequantize_rows(weight, first, last, block, backend)
        else:
            block.copy_(weight[0][first:last])
        yield slice(first, last), block


def _buffer(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `size` elements: on a CPU this thread's own, again and again; on CUDA the allocator does that."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    kept: dict[torch.dtype, Tensor] = vars(_buffers).setdefault("kept", {})
    buffer = kept.get(dtype)
    if buffer is None or buffer.numel() < size:
        buffer = kept[dtype] = torch.empty(size, dtype=dtype)
    return buffer
