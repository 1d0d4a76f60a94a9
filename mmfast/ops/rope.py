"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import backends, crossovers, extension
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Elements of q and k from which, in fp16, the kernel is faster on a CPU, without a gradient and with one: PyTorch
# converts fp16 by instructions that the kernel cannot assume. All else is faster at every size, one token included.
LEAST = crossovers.CPU.cpu("rope")


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, that of the Llama family; the same for q and k.

        q' = q ⊙ cos + rotate_half(q) ⊙ sin        rotate_half((x₁, x₂)) = (-x₂, x₁) of the halves of the last dimension

    Args:
        q, k: [B, num_heads, L, D] and [B, num_key_value_heads, L, D] (fp32, fp16, bf16, fp64; any strides; D even).
        cos, sin: [B or 1, L, D] (one of these dtypes), for every element, both halves, which need not be equal.

    Returns:
        q', k' in the shapes of q and k and the dtype to which PyTorch promotes theirs and that of cos.

    Numerics: both products and their sum are rounded to the dtype of the result.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), equation 34, with the pairs (d, d + D/2) of GPT-NeoX;
    huggingface/transformers 5.23, models/llama/modeling_llama.py:119-149.
    """
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Call(NamedTuple):
    """The checked arguments, and whether a gradient will be asked for."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.q.device


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """The arguments of `rope`, checked."""
    where = "rope"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"{where}: q is {list(q.shape)} and k is {list(k.shape)}; expected [B, num_heads, L, D] and "
            "[B, num_key_value_heads, L, D]"
        )
    batch, _, length, width = q.shape
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise ValueError(
            f"{where}: cos is {list(cos.shape)} and sin is {list(sin.shape)}; expected [B or 1, L, D] = "
            f"[{batch} or 1, {length}, {width}] for q {list(q.shape)}"
        )
    if cos.shape[2] != width or width % 2:
        raise ValueError(
            f"{where}: cos has {cos.shape[2]} elements a token and q heads of {width}; expected one even number; "
            "for a partial rotary embedding, pass only the part of q and k that is rotated"
        )
    if q.dtype not in DTYPES or cos.dtype not in DTYPES:
        name, dtype = ("q", q.dtype) if q.dtype not in DTYPES else ("cos", cos.dtype)
        raise TypeError(f"{where}: {name} is {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if k.dtype != q.dtype or sin.dtype != cos.dtype:
        pair = ("q", q.dtype, "k", k.dtype) if k.dtype != q.dtype else ("cos", cos.dtype, "sin", sin.dtype)
        raise TypeError("{}: {} is {} and {} is {}; expected one dtype; cast one".format(where, *pair))
    for name, tensor in (("k", k), ("cos", cos), ("sin", sin)):
        if tensor.device != q.device:
            raise ValueError(f"{where}: {name} is on {tensor.device} but q on {q.device}; move one")
    trained = q.requires_grad or k.requires_grad or cos.requires_grad or sin.requires_grad
    return Call(q, k, cos, sin, trained and torch.is_grad_enabled())


def _cannot(call: Call, machine: Machine) -> str | None:
    if torch.float64 in (call.q.dtype, call.cos.dtype):
        return "there is no float64 kernel"
    if call.differentiated and (call.cos.requires_grad or call.sin.requires_grad):
        return "cos or sin wants a gradient, which only the reference gives"
    return None


def _key(differentiated: bool) -> str:
    return "float16 backward" if differentiated else "float16 forward"


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    if not call.q.dtype == call.cos.dtype == torch.float16:
        return ()
    return (Size(_key(call.differentiated), call.q.numel() + call.k.numel(), "q and k have {} elements of fp16"),)


def _is_small(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str | None) -> bool:
    """Whether `OP.select` would take the reference for a call whose mistakes, if it has any, PyTorch's ops find."""
    if not q.dtype == k.dtype == cos.dtype == sin.dtype == torch.float16:
        return False
    if q.numel() + k.numel() >= LEAST[_key(torch.is_grad_enabled() and (q.requires_grad or k.requires_grad))]:
        return False
    # Shapes that broadcasting could let pass are left to the check.
    shape = cos.shape[1:]
    alike = q.dim() == k.dim() == 4 and cos.dim() == 3 and sin.shape == cos.shape
    return alike and q.shape[2:] == k.shape[2:] == shape and backends.plain((q, k, cos, sin), backend)


OP = Op("rope", check, (Backend("cpu", _cannot), Backend("triton", _cannot), Backend("reference")), _sizes)


def _cpu(tensors: list[Tensor], cos: Tensor, sin: Tensor, results: list[Tensor], adjoint: bool) -> None:
    view = extension.view
    extension.module().rope_cpu(
        [view(x) for x in tensors], view(cos), view(sin), [view(y) for y in results], adjoint, torch.get_num_threads()
    )


def _triton(tensors: list[Tensor], cos: Tensor, sin: Tensor, results: list[Tensor], adjoint: bool) -> None:
    from mmfast.kernels.rope import rotate

    with torch.cuda.device_of(cos):
        rotate(tensors, cos, sin, results, adjoint)


KERNELS = {"cpu": _cpu, "triton": _triton}


def _rotate(
    backend: str, tensors: list[Tensor], cos: Tensor, sin: Tensor, dtype: torch.dtype, adjoint: bool
) -> list[Tensor]:
    """The tensors [B, heads, L, D] rotated, or what the adjoint makes of gradients; in `dtype`, each in its layout."""
    results = _rotate_fake(tensors, cos, sin, dtype, adjoint)
    if dtype != cos.dtype or any(x.dtype != cos.dtype for x in tensors):
        # Two dtypes are promoted to a third or to the wider one: fp32 in either case.
        cos, sin = cos.float(), sin.float()
    cos, sin, *tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin, *tensors))
    KERNELS[backend](tensors, cos, sin, results, adjoint)
    return results


def _rotate_fake(
    tensors: list[Tensor], cos: Tensor, sin: Tensor, dtype: torch.dtype, adjoint: bool, backend: str = ""
) -> list[Tensor]:
    return [torch.empty_like(x if x.stride(-1) == 1 else x.contiguous(), dtype=dtype) for x in tensors]


_ROTATE = backends.define(
    "rope_rotate",
    "(Tensor[] tensors, Tensor cos, Tensor sin, ScalarType dtype, bool adjoint) -> Tensor[]",
    _rotate_fake,
    {name: partial(_rotate, name) for name in KERNELS},
)


class _Rope(torch.autograd.Function):
    """Linear in q and k, so that nothing is saved but cos and sin."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.settings = q.dtype, backend
        turned_q, turned_k = _ROTATE([q, k], cos, sin, torch.promote_types(q.dtype, cos.dtype), False, backend)
        return turned_q, turned_k

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
        need_q, need_k, *_ = ctx.needs_input_grad
        wanted = (grad_q if need_q else None, grad_k if need_k else None)
        grads = [grad for grad in wanted if grad is not None]
        if not grads:
            return None, None, None, None, None
        cos, sin = ctx.saved_tensors
        dtype, backend = ctx.settings
        found = iter(_ROTATE(grads, cos, sin, dtype, True, backend))
        return *(None if grad is None else next(found) for grad in wanted), None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """x ⊙ cos + rotate_half(x) ⊙ sin of queries and keys: `reference` says what exactly.

    One pass over q and k, in any layout: what is a transposed view of [B, L, heads, D] is read where it lies, and the
    result lies in memory as its input does. Saved for backward: cos and sin. The gradient is the adjoint, the rotation
    by the opposite angle. Differentiable once, except on the reference.

    Args:
        q, k: [B, num_heads, L, D] and [B, num_key_value_heads, L, D] (fp32, fp16, bf16; fp64 on the reference; D even).
        cos, sin: [B or 1, L, D] (any of these dtypes), all D, as transformers passes them. Where they want a gradient
            the reference runs.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        (q', k') in the dtype to which PyTorch promotes q and cos, also under autocast: fp32 for bf16 and fp32.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: rounded where transformers' apply_rotary_pos_emb rounds; the same bits on the CPU.

    Source: Su et al., "RoFormer" (arXiv 2104.09864).
    """
    if _is_small(q, k, cos, sin, backend):
        return backends.checked_late(reference, check, q, k, cos, sin)
    call = check(q, k, cos, sin)
    chosen = OP.select(call, backends.machine(q.device), backend)
    if chosen == "reference":
        return reference(q, k, cos, sin)
    if call.differentiated:
        return _Rope.apply(q, k, cos, sin, chosen)
    turned_q, turned_k = _ROTATE([q, k], cos, sin, torch.promote_types(q.dtype, cos.dtype), False, chosen)
    return turned_q, turned_k
