"""The product of a SiLU and a second projection, as in the MLP of the Llama family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import backends, crossovers, extension, products
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Elements from which the kernel is faster on a CPU, with a gradient and without; "packed" as `backends.packed` says.
LEAST = crossovers.CPU.cpu("swiglu")
# What is counted, and the shapes of gate and up, for `backends.packed` and `backends.fits`.
PATTERN = "*f *f *f="
# What F.silu and `*` call, and others by names of their own: on the way there goes a fiftieth of a small call.
_silu: Callable[[Tensor], Tensor] = torch._C._nn.silu
_mul, _is_compiling, _is_grad_enabled = torch.mul, torch.compiler.is_dynamo_compiling, torch.is_grad_enabled


def _first_look(*arguments: Any) -> int:
    """`extension.fits`, which from then on takes its place: the extension is loaded when first needed."""
    global _look
    _look = extension.fits()
    return _look(*arguments)


_look: Callable[..., int] = _first_look


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition: out = silu(gate) · up, silu(x) = x / (1 + e^-x).

    Args:
        gate, up: [..., F] (fp32, fp16, bf16, fp64; any strides), of one shape and dtype.

    Returns:
        [..., F] in the dtype of gate and up, also under autocast.

    Numerics: silu in fp32 (fp64 for fp64), rounded to the dtype; the product of that with up, rounded again.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6; huggingface/transformers,
    models/llama/modeling_llama.py, LlamaMLP.forward: `act_fn(gate_proj(x)) * up_proj(x)`.
    """
    return F.silu(gate) * up


class Call(NamedTuple):
    """The checked arguments, and whether a gradient will be asked for."""

    gate: Tensor
    up: Tensor
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.gate.device


def check(gate: Tensor, up: Tensor) -> Call:
    """The arguments of `swiglu`, checked."""
    where = "swiglu"
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(
            f"{where}: gate is {list(gate.shape)} and up is {list(up.shape)}; expected one shape [..., F]; are they "
            "the two halves of one projection?"
        )
    if gate.dtype not in DTYPES:
        raise TypeError(f"{where}: gate is {gate.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{where}: gate is {gate.dtype} and up is {up.dtype}; expected one dtype; cast one")
    if up.device != gate.device:
        raise ValueError(f"{where}: up is on {up.device} but gate on {gate.device}; move one")
    return Call(gate, up, torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad))


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.gate.dtype == torch.float64 else None


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    key = "backward" if call.differentiated else "forward"
    if machine.device == "cpu" and backends.lies_packed(call.gate, call.up):
        key = f"packed {key}"
    return (Size(key, call.gate.numel(), "gate has {} elements"),)


OP = Op("swiglu", check, (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference")), _sizes)


def _fwd_fake(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _bwd_fake(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, backend: str
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for needed in (need_gate, need_up) if needed]


def _fwd_packed(gate: Tensor, up: Tensor) -> Tensor:
    """out, of packed tensors."""
    out = torch.empty_like(gate)
    extension.module().swiglu_fwd_cpu(gate, up, out, torch.get_num_threads())
    return out


def _bwd_packed(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of gate and up that are needed, of packed tensors."""
    grad_gate = torch.empty_like(gate) if need_gate else None
    grad_up = torch.empty_like(gate) if need_up else None
    extension.module().swiglu_bwd_cpu(grad, gate, up, grad_gate, grad_up, torch.get_num_threads())
    return grad_gate, grad_up


def _fwd_cpu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    extension.module().swiglu_fwd_cpu(*map(products.as_matrix, (gate, up, out)), torch.get_num_threads())
    return out


def _bwd_cpu(grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool) -> list[Tensor]:
    grads, matrices = _gradients(grad, gate, up, need_gate, need_up)
    extension.module().swiglu_bwd_cpu(*matrices, torch.get_num_threads())
    return grads


def _fwd_triton(gate: Tensor, up: Tensor) -> Tensor:
    from mmfast.kernels.swiglu import forward

    with torch.cuda.device_of(gate):
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        forward(*map(products.as_matrix, (gate, up, out)))
    return out


def _bwd_triton(grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool) -> list[Tensor]:
    from mmfast.kernels.swiglu import backward

    with torch.cuda.device_of(gate):
        grads, matrices = _gradients(grad, gate, up, need_gate, need_up)
        backward(*matrices)
    return grads


def _gradients(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool
) -> tuple[list[Tensor], list[Any]]:
    """Memory for the gradients that are needed; the matrices grad, gate, up, grad_gate, grad_up of a backward pass."""
    made = [
        torch.empty_like(gate, memory_format=torch.contiguous_format) if needed else None
        for needed in (need_gate, need_up)
    ]
    matrices = [None if x is None else products.as_matrix(x) for x in (grad, gate, up if need_gate else None, *made)]
    return [x for x in made if x is not None], matrices


_FWD = backends.define(
    "swiglu_fwd", "(Tensor gate, Tensor up) -> Tensor", _fwd_fake, {"cpu": _fwd_cpu, "triton": _fwd_triton}
)
_BWD = backends.define(
    "swiglu_bwd",
    "(Tensor grad, Tensor gate, Tensor? up, bool need_gate, bool need_up) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


class _SwiGLU(torch.autograd.Function):
    """Saves its inputs: gate, and up if gate needs a gradient. No backend is given for packed tensors on the CPU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str | None = None) -> Tensor:
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        if backend is None:
            return _fwd_packed(gate, up)
        ctx.backend = backend
        return _FWD(gate, up, backend)

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_gate, need_up, *backend = ctx.needs_input_grad
        gate, up = ctx.saved_tensors
        if not backend and backends.packed(None, "*f *f *f= *f=?", grad, gate, up) >= 0:
            return _bwd_packed(grad, gate, up, need_gate, need_up)
        found = iter(_BWD(grad, gate, up, need_gate, need_up, ctx.backend if backend else "cpu"))
        return next(found) if need_gate else None, next(found) if need_up else None, None


_APPLY = backends.straight(_SwiGLU)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) · up in one pass; its gradients in one pass that reads grad, gate and up: `reference` says what.

    Rows that lie a common stride apart are read in place, as the two halves of a fused gate_up projection do. Saves
    gate, and up if gate needs a gradient: inputs that exist anyway; the sigmoid is computed again. Only gradients that
    are needed are written. Differentiable once, except on the reference.

    Args:
        gate, up: [..., F] (fp32, fp16, bf16; fp64 on the reference; any strides), of one shape and dtype.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [..., F], contiguous, in the dtype of gate and up, also under autocast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: silu is rounded to the dtype before the product, as in eager PyTorch. The gradient of up is grad times
    that rounded silu; the gradient of gate is rounded once. Both in fp32.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202), equation 6; see `reference`.
    """
    # What `check` and `OP.select` would find, in less time than a small call takes: `backends.fits`, written out.
    if backend is None and not (backends._requested or _is_compiling()) and (count := _look(PATTERN, gate, up)) >= 0:
        differentiated = (gate.requires_grad or up.requires_grad) and _is_grad_enabled()
        if count < LEAST["packed backward" if differentiated else "packed forward"]:
            return _mul(_silu(gate), up)
        if extension.packed()(PATTERN, gate, up) >= 0:
            return _APPLY(gate, up) if differentiated else _fwd_packed(gate, up)
        if count < LEAST["backward" if differentiated else "forward"]:
            return reference(gate, up)
    call = check(gate, up)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(gate, up)
    if call.differentiated:
        return _SwiGLU.apply(gate, up, chosen)
    return _FWD(gate, up, chosen)
