"""y = x Wᵀ + bias with a frozen, quantised W: what `nf4_linear` and `int8_linear` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, extension, products, weights
from mmfast.ops.backends import Backend, Machine, Op
from mmfast.ops.weights import QuantizedWeight

# Of a small call, by names of their own: to look them up in a package, with caches cold, takes a part of its time.
_cpu_row = extension.quantized_linear_row
_is_compiling, _is_autocast = torch.compiler.is_dynamo_compiling, torch._C._is_any_autocast_enabled

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def reference(x: Tensor, q: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The definition: dequantise, in the dtype of x, then `F.linear`. Differentiable in x and bias, twice too.

    Args:
        x: [..., K] (fp32, fp16, bf16, fp64; any strides; any leading size may be 0).
        q: the weight [N, K]. It never gets a gradient.
        bias: [N] (any floating dtype), cast to that of x.

    Returns:
        [..., N] in the dtype of x.

    Source: bitsandbytes, nn/modules.py (Linear4bit) and autograd/_functions.py (MatMul4Bit).
    """
    return F.linear(x, weights.dense(q, x.dtype), None if bias is None else bias.to(x.dtype))


class Call(NamedTuple):
    """The checked arguments, x cast as autocast asks."""

    x: Tensor
    q: QuantizedWeight
    bias: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.x.device


def check(where: str, x: Tensor, q: QuantizedWeight, bias: Tensor | None) -> Call:
    """The arguments of a quantised linear; `q` was checked before."""
    rows, columns = q.shape
    if x.dim() < 1 or x.shape[-1] != columns:
        raise ValueError(
            f"{where}: x has shape {list(x.shape)} but the weight [N, K] = [{rows}, {columns}]; "
            f"expected [..., {columns}]"
        )
    for name, other in (("the weight", q), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{where}: {name} is on {other.device} but x on {x.device}; move one")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}; expected {', '.join(map(str, DTYPES))}")
    if bias is not None:
        if bias.shape != (rows,):
            raise ValueError(f"{where}: bias has shape {list(bias.shape)}; expected [N] = [{rows}]")
        if not bias.is_floating_point():
            raise TypeError(f"{where}: bias is {bias.dtype}; expected a floating dtype")
    return Call(x, q, bias)


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.x.dtype == torch.float64 else None


BACKENDS = (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference"))


def _fwd_fake(x: Tensor, weight: list[Tensor], bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weights.shape(weight)[0]))


def _bwd_fake(grad: Tensor, weight: list[Tensor], backend: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], weights.shape(weight)[1]))


def _fwd(backend: str) -> Callable[[Tensor, list[Tensor], Tensor | None], Tensor]:
    def run(x: Tensor, weight: list[Tensor], bias: Tensor | None) -> Tensor:
        form = weights.FORMATS[weight[0].dtype]
        rows = form.shape(weight)[0]
        out = x.new_empty((*x.shape[:-1], rows))
        if out.numel() == 0:
            return out
        target = out
        if x.dim() != 2 or not x.is_contiguous():  # asked first: a view that changes nothing costs a small call as much
            x, target = x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, rows)
        if form.takes_small(x, weight, backend):
            form.small_linear(x, weight, target, backend, bias)
            return out
        dtype = products.compute_dtype(x, backend)
        bias = None if bias is None else bias.to(dtype)
        for chunk in products.row_chunks(x, dtype):
            part = target[chunk] if dtype == x.dtype else torch.empty((chunk.stop - chunk.start, rows), dtype=dtype)
            products.linear(part, x[chunk].to(dtype), weight, backend, bias=bias)
            if dtype != x.dtype:
                target[chunk] = part
        return out

    return run


def _bwd(backend: str) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def run(grad: Tensor, weight: list[Tensor]) -> Tensor:
        rows, columns = weights.shape(weight)
        out = torch.empty((*grad.shape[:-1], columns), dtype=grad.dtype, device=grad.device)
        if out.numel() == 0:
            return out
        grad, target = grad.reshape(-1, rows).contiguous(), out.view(-1, columns)
        dtype = products.compute_dtype(grad, backend, grad=True)
        for chunk in products.row_chunks(grad, dtype):
            same = dtype == grad.dtype
            part = target[chunk] if same else torch.empty((chunk.stop - chunk.start, columns), dtype=dtype)
            products.linear_grad(part, grad[chunk].to(dtype), weight, backend)
            if not same:
                target[chunk] = part
        return out

    return run


_FWD = backends.define(
    "quantized_linear_fwd",
    "(Tensor x, Tensor[] weight, Tensor? bias) -> Tensor",
    _fwd_fake,
    {name: _fwd(name) for name in ("cpu", "triton")},
)
_BWD = backends.define(
    "quantized_linear_bwd",
    "(Tensor grad, Tensor[] weight) -> Tensor",
    _bwd_fake,
    {name: _bwd(name) for name in ("cpu", "triton")},
)


class _QuantizedLinear(torch.autograd.Function):
    """Linear in x, so that nothing is saved but the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, backend: str, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.backend, ctx.bias_dtype = backend, None if bias is None else bias.dtype
        return _FWD(x, list(weight), bias, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = list(ctx.saved_tensors)
        grad_x = _BWD(grad, weight, ctx.backend) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, *(None for _ in weight)


def _row(x: Tensor, q: Any, bias: Tensor | None, form: type[Any]) -> Tensor | None:
    """The result for one row on a CPU without gradients, if nothing is wrong and nobody listens; else None.

    What `OP.check`, `OP.select` and `_FWD` would find and do, in less time than F.linear takes with a small weight.
    """
    if (
        _is_compiling()
        or backends._requested
        or type(x) not in backends._PLAIN
        or type(q) is not form
        or x.shape[:-1].numel() != 1
        or not x.is_cpu
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _is_autocast()
        or extension.overheard()()
    ):
        return None
    out = x.new_empty((*x.shape[:-1], q[0].shape[0]))
    return out if _cpu_row()(x, q, bias, out, torch.get_num_threads()) else None


def run(op: Op, form: type[Any], x: Tensor, q: QuantizedWeight, bias: Tensor | None, backend: str | None) -> Tensor:
    """The body of `nf4_linear` and `int8_linear`, whose weights are of the class `form`."""
    out = None if backend else _row(x, q, bias, form)
    if out is not None:
        return out
    call = op.check(x, q, bias)
    chosen = op.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call)
    parts = call.q.tensors()
    wanted = call.x.requires_grad or (call.bias is not None and call.bias.requires_grad)
    if torch.is_grad_enabled() and wanted:
        return cast(Tensor, _QuantizedLinear.apply(call.x, call.bias, chosen, *parts))
    return cast(Tensor, _FWD(call.x, parts, call.bias, chosen))
