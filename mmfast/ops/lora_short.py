"""The short ways through `lora_linear` on a CPU, for one adapter and no dropout.

Python that runs between two large products is read from memory, for they leave nothing of it in the caches: what an
op's check, its choice and its steps take so, 1 to 2 ms each way, is more than a small product does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import backends, crossovers, extension, low_rank, products

LEAST = crossovers.CPU.cpu("lora_linear")

# Up to so many rows without a gradient, dot products with the rows of W read it as fast as memory gives it.
MOST_DOTS = 2

# By names of their own: to look them up in a package, with caches cold, takes a part of a small call's time.
_linear, _fits, _is_compiling = F.linear, extension.fits, torch.compiler.is_dynamo_compiling


def attempt(
    x: Tensor, weight: Any, lora_a: Any, lora_b: Any, scaling: Any, bias: Tensor | None, backend: str | None
) -> Tensor | None:
    """`lora_linear` where a check could find nothing and a short way serves; else None."""
    if not isinstance(scaling, float) or torch._C._is_any_autocast_enabled():
        return None
    if not isinstance(weight, Tensor):
        return _of_quantized_row(x, weight, lora_a, lora_b, scaling, bias, backend)
    if backend is not None or backends._requested or _is_compiling():
        return None
    # `backends.fits`, written out: a function of Python takes a hundredth of a small call.
    if (rows := _fits()("* *k nk= rk nr n?", x, weight, lora_a, lora_b, bias)) < 0:
        return None
    arguments, tensors = (x, weight, lora_a, lora_b, scaling, bias), (x, weight, lora_a, lora_b, bias)
    is_fp32 = x.dtype is torch.float32
    if (
        rows <= MOST_DOTS
        and not _is_differentiated(*tensors)
        and _takes_dots(x, lora_a, lora_b)
        and backends.packed(None, "* *k nk= rk nr n=?", *tensors) >= 0
    ):
        return _of_dots(*arguments)
    # At least what `_is_faster` asks.
    if rows >= LEAST["rows"] or (
        is_fp32 and rows >= LEAST["packed rows"] and rows * weight.numel() >= LEAST["packed work"]
    ):
        differentiated = _is_differentiated(*tensors)
        packed = backends.packed(None, "* *k nk= rk= nr= n=?", *tensors) >= 0
        if packed and not weight.requires_grad and _is_faster(rows, x, weight, lora_a, differentiated):
            return _APPLY(*arguments) if differentiated else _forward(*arguments)[0]
    if rows < LEAST["rows"] and (is_fp32 or not products.is_slow(x.dtype, rows, grad=torch.is_grad_enabled())):
        return _of_few_rows(*arguments)
    return None


def _is_faster(rows: int, x: Tensor, weight: Tensor, lora_a: Tensor, differentiated: bool) -> bool:
    """Whether one call of C++ each way is, for packed tensors."""
    if x.dtype == torch.float32 and _with_weight(x.dtype, rows)[0]:
        return all(count >= LEAST[key] for key, count in packed_counts(rows, weight, len(lora_a)).items())
    size, way = rows * len(weight), "backward" if differentiated else "forward"
    return rows >= LEAST["rows"] and size >= LEAST[way] and (x.dtype == torch.float32 or _in_tiles(x, weight))


# What `packed_counts` counts, for those who read why a backend was chosen.
COUNTED = {
    "packed rows": "the number of rows is {}",
    "packed rows per rank": "the number of rows for each rank is {}",
    "tiled rows per rank": "the number of rows for each rank is {}",
    "packed work": "rows · K · N is {}",
    "packed share": "K · N / (R · (K + N)) is {}",
}


def packed_counts(rows: int, weight: Tensor, ranks: int) -> dict[str, int]:
    """What is counted of packed fp32 tensors, by its name in `LEAST`."""
    columns, features = weight.shape
    return {
        "packed rows": rows,
        "tiled rows per rank" if products.tiles_f32(rows, "cpu") else "packed rows per rank": rows // ranks,
        "packed work": rows * columns * features,
        "packed share": columns * features // (ranks * (columns + features)),
    }


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _takes_dots(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    return lora_a.dtype == lora_b.dtype and lora_a.dtype in (x.dtype, torch.float32)


def _of_dots(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """All in one kernel, rounded once."""
    y, threads = x.new_empty((*x.shape[:-1], len(weight))), torch.get_num_threads()
    extension.module().lora_linear_rows_cpu(x, weight, lora_a, lora_b, scaling, bias, y, threads)
    return y


def _of_quantized_row(
    x: Tensor, weight: Any, lora_a: Any, lora_b: Any, scaling: float, bias: Tensor | None, backend: str | None
) -> Tensor | None:
    """The weight's own kernel for one row, to which the update is added."""
    if backends.packed(backend, "* *k rk nr n=?", x, lora_a, lora_b, bias) != 1:
        return None
    if _is_differentiated(x, lora_a, lora_b, bias) or not _takes_dots(x, lora_a, lora_b):
        return None
    y, threads = x.new_empty((*x.shape[:-1], len(lora_b))), torch.get_num_threads()
    if not extension.quantized_linear_row()(x, weight, None if bias is None else bias.float(), y, threads):
        return None
    extension.module().lora_linear_rows_cpu(x, None, lora_a, lora_b, scaling, None, y, threads)
    return y


def _of_few_rows(x: Tensor, weight: Any, lora_a: Any, lora_b: Any, scaling: Any, bias: Tensor | None) -> Tensor:
    """The reference in as few steps as there can be."""
    dtype = x.dtype
    if lora_a.dtype is not dtype or lora_b.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        lora_a, lora_b, bias = lora_a.to(dtype), lora_b.to(dtype), None if bias is None else bias.to(dtype)
    return _linear(x, weight, bias).add(_linear(_linear(x, lora_a), lora_b), alpha=scaling)


def _in_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether both large products are made by one kernel with the low-rank ones."""
    matrix = x.flatten(0, -2)
    return all(low_rank.fused_is_faster("cpu", matrix, [weight], columns) for columns in weight.shape)


def _with_weight(dtype: torch.dtype, rows: int) -> tuple[bool, bool]:
    """Whether C++ makes the large product too, and whether in tiles."""
    in_tiles = dtype != torch.float32 or products.tiles_f32(rows, "cpu")
    return in_tiles or products.calls_sgemm(), in_tiles


def _forward(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [..., N] and s [rows, R]."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    s = x.new_empty((x.numel() // x.shape[-1], lora_a.shape[0]))
    with_weight, in_tiles = _with_weight(x.dtype, len(s))
    kernel, threads = extension.module().lora_linear_fwd_cpu, torch.get_num_threads()
    kernel(x, weight if with_weight else None, lora_a, lora_b, scaling, bias, s, y, in_tiles, threads)
    if not with_weight:
        products.linear(y.flatten(0, -2), x.flatten(0, -2), [weight], "cpu", add=True)
    return y, s


class _Packed(torch.autograd.Function):
    """Saves what `_LoRALinear` does: x if A is trained, s if B is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, bias: Tensor | None
    ) -> Tensor:
        y, s = _forward(x, weight, lora_a, lora_b, scaling, bias)
        _, _, need_a, need_b, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_a else None, s if need_b else None, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return y

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, lora_a, lora_b = ctx.saved_tensors
        need_x, _, need_a, need_b, _, need_bias = ctx.needs_input_grad
        if backends.packed(None, "*n *n nr=", grad, lora_b) < 0:
            op = torch.ops.mmfast.lora_linear_bwd
            lists = [weight], [1], [lora_a], [lora_b], [ctx.scaling]
            needs = need_x, need_a, [False], [need_b], [need_bias]
            grad_x, grad_a, _, grad_b, grad_bias = op([grad], x, s, *lists, 0, None, *needs, "cpu")
            grad_x = grad_x if need_x else None
            grad_a, grad_b = grad_a.to(grad.dtype) if need_a else None, grad_b.to(grad.dtype) if need_b else None
            grad_bias = grad_bias if need_bias else None
        else:
            grad_x = grad.new_empty((*grad.shape[:-1], weight.shape[1])) if need_x else None
            grad_a = torch.empty_like(lora_a) if need_a else None
            grad_b = torch.empty_like(lora_b) if need_b else None
            grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32) if need_bias else None
            with_weight, in_tiles = _with_weight(grad.dtype, grad.numel() // grad.shape[-1])
            kernel, threads = extension.module().lora_linear_bwd_cpu, torch.get_num_threads()
            parts = x, s, weight if with_weight else None, lora_a, lora_b, ctx.scaling, grad_x, grad_a, grad_b
            if need_x or need_a or need_b:
                kernel(grad, *parts, in_tiles, threads)
            if grad_x is not None and not with_weight:
                products.linear_grad(grad_x.flatten(0, -2), grad.flatten(0, -2), [weight], "cpu", add=True)
        if grad_bias is not None and grad_bias.dtype != grad.dtype:
            grad_bias = grad_bias.to(grad.dtype)
        return grad_x, None, grad_a, grad_b, None, grad_bias


_APPLY = backends.straight(_Packed)
