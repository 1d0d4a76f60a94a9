"""RMSNorm, alone or of a sum that is wanted as well, as between the blocks of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import backends, extension
from mmfast.ops.backends import Backend, Machine, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# The Triton kernels hold a row in registers, of which backward needs five for each element.
TRITON_WIDTH = 8192


def reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, that of the Llama family.

        h = x + residual                            h = x without one
        y = weight ⊙ (h / sqrt(mean(h²) + eps))     the mean over the last dimension

    Args:
        x: [..., H] (fp32, fp16, bf16, fp64; any strides).
        weight: [H] (fp32, fp16, bf16, fp64).
        eps: added to the mean, at least 0.
        residual: in the shape and dtype of x, or None.

    Returns:
        y [..., H]; with a residual (y, h). h has the dtype of x, y that to which PyTorch promotes weight and x.

    Numerics: h is rounded to the dtype of x, then squared, summed and scaled in fp32 (fp64 for fp64); the scaled h is
    rounded to the dtype of x, and its product with the weight to that of y.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467), equation 4; the places of the
    roundings: huggingface/transformers 5.23, models/llama/modeling_llama.py:61-66.
    """
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = weight * scaled.to(h.dtype)
    return y if residual is None else (y, h)


class Call(NamedTuple):
    """The checked arguments, and whether a gradient will be asked for."""

    x: Tensor
    weight: Tensor
    eps: float
    residual: Tensor | None
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.x.device


def check(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> Call:
    """The arguments of `rms_norm`, checked."""
    where = "rms_norm"
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{where}: x is {list(x.shape)} and weight is {list(weight.shape)}; expected [..., H] and [H]; "
            "was the weight made for another layer?"
        )
    if x.dtype not in DTYPES or weight.dtype not in DTYPES:
        name, dtype = ("x", x.dtype) if x.dtype not in DTYPES else ("weight", weight.dtype)
        raise TypeError(f"{where}: {name} is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if weight.device != x.device:
        raise ValueError(f"{where}: weight is on {weight.device} but x on {x.device}; move one")
    if not eps >= 0:
        raise ValueError(f"{where}: eps is {eps}; expected at least 0")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(
                f"{where}: residual is {list(residual.shape)} but x {list(x.shape)}; expected one shape; expand one"
            )
        if residual.dtype != x.dtype:
            raise TypeError(f"{where}: residual is {residual.dtype} but x {x.dtype}; expected one dtype; cast one")
        if residual.device != x.device:
            raise ValueError(f"{where}: residual is on {residual.device} but x on {x.device}; move one")
    trained = x.requires_grad or weight.requires_grad or (residual is not None and residual.requires_grad)
    return Call(x, weight, eps, residual, trained and torch.is_grad_enabled())


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if torch.float64 in (call.x.dtype, call.weight.dtype) else None


def _triton_cannot(call: Call, machine: Machine) -> str | None:
    width = call.x.shape[-1]
    if width > TRITON_WIDTH or (width > TRITON_WIDTH // 2 and width % 16):
        half = TRITON_WIDTH // 2
        return f"H is {width}; the kernel takes at most {half}, or {TRITON_WIDTH} in multiples of 16"
    return _no_float64(call, machine)


OP = Op(
    "rms_norm",
    check,
    (Backend("cpu", _no_float64), Backend("triton", _triton_cannot), Backend("reference")),
)


class Steps(NamedTuple):
    """What a backend is. Tensors are contiguous; the weight has the dtype of x, or is fp32; y has the weight's dtype.

    Attributes:
        forward: (x, weight, residual, eps, y, sum, rstd): the last two if they are given, sum with a residual.
        backward: (grad_y, grad_sum, h, weight, rstd, grad_x, grad_weight): the last two, of which the last is fp32
            [H], if they are given; grad_sum may be None.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


def _forward_cpu(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    y: Tensor,
    total: Tensor | None,
    rstd: Tensor | None,
) -> None:
    view, optional_view = extension.view, extension.optional_view
    extension.module().rms_norm_fwd_cpu(
        view(x),
        view(weight),
        optional_view(residual),
        eps,
        view(y),
        optional_view(total),
        optional_view(rstd),
        torch.get_num_threads(),
    )


def _backward_cpu(*tensors: Tensor | None) -> None:
    extension.module().rms_norm_bwd_cpu(*map(extension.optional_view, tensors), torch.get_num_threads())


def _forward_triton(x: Tensor, *arguments: Any) -> None:
    from mmfast.kernels.rms_norm import forward

    with torch.cuda.device_of(x):
        forward(x, *arguments)


def _backward_triton(grad_y: Tensor, *tensors: Tensor | None) -> None:
    from mmfast.kernels.rms_norm import backward

    with torch.cuda.device_of(grad_y):
        backward(grad_y, *tensors)


STEPS = {"cpu": Steps(_forward_cpu, _backward_cpu), "triton": Steps(_forward_triton, _backward_triton)}


def _factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight as the kernels take it: in the dtype of x, or in fp32, to which any other pair is promoted."""
    return (weight if weight.dtype == dtype else weight.float()).contiguous()


def _fwd(backend: str, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, keep_rstd: bool) -> list[Tensor]:
    """y; the sum, if there is a residual; rstd [rows], if it is to be kept."""
    x, weight = x.contiguous(), _factor(weight, x.dtype)
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x, dtype=weight.dtype)
    total = None if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) if keep_rstd else None
    STEPS[backend].forward(x, weight, residual, eps, y, total, rstd)
    return [found for found in (y, total, rstd) if found is not None]


def _fwd_fake(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, keep_rstd: bool, backend: str
) -> list[Tensor]:
    found = [x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))]
    if residual is not None:
        found.append(x.new_empty(x.shape))
    if keep_rstd:
        found.append(x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32))
    return found


def _bwd(
    backend: str,
    grad_y: Tensor,
    grad_sum: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    """The gradients of h and of the weight, in their dtypes: those that are needed."""
    h = h.contiguous()
    grad_h = torch.empty_like(h) if need_x else None
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    STEPS[backend].backward(grad_y.contiguous(), grad_sum, h, _factor(weight, h.dtype), rstd, grad_h, grad_weight)
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype)
    return [found for found in (grad_h, grad_weight) if found is not None]


def _bwd_fake(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> list[Tensor]:
    found = [h.new_empty(h.shape)] if need_x else []
    return [*found, weight.new_empty(weight.shape)] if need_weight else found


_FWD = backends.define(
    "rms_norm_fwd",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, bool keep_rstd) -> Tensor[]",
    _fwd_fake,
    {name: partial(_fwd, name) for name in STEPS},
)
_BWD = backends.define(
    "rms_norm_bwd",
    "(Tensor grad_y, Tensor? grad_sum, Tensor h, Tensor weight, Tensor rstd, bool need_x, bool need_weight) "
    "-> Tensor[]",
    _bwd_fake,
    {name: partial(_bwd, name) for name in STEPS},
)


class _RMSNorm(torch.autograd.Function):
    """Saves what was normalised, an output or an input of the op, and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, backend: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        # An output that nothing is made of has no gradient, rather than one of zeros.
        ctx.set_materialize_grads(False)
        y, *total, rstd = _FWD(x, weight, residual, eps, True, backend)
        ctx.save_for_backward(*(total or [x]), weight, rstd)
        ctx.backend = backend
        return (y, *total) if total else y

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None = None) -> tuple[Tensor | None, ...]:
        need_x, need_weight, need_residual, *_ = ctx.needs_input_grad
        need_h = need_x or need_residual
        grad_h, grad_weight = grad_sum, None
        if grad_y is not None and (need_h or need_weight):
            h, weight, rstd = ctx.saved_tensors
            found = iter(_BWD(grad_y, grad_sum, h, weight, rstd, need_h, need_weight, ctx.backend))
            grad_h = next(found) if need_h else None
            grad_weight = next(found) if need_weight else None
        # One tensor for both, as PyTorch's own addition gives.
        return grad_h if need_x else None, grad_weight, grad_h if need_residual else None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None, *, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """weight ⊙ h / sqrt(mean(h²) + eps), with h = x + residual if there is one: `reference` says what exactly.

    One pass forward, which makes the sum as well, and one backward, which adds the sum's own gradient. Saved for
    backward: h, which is an output or x itself, and one fp32 number a row. A frozen weight costs nothing.
    Differentiable once, except on the reference.

    Args:
        x: [..., H] (fp32, fp16, bf16; fp64 on the reference; any strides, any number of rows).
        weight: [H] (any of these dtypes), frozen or trained.
        eps: added to the mean, at least 0.
        residual: added to x first; in the shape and dtype of x, or None.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        y [..., H] in the dtype to which PyTorch promotes weight and x, also under autocast. With a residual: (y, h).

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: rounded where transformers' LlamaRMSNorm rounds. Sums in fp32. Deterministic, on any number of threads.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    call = check(x, weight, eps, residual)
    chosen = OP.select(call, backends.machine(x.device), backend)
    if chosen == "reference":
        return reference(x, weight, eps, residual)
    if call.differentiated:
        return _RMSNorm.apply(x, weight, residual, eps, chosen)
    y, *total = _FWD(x, weight, residual, eps, False, chosen)
    return (y, *total) if total else y
