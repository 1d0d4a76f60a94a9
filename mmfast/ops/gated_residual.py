"""A residual connection whose branch is scaled by the tanh of a trained gate, as in Flamingo."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import backends, crossovers, extension, products
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Elements of x from which the kernel is faster on a CPU: "packed" as `backends.packed` says, with gradients and
# without; else by dtype. 16-bit operands cost the reference copies in fp32.
LEAST = crossovers.CPU.cpu("gated_residual")
KEYS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# What is counted, and the shapes of x, y and gate, for `backends.packed` and `backends.fits`.
PATTERN = "*h *h *h= ~h"


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The definition: out = x + tanh(gate) · y.

    At gate 0 the result is x, bit for bit (but for the sign of a zero, and where y is not finite), and the gate's
    gradient is not zero.

    Args:
        x, y: [..., H] (fp32, fp16, bf16, fp64; any strides), the stream and the branch, of one shape and dtype.
        gate (any floating dtype): one number, of shape [] or [1], or one for each channel, [H].

    Returns:
        [..., H] in the dtype of x, also under autocast.

    Numerics: tanh, product and sum in fp32 (fp64 for fp64), rounded once.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), figure 4: `x = x + tanh(alpha) * attention(...)`.
    """
    factor = torch.tanh(gate.to(torch.promote_types(x.dtype, torch.float32)))
    # With a dimension the factor makes PyTorch promote 16-bit operands to fp32; a number would be rounded to them.
    return (x + factor.reshape(-1) * y).to(x.dtype)


class Call(NamedTuple):
    """The checked arguments, and whether a gradient will be asked for."""

    x: Tensor
    y: Tensor
    gate: Tensor
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.x.device


def check(x: Tensor, y: Tensor, gate: Tensor) -> Call:
    """The arguments of `gated_residual`, checked."""
    where = "gated_residual"
    if x.dim() == 0 or x.shape != y.shape:
        raise ValueError(
            f"{where}: x is {list(x.shape)} and y is {list(y.shape)}; expected one shape [..., H]; project y first"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if y.dtype != x.dtype:
        raise TypeError(f"{where}: x is {x.dtype} and y is {y.dtype}; expected one dtype; cast one")
    if gate.shape not in ((), (1,), x.shape[-1:]):
        raise ValueError(
            f"{where}: gate is {list(gate.shape)} but x {list(x.shape)}; expected [], [1] or [H] = [{x.shape[-1]}]"
        )
    if not gate.dtype.is_floating_point:
        raise TypeError(f"{where}: gate is {gate.dtype}; expected a floating dtype")
    for name, tensor in (("y", y), ("gate", gate)):
        if tensor.device != x.device:
            raise ValueError(f"{where}: {name} is on {tensor.device} but x on {x.device}; move one")
    differentiated = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or gate.requires_grad)
    return Call(x, y, gate, differentiated)


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.x.dtype == torch.float64 else None


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    key = KEYS[call.x.dtype]
    if machine.device == "cpu" and backends.lies_packed(call.x, call.y, call.gate):
        key = "packed backward" if call.differentiated else "packed forward"
    return (Size(key, call.x.numel(), "x has {} elements"),)


OP = Op(
    "gated_residual",
    check,
    (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference")),
    _sizes,
)


def _tanh(gate: Tensor) -> Tensor:
    # Asked first: `to` takes a tenth of a small call, even where it has nothing to do.
    return torch.tanh(gate if gate.dtype == torch.float32 else gate.to(torch.float32))


def _fwd_packed(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """out, of packed tensors."""
    out = torch.empty_like(x)
    extension.module().gated_residual_fwd_cpu(x, y, _tanh(gate), out, torch.get_num_threads())
    return out


def _bwd_packed(grad: Tensor, y: Tensor | None, gate: Tensor, need_y: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of y, if it is needed, and of gate, in fp32, if y is given, of packed tensors."""
    factor = _tanh(gate)
    grad_y = torch.empty_like(grad) if need_y else None
    grad_gate = None if y is None else torch.empty_like(factor)
    extension.module().gated_residual_bwd_cpu(grad, y, factor, grad_y, grad_gate, torch.get_num_threads())
    return grad_y, grad_gate


def _fwd_cpu(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, y, matrix = map(products.as_matrix, (x, y, out))
    extension.module().gated_residual_fwd_cpu(x, y, _tanh(gate), matrix, torch.get_num_threads())
    return out


def _bwd_cpu(grad: Tensor, y: Tensor | None, gate: Tensor, need_y: bool) -> list[Tensor]:
    factor = _tanh(gate)
    grad_y = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_y else None
    grad_gate = None if y is None else torch.empty_like(factor)
    matrices = [None if x is None else products.as_matrix(x) for x in (grad, y, grad_y)]
    kernel = extension.module().gated_residual_bwd_cpu
    kernel(*matrices[:2], factor, matrices[2], grad_gate, torch.get_num_threads())
    return [found for found in (grad_y, grad_gate) if found is not None]


def _fwd_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    from mmfast.kernels.gated_residual import forward

    with torch.cuda.device_of(x):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        x, y, rows_of_out = (products.as_matrix(matrix) for matrix in (x, y, out))
        forward(x, y, _tanh(gate).expand(x.shape[-1]).contiguous(), rows_of_out)
    return out


def _fwd_fake(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_triton(grad: Tensor, y: Tensor | None, gate: Tensor, need_y: bool) -> list[Tensor]:
    from mmfast.kernels.bias_scale_linear import read_grad

    channels = grad.shape[-1]
    with torch.cuda.device_of(grad):
        tanh = _tanh(gate)
        factor = tanh.expand(channels).contiguous()
        grad_y = torch.empty_like(grad, memory_format=torch.contiguous_format) if need_y else None
        sums = None if y is None else torch.zeros_like(factor)
        matrices = [None if matrix is None else products.as_matrix(matrix) for matrix in (grad, y, grad_y)]
        # dy = factor · grad and Σ grad · y, as of a scale on an output.
        read_grad(*matrices[:2], None, factor, matrices[2], None, sums)
        found = [] if grad_y is None else [grad_y]
        if sums is not None:
            total = sums.view_as(gate) if gate.numel() == channels else sums.sum(dtype=torch.float64).float()
            found.append(((1 - tanh**2) * total).view_as(gate))
    return found


def _bwd_fake(grad: Tensor, y: Tensor | None, gate: Tensor, need_y: bool, backend: str) -> list[Tensor]:
    found = [grad.new_empty(grad.shape)] if need_y else []
    return found if y is None else [*found, gate.new_empty(gate.shape, dtype=torch.float32)]


_FWD = backends.define(
    "gated_residual_fwd",
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    _fwd_fake,
    {"cpu": _fwd_cpu, "triton": _fwd_triton},
)
_BWD = backends.define(
    "gated_residual_bwd",
    "(Tensor grad, Tensor? y, Tensor gate, bool need_y) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


class _GatedResidual(torch.autograd.Function):
    """Saves gate, and y if gate needs a gradient. The gradient of x is that of the output, the very tensor.

    No backend is given for packed x and y on the CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, backend: str | None = None) -> Tensor:
        _, need_y, need_gate, *_ = ctx.needs_input_grad
        ctx.save_for_backward(y if need_gate else None, gate if need_y or need_gate else None)
        if backend is None:
            return _fwd_packed(x, y, gate)
        ctx.backend = backend
        return _FWD(x, y, gate, backend)

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        need_x, need_y, need_gate, *backend = ctx.needs_input_grad
        grad_y = grad_gate = None
        if not backend and backends.packed(None, "*h *h *h=? ~h", grad, y, gate) >= 0:
            grad_y, grad_gate = _bwd_packed(grad, y, gate, need_y)
        elif need_y or need_gate:
            found = iter(_BWD(grad, y, gate, need_y, ctx.backend if backend else "cpu"))
            grad_y, grad_gate = next(found) if need_y else None, next(found) if need_gate else None
        if grad_gate is not None and gate.dtype != torch.float32:
            grad_gate = grad_gate.to(gate.dtype)
        return grad if need_x else None, grad_y, grad_gate, None


_APPLY = backends.straight(_GatedResidual)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """x + tanh(gate) · y in one pass: `reference` says what exactly.

    The gradient of x is that of the output, not copied; those of y and gate take one pass over the gradient and y.
    Saves gate, and y if gate needs a gradient. Differentiable once, except on the reference.

    Args:
        x, y: [..., H] (fp32, fp16, bf16; fp64 on the reference; any strides), of one shape and dtype.
        gate (any floating dtype): one number, of shape [] or [1], or one for each channel, [H].
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [..., H] in the dtype of x, also under autocast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: in fp32, rounded once. The gate's gradient is summed in fp32, in parts that are added in a fixed order.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198); see `reference`.
    """
    # What `check` and `OP.select` would find, in less time than a small call takes.
    if (count := backends.packed(backend, PATTERN, x, y, gate)) >= 0:
        differentiated = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or gate.requires_grad)
        if count < LEAST["packed backward" if differentiated else "packed forward"]:
            return reference(x, y, gate)
        return _APPLY(x, y, gate) if differentiated else _fwd_packed(x, y, gate)
    if x.dtype in KEYS and 0 <= backends.fits(backend, PATTERN, x, y, gate) < LEAST[KEYS[x.dtype]]:
        return reference(x, y, gate)
    call = check(x, y, gate)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(x, y, gate)
    if call.differentiated:
        return _GatedResidual.apply(x, y, gate, chosen)
    return _FWD(x, y, gate, chosen)
