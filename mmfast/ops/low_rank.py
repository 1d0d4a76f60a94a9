"""The small products around the large one of a layer with a low-rank update, on each backend.

They are steps of ops, so they check nothing. Matrices are contiguous in their last dimension and of one dtype, but
for B and the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import dropout as dropouts
from mmfast.ops import extension, products
from mmfast.ops.dropout import Dropout

# Rows that pass through dropout at a time on the CPU, so that they are read back from cache.
DROPOUT_ROWS = 128


class Faster(NamedTuple):
    """A size from which, on one GPU, the large product and the update were measured faster in one kernel than in two.

    Attributes:
        device: as `torch.cuda.get_device_name` gives it.
        dtype: of the matrices.
        rows, features, columns: M, K and N at least.
    """

    device: str
    dtype: torch.dtype
    rows: int
    features: int
    columns: int


# Nothing is measured yet, so the two steps are used. benchmarks/bench_lora_linear.py times both.
FUSED_FASTER: tuple[Faster, ...] = ()

# On a CPU with AMX, in bfloat16 (fp32: `products.tiles_f32`): so many rows, and for each thread so many blocks of the
# kernel (rows, columns of y). Fewer leave a thread without work, or W is packed for too little.
TILED_ROWS, TILED_BLOCKS = 512, 4
TILED_BLOCK = 1024, 256


class Steps(NamedTuple):
    """What a backend is: the small products around the large one. `R` counts the ranks of all siblings.

    Attributes:
        down: (x [M, K], a [R, K], dropout, first_row) -> s [M, R] = dropout(x) Aᵀ.
        up: (s [M, r], b [N, r], scaling, bias, out [M, N]): out = scaling · s Bᵀ + bias.
        read_grad: (grad [M, N], b [N, r], s [M, r] or None, scaling) -> ds [M, r] = scaling · grad B and, in fp32,
            scaling · gradᵀ s [N, r], None without s.
        grad_a: (ds [M, R], x, dropout, first_row) -> dsᵀ dropout(x) [R, K] in fp32.
        grad_x: (ds, a, dropout, first_row, out [M, K]): out = ds A, masked and scaled as x was.
    """

    down: Callable[..., Tensor]
    up: Callable[..., None]
    read_grad: Callable[..., tuple[Tensor, Tensor | None]]
    grad_a: Callable[..., Tensor]
    grad_x: Callable[..., None]


def _read(
    x: Tensor,
    factors: Tensor | None,
    s: Tensor | None,
    scaling: float,
    projected: Tensor | None,
    outer: Tensor | None,
    *,
    add: bool = False,
) -> None:
    """What is made of x [M, K]: with factors [R, K], `projected` [M, R] = scaling · x factorsᵀ; with s [M, R], `outer`
    [R, K] (fp32) = scaling · sᵀ x, or += with `add`.
    """
    if x.dtype == torch.float32 or products.has_tiles(x.dtype, "cpu"):
        factors = None if factors is None else _packed(factors)
        tensors = map(extension.optional_view, (x, factors, s))
        results = map(extension.optional_view, (projected, outer))
        extension.module().low_rank_read(*tensors, scaling, *results, add, torch.get_num_threads())
        return
    if factors is not None and projected is not None:
        torch.addmm(projected, x, factors.t(), beta=0, alpha=scaling, out=projected)
    if s is not None and outer is not None:
        part = product(s.t(), x)
        if add:
            outer.add_(part, alpha=scaling)
        else:
            torch.mul(part, scaling, out=outer)


def _expand(s: Tensor, factors: Tensor, scaling: float, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = scaling · s factors + bias, for s [M, R] and factors [R, N]."""
    bias = None if bias is None else bias.to(out.dtype).contiguous()
    if s.dtype == torch.float32:
        view, bias_view = extension.view, extension.optional_view(bias)
        threads = torch.get_num_threads()
        extension.module().low_rank_expand(view(s), view(factors), scaling, bias_view, view(out), threads)
    elif bias is None:
        torch.addmm(out, s, factors, beta=0, alpha=scaling, out=out)
    else:
        torch.addmm(bias, s, factors, alpha=scaling, out=out)


def _multiply(
    x: Tensor, large: Tensor, s: Tensor, factors: Tensor, scaling: float, bias: Tensor | None, out: Tensor
) -> None:
    """out [M, N] = x large + scaling · s factors + bias, in fp32 or bfloat16, in tiles."""
    factors, bias = _packed(factors), None if bias is None else bias.to(out.dtype).contiguous()
    views, bias_view = map(extension.view, (x, large, s, factors)), extension.optional_view(bias)
    threads = torch.get_num_threads()
    extension.module().low_rank_product(*views, scaling, bias_view, extension.view(out), threads)


def _packed(factors: Tensor) -> Tensor:
    """The same with stride 1 in one of its dimensions."""
    return factors if 1 in factors.stride() else factors.contiguous()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, which autocast must not touch."""
    return torch.mm(left, right, out=right.new_empty((left.shape[0], right.shape[1])))


def _down_cpu(x: Tensor, a: Tensor, dropout: Dropout | None, first_row: int) -> Tensor:
    s = x.new_empty((x.shape[0], a.shape[0]))
    if dropout is None:
        _read(x, a, None, 1.0, s, None)
        return s
    for rows, dropped in _dropped(x, dropout, first_row):
        _read(dropped, a, None, 1.0, s[rows], None)
    return s


def _dropped(x: Tensor, dropout: Dropout, first_row: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of dropout(x), part by part; a part is overwritten by the next."""
    scratch = x.new_empty((min(DROPOUT_ROWS, x.shape[0]), x.shape[1]))
    for start in range(0, x.shape[0], DROPOUT_ROWS):
        part = x[start : start + DROPOUT_ROWS]
        rows = slice(start, start + part.shape[0])
        yield rows, dropouts.apply_cpu(part, dropout, first_row + start, scratch[: part.shape[0]])


def _up_cpu(s: Tensor, b: Tensor, scaling: float, bias: Tensor | None, out: Tensor) -> None:
    _expand(s, b.to(s.dtype).t(), scaling, bias, out)


def _read_grad_cpu(grad: Tensor, b: Tensor, s: Tensor | None, scaling: float) -> tuple[Tensor, Tensor | None]:
    ds = grad.new_empty((grad.shape[0], b.shape[1]))
    grad_b = None if s is None else torch.empty(b.shape)
    _read(grad, b.to(grad.dtype).t(), s, scaling, ds, None if grad_b is None else grad_b.t())
    return ds, grad_b


def _grad_a_cpu(ds: Tensor, x: Tensor, dropout: Dropout | None, first_row: int) -> Tensor:
    grad_a = torch.empty((ds.shape[1], x.shape[1]))
    if dropout is None:
        _read(x, None, ds, 1.0, None, grad_a)
        return grad_a
    grad_a.zero_()
    for rows, dropped in _dropped(x, dropout, first_row):
        _read(dropped, None, ds[rows], 1.0, None, grad_a, add=True)
    return grad_a


def _grad_x_cpu(ds: Tensor, a: Tensor, dropout: Dropout | None, first_row: int, out: Tensor) -> None:
    _expand(ds, a, 1.0, None, out)
    if dropout is not None:
        dropouts.apply_cpu(out, dropout, first_row, out)


# Triton takes all rows at once: the first one is row 0.


def _down_triton(x: Tensor, a: Tensor, dropout: Dropout | None, first_row: int) -> Tensor:
    from mmfast.kernels.lora_linear import down

    with torch.cuda.device_of(x):
        return down(x, a, *(dropout or (None, 0)))


def _up_triton(s: Tensor, b: Tensor, scaling: float, bias: Tensor | None, out: Tensor) -> None:
    from mmfast.kernels.lora_linear import up

    with torch.cuda.device_of(s):
        up(s, b.to(s.dtype), bias, scaling, out)


def _read_grad_triton(grad: Tensor, b: Tensor, s: Tensor | None, scaling: float) -> tuple[Tensor, Tensor | None]:
    from mmfast.kernels.lora_linear import read_grad

    with torch.cuda.device_of(grad):
        return read_grad(grad, b.to(grad.dtype), s, scaling, s is not None)


def _grad_a_triton(ds: Tensor, x: Tensor, dropout: Dropout | None, first_row: int) -> Tensor:
    from mmfast.kernels.lora_linear import grad_a

    with torch.cuda.device_of(ds):
        return grad_a(ds, x, *(dropout or (None, 0)))


def _grad_x_triton(ds: Tensor, a: Tensor, dropout: Dropout | None, first_row: int, out: Tensor) -> None:
    from mmfast.kernels.lora_linear import grad_x

    with torch.cuda.device_of(ds):
        grad_x(ds, a, *(dropout or (None, 0)), out)


STEPS = {
    "cpu": Steps(_down_cpu, _up_cpu, _read_grad_cpu, _grad_a_cpu, _grad_x_cpu),
    "triton": Steps(_down_triton, _up_triton, _read_grad_triton, _grad_a_triton, _grad_x_triton),
}


class Siblings(NamedTuple):
    """What forward and backward need of the layers, each list with one entry for each sibling.

    Attributes:
        steps: of the backend.
        frozen: the tensors of W.
        a: [R, K], all A's below each other, in the dtype of the products.
        ranks: the rows of `a` that belong to each.
        lora_bs, scalings: as given.
        dropout: of x on its way to `a`.
    """

    backend: str
    steps: Steps
    frozen: list[list[Tensor]]
    a: Tensor
    ranks: list[int]
    lora_bs: list[Tensor]
    scalings: list[float]
    dropout: Dropout | None


def siblings(
    backend: str,
    dtype: torch.dtype,
    parts: list[Tensor],
    sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    threshold: int,
    seed: Tensor | None,
) -> Siblings:
    # One linear, the common case, is spared calls that cost as much as its own on a GPU: here and in columns.
    a = lora_as[0] if len(sizes) == 1 else torch.cat(lora_as)
    frozen, ranks = split(parts, sizes), [part.shape[0] for part in lora_as]
    dropout = None if seed is None else Dropout(seed, threshold)
    return Siblings(backend, STEPS[backend], frozen, a.to(dtype), ranks, lora_bs, scalings, dropout)


def split(parts: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    """The tensors of each sibling's weight, of which all are in `parts`."""
    if len(sizes) == 1:
        return [list(parts)]
    rest = iter(parts)
    return [[next(rest) for _ in range(size)] for size in sizes]


def columns(s: Tensor, ranks: list[int]) -> Sequence[Tensor]:
    """The part of s [M, R] that belongs to each sibling."""
    return [s] if len(ranks) == 1 else s.split(ranks, 1)


def fused_is_faster(backend: str, x: Tensor, weight: list[Tensor], columns: int) -> bool:
    """Whether out [M, columns] = x W + the update is made faster in one kernel: `FUSED_FASTER` and `TILED_ROWS`."""
    if weight[0].dtype != x.dtype or weight[0].stride(1) != 1:
        return False
    if x.dtype == torch.float32 and backend == "cpu":
        return products.tiles_f32(x.shape[0], "cpu")
    if backend == "cpu":
        blocks = -(-x.shape[0] // TILED_BLOCK[0]) * -(-columns // TILED_BLOCK[1])
        enough = x.shape[0] >= TILED_ROWS and blocks >= TILED_BLOCKS * torch.get_num_threads()
        return enough and products.has_tiles(x.dtype, "cpu")
    if not FUSED_FASTER:
        return False
    name = torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type
    size = (x.shape[0], x.shape[1], columns)
    return any(f[:2] == (name, x.dtype) and all(a >= b for a, b in zip(size, f[2:], strict=True)) for f in FUSED_FASTER)


def fused(
    backend: str,
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """out [M, N] = x Wᵀ + scaling · s Bᵀ + bias in one kernel."""
    if backend == "cpu":
        _multiply(x, weight.t(), s, b.to(s.dtype).t(), scaling, bias, out)
        return
    from mmfast.kernels.lora_linear_fused import fused

    with torch.cuda.device_of(x):
        fused(x, weight, s, b.to(x.dtype), bias, scaling, out)


def fused_grad(grad: Tensor, weight: Tensor, ds: Tensor, a: Tensor, out: Tensor) -> None:
    """out [M, K] = grad W + ds A in one kernel of the CPU."""
    _multiply(grad, weight, ds, a, 1.0, None, out)
