"""Steps of mixture_adapter on a merged expert for each sample: y = x + h U_bᵀ + b_b, h = drop(act(x Aᵀ + a)).

They check nothing. Numbers tell how ranks are grouped (`groups`) and to how many projections they belong (`downs`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, extension

# The C++ kernels work on columns by the vector: those of each group are padded to a multiple of this.
CPU_LANES = 32


class _Mix(torch.autograd.Function):
    """weights [B, K] @ table [K, N], N large. The gradient of the weights is a long sum in which much cancels: by a
    reduction, which adds pairwise and in the same order on any number of threads, not by a matrix product."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(weights, table)
        return weights @ table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights, table = ctx.saved_tensors
        need_weights, need_table = ctx.needs_input_grad
        sums = torch.stack([(grad * row).sum(1) for row in table], 1) if need_weights else None
        return sums, weights.t() @ grad if need_table else None


def merge(up_weight: Tensor, up_bias: Tensor | None, router: Tensor | None, scale: float, downs: int) -> Tensor:
    """The experts as one, in fp32: [B, P + 1, H], the P ranks that a channel sees of all projections, then the bias.

    Its gradient is that of every expert and of the router: PyTorch makes it. With `downs` projections expert k has
    the k-th part of the ranks; with one, all experts share them.
    """
    rows = up_weight.float().transpose(1, 2)
    bias = rows.new_zeros((rows.shape[0], rows.shape[2])) if up_bias is None else up_bias.float()
    if router is None:
        return torch.cat([rows, bias[:, None]], 1) * scale
    weights = router.float() * scale
    if downs == 1:
        return _Mix.apply(weights, torch.cat([rows, bias[:, None]], 1).flatten(1)).unflatten(1, (-1, rows.shape[2]))
    return torch.cat([(weights[:, :, None, None] * rows).flatten(1, 2), (weights @ bias)[:, None]], 1)


def _fwd_fake(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    keep: bool,
    backend: str,
) -> list[Tensor]:
    y = x.new_empty(x.shape)
    return [y, x.new_empty((x.shape[0] * x.shape[1], down.shape[0]), dtype=torch.float32)] if keep else [y]


def _bwd_fake(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    down: Tensor,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    need_x: bool,
    need_down: bool,
    need_bias: bool,
    need_up: bool,
    backend: str,
) -> list[Tensor]:
    return [part for part in _gradients(grad, down, up, need_x, need_down, need_bias, need_up) if part is not None]


def _gradients(
    grad: Tensor, down: Tensor, up: Tensor, need_x: bool, need_down: bool, need_bias: bool, need_up: bool
) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of x, in its dtype, and of `down`, its bias and `up`, in fp32: those that are needed."""

    def fp32(shape: tuple[int, ...] | torch.Size, need: bool) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=grad.device) if need else None

    grad_x = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if need_x else None
    return grad_x, fp32(down.shape, need_down), fp32(down.shape[:1], need_bias), fp32(up.shape, need_up)


def _padded(factors: Tensor, groups: int) -> Tensor:
    """[..., H] in fp32, packed, the columns of each group padded by zeros to a multiple of `CPU_LANES`."""
    missing = -(factors.shape[-1] // groups) % CPU_LANES
    if missing:
        factors = F.pad(factors.unflatten(-1, (groups, -1)), (0, missing)).flatten(-2)
    return factors.float().contiguous()


def _cropped(factors: Tensor, groups: int, columns: int) -> Tensor:
    """The inverse of `_padded`."""
    if factors.shape[-1] == columns:
        return factors
    return factors.unflatten(-1, (groups, -1))[..., : columns // groups].flatten(-2)


def _fwd_cpu(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    # In variables: a view does not keep its tensor alive.
    x, wide_down, wide_up = _packed(x), _padded(down, groups), _padded(up, groups)
    down_bias = None if down_bias is None else down_bias.float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    z = torch.empty((x.shape[0] * x.shape[1], down.shape[0])) if keep else None
    extension.module().mixture_adapter_fwd_cpu(
        extension.view(x),
        extension.view(wide_down),
        extension.optional_view(down_bias),
        extension.view(wide_up),
        groups,
        downs,
        activation,
        None if seed is None else int(seed),
        threshold,
        extension.view(y),
        extension.optional_view(z),
        torch.get_num_threads(),
    )
    return [y] if z is None else [y, z]


def _bwd_cpu(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    down: Tensor,
    up: Tensor,
    groups: int,
    downs: int,
    activation: str,
    threshold: int,
    seed: Tensor | None,
    *needs: bool,
) -> list[Tensor]:
    grad, x = _packed(grad), None if x is None else _packed(x)
    wide_down, wide_up = _padded(down, groups), _padded(up, groups)
    gradients = _gradients(grad, wide_down, wide_up, *needs)
    extension.module().mixture_adapter_bwd_cpu(
        extension.view(grad),
        extension.optional_view(x),
        extension.optional_view(z),
        extension.view(wide_down),
        extension.view(wide_up),
        groups,
        downs,
        activation,
        None if seed is None else int(seed),
        threshold,
        *map(extension.optional_view, gradients),
        torch.get_num_threads(),
    )
    grad_x, grad_down, grad_bias, grad_up = gradients
    columns = down.shape[1]
    found = (
        grad_x,
        None if grad_down is None else _cropped(grad_down, groups, columns),
        grad_bias,
        None if grad_up is None else _cropped(grad_up, groups, columns),
    )
    return [part for part in found if part is not None]


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fwd_triton(x: Tensor, *arguments: Any) -> list[Tensor]:
    from mmfast.kernels.mixture_adapter import forward

    with torch.cuda.device_of(x):
        return forward(x, *arguments)


def _bwd_triton(grad: Tensor, *arguments: Any) -> list[Tensor]:
    from mmfast.kernels.mixture_adapter import backward

    with torch.cuda.device_of(grad):
        return backward(grad, *arguments)


FWD = backends.define(
    "mixture_adapter_fwd",
    "(Tensor x, Tensor down, Tensor? down_bias, Tensor up, int groups, int downs, str activation, int threshold, "
    "Tensor? seed, bool keep) -> Tensor[]",
    _fwd_fake,
    {"cpu": _fwd_cpu, "triton": _fwd_triton},
)
BWD = backends.define(
    "mixture_adapter_bwd",
    "(Tensor grad, Tensor? x, Tensor? z, Tensor down, Tensor up, int groups, int downs, str activation, "
    "int threshold, Tensor? seed, bool need_x, bool need_down, bool need_bias, bool need_up) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


class MergedExperts(torch.autograd.Function):
    """On the merged experts. Saves x if `down` is trained, z [B · T, R] in fp32 if h or the slope of act is needed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        settings: tuple[int, int, str, int],
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        need_x, need_down, need_bias, need_up, *_ = ctx.needs_input_grad
        keep = need_up or (settings[2] != "identity" and (need_x or need_down or need_bias))
        y, *z = FWD(x, down, down_bias, up, *settings, seed, keep, backend)
        ctx.save_for_backward(x if need_down else None, z[0] if keep else None, down, up, seed)
        ctx.settings = settings, backend, None if down_bias is None else down_bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z, down, up, seed = ctx.saved_tensors
        settings, backend, bias_dtype = ctx.settings
        needs = ctx.needs_input_grad[:4]
        found = iter(BWD(grad, x, z, down, up, *settings, seed, *needs, backend))
        dtypes = grad.dtype, down.dtype, bias_dtype, up.dtype
        gradients = [next(found).to(dtype) if need else None for need, dtype in zip(needs, dtypes, strict=True)]
        return *gradients, None, None, None
