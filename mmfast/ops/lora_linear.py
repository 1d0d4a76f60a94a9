"""y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, alone or for siblings that share x, on a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, crossovers, lora_short, low_rank, products, weights
from mmfast.ops import dropout as dropouts
from mmfast.ops.backends import Backend, Machine, Op, Size
from mmfast.ops.dropout import Dropout
from mmfast.ops.weights import Weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# What the passes over y must save on a CPU before they are worth the steps on the host: rows, and rows · N without a
# gradient and with one; rows · K · N where the op makes a 16-bit product in fp32, which is much faster.
LEAST = crossovers.CPU.cpu("lora_linear")

# One of several stacked adapters, or the only one.
Factors = Tensor | Sequence[Tensor]
Scaling = float | Sequence[float]


def reference(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """The definition: y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ.

    Args:
        x: [..., K] (fp32, fp16, bf16, fp64; any strides).
        weight: [N, K] (dense, the dtype of x; or quantised, whose dense values in that dtype are meant).
        lora_a, lora_b: [R, K] and [N, R] (any floating dtype), cast to that of x.
        scaling: the factor on the update, alpha / R in the paper.
        bias: [N] (any floating dtype).
        dropout: the mask of x on its way to A; None: every element stays.

    Returns:
        [..., N] in the dtype of x.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), §4.1.
    """
    lowered = x if dropout is None else dropouts.reference(x, dropout).to(x.dtype)
    update = F.linear(F.linear(lowered, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    base = F.linear(x, weights.dense(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return products.add_scaled(base, update, scaling)


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks, and whether a gradient will be asked for.

    Each list has one entry for each sibling.
    """

    x: Tensor
    weights: list[Weight]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    scalings: list[float]
    biases: list[Tensor | None]
    dropout: float
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.x.device


def check_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_as: Sequence[Factors],
    lora_bs: Sequence[Factors],
    scalings: Sequence[Scaling],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    *,
    where: str = "lora_linear_group",
) -> Call:
    """The arguments of `lora_linear_group`, checked, with the stacked adapters of a sibling made into one."""
    count = len(weights)
    if biases is None:
        biases = [None] * count
    if not 0 < count == len(lora_as) == len(lora_bs) == len(scalings) == len(biases):
        lengths = [len(part) for part in (weights, lora_as, lora_bs, scalings, biases)]
        raise ValueError(
            f"{where}: there are {lengths} weights, lora_as, lora_bs, scalings and biases; expected the same number, "
            "1 or more, of each; pass None for a bias that is not there"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{where}: dropout is {dropout}; expected a probability in [0, 1)")
    if x.dim() < 1:
        raise ValueError(f"{where}: x is a scalar; expected [..., K]")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        weights = [weight.to(dtype) if isinstance(weight, Tensor) else weight for weight in weights]
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    stacked_as, stacked_bs, factors, trained = [], [], [], x.requires_grad
    for i in range(count):
        lora_a, lora_b, factor = _stack(lora_as[i], lora_bs[i], scalings[i], where)
        trained |= _check_sibling(where, x, weights[i], lora_a, lora_b, biases[i])
        stacked_as.append(lora_a)
        stacked_bs.append(lora_b)
        factors.append(factor)
    differentiated = trained and torch.is_grad_enabled()
    return Call(x, list(weights), stacked_as, stacked_bs, factors, list(biases), float(dropout), differentiated)


def _stack(lora_a: Factors, lora_b: Factors, scaling: Scaling, where: str) -> tuple[Tensor, Tensor, float]:
    """Stacked adapters as one: their A's below each other, their scaled B's side by side."""
    if isinstance(lora_a, Tensor) and isinstance(lora_b, Tensor) and isinstance(scaling, (int, float)):
        return lora_a, lora_b, float(scaling)
    if isinstance(lora_a, Tensor) or isinstance(lora_b, Tensor) or isinstance(scaling, (int, float)):
        raise TypeError(f"{where}: of lora_a, lora_b and scaling some are lists and some not; stack all or none")
    if not len(lora_a) == len(lora_b) == len(scaling) > 0:
        raise ValueError(
            f"{where}: {len(lora_a)} lora_a, {len(lora_b)} lora_b and {len(scaling)} scalings are stacked; expected "
            "the same number, 1 or more, of each"
        )
    return torch.cat(list(lora_a)), torch.cat([b * s for b, s in zip(lora_b, scaling, strict=True)], 1), 1.0


def _check_sibling(where: str, x: Tensor, weight: Weight, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    """Raises if they do not belong together; returns whether one of them is trained."""
    columns, device = x.shape[-1], x.device
    if len(weight.shape) != 2 or weight.shape[1] != columns:
        raise ValueError(f"{where}: weight is {list(weight.shape)} but x {list(x.shape)}; expected [N, {columns}]")
    rows = weight.shape[0]
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise TypeError(
            f"{where}: x is {x.dtype} and weight is {weight.dtype}; expected one dtype; cast one, or call under "
            "torch.autocast"
        )
    if lora_a.dim() != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != columns:
        raise ValueError(
            f"{where}: lora_a is {list(lora_a.shape)} but x has {columns} features; expected [R, {columns}] with "
            "R >= 1; was it made for another layer?"
        )
    if lora_b.shape != (rows, lora_a.shape[0]):
        raise ValueError(
            f"{where}: lora_b is {list(lora_b.shape)}; expected [N, R] = [{rows}, {lora_a.shape[0]}], after weight "
            f"{[rows, columns]} and lora_a {list(lora_a.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"{where}: bias is {list(bias.shape)}; expected [N] = [{rows}]")
    if weight.device != device:
        raise ValueError(f"{where}: weight is on {weight.device} but x on {device}; move one")
    trained = isinstance(weight, Tensor) and weight.requires_grad
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{where}: {name} is on {tensor.device} but x on {device}; move one")
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: {name} is {tensor.dtype}; expected a floating dtype")
        trained |= tensor.requires_grad
    return trained


def check(
    x: Tensor,
    weight: Weight,
    lora_a: Factors,
    lora_b: Factors,
    scaling: Scaling,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Call:
    """The arguments of `lora_linear`, checked: a group of one."""
    return check_group(x, [weight], [lora_a], [lora_b], [scaling], [bias], dropout, where="lora_linear")


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.x.dtype == torch.float64 else None


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    if not all(isinstance(weight, Tensor) for weight in call.weights):
        return ()
    rows, columns = call.x.shape[:-1].numel(), sum(weight.shape[0] for weight in call.weights)
    if machine.device == "cpu" and products.is_slow(call.x.dtype, rows, grad=call.differentiated):
        return (Size("16-bit product", call.x.numel() * columns, "rows · K · N is {}"),)
    key = "backward" if call.differentiated else "forward"
    return Size("rows", rows, "the number of rows is {}"), Size(key, rows * columns, "rows · N is {}")


def _linear_sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    """What `lora_short` counts of packed fp32 tensors, where it can take them all; else as of siblings."""
    tensors = [call.x, *call.weights, *call.lora_as, *call.lora_bs, *call.biases]
    given, rows = [tensor for tensor in tensors if isinstance(tensor, Tensor)], call.x.shape[:-1].numel()
    if (
        machine.device != "cpu"
        or call.dropout
        or not isinstance(call.weights[0], Tensor)
        or call.weights[0].requires_grad
        or any(tensor.dtype != torch.float32 for tensor in given)
        or not backends.lies_packed(*given)  # before what is asked of C++: torch.compile ends here
        or not (products.calls_sgemm() or products.tiles_f32(rows, "cpu"))
    ):
        return _sizes(call, machine)
    counts = lora_short.packed_counts(rows, call.weights[0], call.lora_as[0].shape[0])
    return tuple(Size(key, count, lora_short.COUNTED[key]) for key, count in counts.items())


BACKENDS = (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference"))
OP = Op("lora_linear", check, BACKENDS, _linear_sizes)
GROUP = Op("lora_linear_group", check_group, BACKENDS, _sizes, measured_as="lora_linear")


def _fwd(
    backend: str,
    x: Tensor,
    parts: list[Tensor],
    sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    threshold: int,
    seed: Tensor | None,
) -> list[Tensor]:
    """The outputs of the siblings, then s [M, R]."""
    matrix = products.as_matrix(x)
    dtype = products.compute_dtype(matrix, backend)
    layers = low_rank.siblings(backend, dtype, parts, sizes, lora_as, lora_bs, scalings, threshold, seed)
    outputs = [matrix.new_empty((matrix.shape[0], b.shape[0])) for b in lora_bs]
    if dtype == x.dtype:
        s = _fwd_rows(layers, matrix, 0, biases, outputs)
    else:
        kept = []
        for rows in products.row_chunks(matrix, dtype):
            x_c = matrix[rows].to(dtype)
            outs = [x_c.new_empty((x_c.shape[0], b.shape[0])) for b in lora_bs]
            kept.append(_fwd_rows(layers, x_c, rows.start, biases, outs).to(x.dtype))
            for output, out in zip(outputs, outs, strict=True):
                output[rows] = out
        s = torch.cat(kept)
    return [output.view(*x.shape[:-1], output.shape[1]) for output in outputs] + [s]


def _fwd_rows(
    layers: low_rank.Siblings, x: Tensor, first_row: int, biases: list[Tensor | None], outputs: list[Tensor]
) -> Tensor:
    """Fills `outputs` [M, N] and returns s. Without a fused kernel the large product adds to the low-rank part."""
    steps, biased = layers.steps, zip(layers.frozen, layers.lora_bs, layers.scalings, biases, outputs, strict=True)
    s = steps.down(x, layers.a, layers.dropout, first_row)
    for s_i, (weight, b, scaling, bias, out) in zip(low_rank.columns(s, layers.ranks), biased, strict=True):
        if low_rank.fused_is_faster(layers.backend, x, weight, out.shape[1]):
            low_rank.fused(layers.backend, x, weight[0], s_i, b, scaling, bias, out)
        else:
            steps.up(s_i, b, scaling, bias, out)
            products.linear(out, x, weight, layers.backend, add=True)
    return s


def _fwd_fake(
    x: Tensor,
    parts: list[Tensor],
    sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    threshold: int,
    seed: Tensor | None,
    backend: str,
) -> list[Tensor]:
    outputs = [x.new_empty((*x.shape[:-1], b.shape[0])) for b in lora_bs]
    return [*outputs, x.new_empty((math.prod(x.shape[:-1]), sum(a.shape[0] for a in lora_as)))]


def _bwd(
    backend: str,
    grads: list[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    parts: list[Tensor],
    sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    threshold: int,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_weights: list[bool],
    need_bs: list[bool],
    need_biases: list[bool],
) -> list[Tensor]:
    """The gradients of x, of all A's below each other, then of the weights, of the B's and of the biases.

    Those of x and the weights have their dtypes, the others are fp32; one that is not needed is empty.
    """
    matrices, count = [products.as_matrix(grad) for grad in grads], len(sizes)
    dtype = products.compute_dtype(matrices[0], backend, grad=True)
    layers = low_rank.siblings(backend, dtype, parts, sizes, lora_as, lora_bs, scalings, threshold, seed)
    needs = need_a, need_weights, need_bs, need_biases
    x = None if x is None else products.as_matrix(x)
    grad_x = matrices[0].new_empty((matrices[0].shape[0], layers.a.shape[1])) if need_x else None
    rest: list[Tensor | None] = [None] * (1 + 3 * count)
    if dtype == grads[0].dtype:
        rest = _bwd_rows(layers, matrices, x, s, 0, grad_x, *needs)
    else:
        for rows in products.row_chunks(matrices[0], dtype):
            chunk = [matrix[rows].to(dtype) for matrix in matrices]
            x_c, s_c = (None if tensor is None else tensor[rows].to(dtype) for tensor in (x, s))
            out = chunk[0].new_empty((chunk[0].shape[0], layers.a.shape[1])) if need_x else None
            sums = _bwd_rows(layers, chunk, x_c, s_c, rows.start, out, *needs)
            rest = [b if a is None or b is None else a.add_(b) for a, b in zip(rest, sums, strict=True)]
            if grad_x is not None and out is not None:
                grad_x[rows] = out
    if grad_x is not None:
        grad_x = grad_x.view(*grads[0].shape[:-1], grad_x.shape[1])
    for i, weight in enumerate(layers.frozen, 1):
        rest[i] = _to(rest[i], weight[0].dtype)
    # An op may not return one tensor twice, not even an empty one.
    return [torch.empty(0, device=layers.a.device) if grad is None else grad for grad in (grad_x, *rest)]


def _to(grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if grad is None else grad.to(dtype)


def _bwd_rows(
    layers: low_rank.Siblings,
    grads: list[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    first_row: int,
    grad_x: Tensor | None,
    need_a: bool,
    need_weights: list[bool],
    need_bs: list[bool],
    need_biases: list[bool],
) -> list[Tensor | None]:
    """Fills `grad_x` [M, K] if given; returns the gradients of all A's, of the weights, the B's and the biases."""
    steps, count = layers.steps, len(grads)
    through_adapter = grad_x is not None or need_a or True in need_bs
    columns = [None] * count if s is None else low_rank.columns(s, layers.ranks)
    grad_a, grad_weights, grad_bs, grad_biases, parts = None, [], [], [], []
    for i, grad in enumerate(grads):
        grad_b = None
        if through_adapter:
            ds, grad_b = steps.read_grad(
                grad, layers.lora_bs[i], columns[i] if need_bs[i] else None, layers.scalings[i]
            )
            parts.append(ds)
        grad_bs.append(grad_b)
        grad_weights.append(low_rank.product(grad.t(), x) if need_weights[i] and x is not None else None)
        grad_biases.append(grad.sum(0, dtype=torch.float32) if need_biases[i] else None)
    if through_adapter:
        ds = parts[0] if count == 1 else torch.cat(parts, 1)
        if need_a and x is not None:
            grad_a = steps.grad_a(ds, x, layers.dropout, first_row)
        if grad_x is not None:
            _fill_grad_x(layers, ds, grads, first_row, grad_x)
    return [grad_a, *grad_weights, *grad_bs, *grad_biases]


def _fill_grad_x(layers: low_rank.Siblings, ds: Tensor, grads: list[Tensor], first_row: int, out: Tensor) -> None:
    """out [M, K] = dropout(ds A) + Σ grad W over the siblings."""
    products_of = list(zip(grads, layers.frozen, strict=True))
    grad, weight = products_of[0]
    is_cpu = layers.backend == "cpu"
    if is_cpu and layers.dropout is None and low_rank.fused_is_faster("cpu", grad, weight, out.shape[1]):
        low_rank.fused_grad(grad, weight[0], ds, layers.a, out)
        del products_of[0]
    else:
        layers.steps.grad_x(ds, layers.a, layers.dropout, first_row, out)
    for grad, weight in products_of:
        products.linear_grad(out, grad, weight, layers.backend, add=True)


def _bwd_fake(
    grads: list[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    parts: list[Tensor],
    sizes: list[int],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    scalings: list[float],
    threshold: int,
    seed: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_weights: list[bool],
    need_bs: list[bool],
    need_biases: list[bool],
    backend: str,
) -> list[Tensor]:
    features, frozen = lora_as[0].shape[1], low_rank.split(parts, sizes)

    def fp32(shape: Sequence[int], need: bool) -> Tensor:
        return lora_as[0].new_empty(shape if need else 0, dtype=torch.float32)

    return [
        grads[0].new_empty((*grads[0].shape[:-1], features)) if need_x else fp32((), False),
        fp32((sum(a.shape[0] for a in lora_as), features), need_a),
        *(
            w[0].new_empty(w[0].shape) if need else fp32((), False)
            for w, need in zip(frozen, need_weights, strict=True)
        ),
        *(fp32(b.shape, need) for b, need in zip(lora_bs, need_bs, strict=True)),
        *(fp32(b.shape[:1], need) for b, need in zip(lora_bs, need_biases, strict=True)),
    ]


_FWD = backends.define(
    "lora_linear_fwd",
    "(Tensor x, Tensor[] weights, int[] sizes, Tensor[] lora_as, Tensor[] lora_bs, Tensor?[] biases, float[] scalings, "
    "int threshold, Tensor? seed) -> Tensor[]",
    _fwd_fake,
    {name: partial(_fwd, name) for name in low_rank.STEPS},
)
_BWD = backends.define(
    "lora_linear_bwd",
    "(Tensor[] grads, Tensor? x, Tensor? s, Tensor[] weights, int[] sizes, Tensor[] lora_as, Tensor[] lora_bs, "
    "float[] scalings, int threshold, Tensor? seed, bool need_x, bool need_a, bool[] need_weights, bool[] need_bs, "
    "bool[] need_biases) -> Tensor[]",
    _bwd_fake,
    {name: partial(_bwd, name) for name in low_rank.STEPS},
)


class _LoRALinear(torch.autograd.Function):
    """Saves x if an A (or a weight) is trained, s [M, R] if a B is, and tensors that exist anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        seed: Tensor | None,
        sizes: tuple[int, ...],
        scalings: tuple[float, ...],
        threshold: int,
        backend: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parts, lora_as, lora_bs, biases = _sort(tensors, sizes)
        *outputs, s = _FWD(x, parts, sizes, lora_as, lora_bs, biases, scalings, threshold, seed, backend)
        need_parts, need_as, need_bs, _ = _sort(ctx.needs_input_grad[6:], sizes)
        keep_x, keep_s = any(need_as) or any(need_parts), any(need_bs)
        ctx.save_for_backward(x if keep_x else None, s if keep_s else None, seed, *parts, *lora_as, *lora_bs)
        ctx.settings = (
            sizes,
            scalings,
            threshold,
            backend,
            [bias.dtype if bias is not None else None for bias in biases],
        )
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sizes, scalings, threshold, backend, bias_dtypes = ctx.settings
        x, s, seed, *tensors = ctx.saved_tensors
        parts, lora_as, lora_bs, _ = _sort(tensors, sizes)
        need_x, need_tensors = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        need_parts, need_as, need_bs, need_biases = _sort(need_tensors, sizes)
        need_weights = [True in needs for needs in low_rank.split(need_parts, sizes)]
        gradients = _BWD(
            grads, x, s, parts, sizes, lora_as, lora_bs, scalings, threshold, seed,
            need_x, any(need_as), need_weights, need_bs, need_biases, backend,
        )  # fmt: skip
        grad_x, grad_a, *rest = gradients
        count = len(sizes)
        grad_parts: list[Tensor | None] = []
        for size, grad_weight in zip(sizes, rest[:count], strict=True):
            grad_parts += [grad_weight] + [None] * (size - 1)  # a quantised weight has no gradient
        grad_as = grad_a.split([a.shape[0] for a in lora_as]) if count > 1 and any(need_as) else [grad_a] * count
        found = [*grad_parts, *grad_as, *rest[count:]]
        dtypes = [tensor.dtype for tensor in tensors] + bias_dtypes
        return (
            grad_x if need_x else None,
            *[None] * 5,
            *(g.to(d) if need else None for g, d, need in zip(found, dtypes, need_tensors, strict=True)),
        )


def _sort(flat: Sequence[Any], sizes: Sequence[int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """What belongs to the weights' tensors, the A's, the B's and the biases."""
    first, count = sum(sizes), len(sizes)
    flat = list(flat)
    lora_bs = first + count
    return flat[:first], flat[first:lora_bs], flat[lora_bs : lora_bs + count], flat[lora_bs + count :]


def _run(call: Call, backend: str) -> tuple[Tensor, ...]:
    """The outputs of the siblings, which share one mask."""
    threshold = dropouts.threshold(call.dropout)
    seed = dropouts.draw_seed(call.device) if threshold else None
    if backend == "reference":
        dropout = None if seed is None else Dropout(seed, threshold)
        siblings = zip(call.weights, call.lora_as, call.lora_bs, call.scalings, call.biases, strict=True)
        return tuple(reference(call.x, *sibling, dropout) for sibling in siblings)
    split = [weights.tensors(weight) for weight in call.weights]
    sizes, parts = tuple(map(len, split)), [tensor for tensors in split for tensor in tensors]
    if call.differentiated:
        tensors = *parts, *call.lora_as, *call.lora_bs, *call.biases
        return _LoRALinear.apply(call.x, seed, sizes, tuple(call.scalings), threshold, backend, *tensors)
    lists = call.lora_as, call.lora_bs, call.biases, call.scalings
    return tuple(_FWD(call.x, parts, sizes, *lists, threshold, seed, backend)[:-1])


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Factors,
    lora_b: Factors,
    scaling: Scaling,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ: `reference` says what exactly.

    The low-rank part is written first and the large product adds to it, or starts from it where one kernel makes both.
    Saved for backward: x if `lora_a` (or a dense `weight`) is trained, s = dropout(x) Aᵀ [rows, R] if `lora_b` is, and
    no mask and no copy of x in another dtype. Differentiable once, except on the reference.

    Args:
        x: [..., K] (fp32, fp16, bf16; fp64 on the reference; any strides, any number of rows).
        weight: [N, K], dense, in the dtype of x, frozen or trained; or quantised and frozen (`nf4_quantize`,
            `int8_quantize`).
        lora_a, lora_b: [R, K] and [N, R] (any floating dtype), the adapter; or lists of them, of stacked adapters.
        scaling: the factor on the update (alpha / R in the paper); with stacked adapters a list.
        bias: [N] (any floating dtype).
        dropout: probability of dropping an element of x on its way to A, rounded to a multiple of 2⁻¹⁶. The mask
            depends on PyTorch's generator alone, so every backend has the same one and checkpointing repeats it.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [..., N] in the dtype of x; under autocast in autocast's, to which x and a dense weight are cast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: sums in fp32, rounded where a matrix is stored: s, y and, unless one kernel makes both, the low-rank part.
    Gradients of lora_a, lora_b and bias are summed in fp32. Deterministic.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), §4.1.
    """
    if not dropout and (y := lora_short.attempt(x, weight, lora_a, lora_b, scaling, bias, backend)) is not None:
        return y
    call = check(x, weight, lora_a, lora_b, scaling, bias, dropout)
    return _run(call, OP.select(call, backends.machine(call.device), backend))[0]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_as: Sequence[Factors],
    lora_bs: Sequence[Factors],
    scalings: Sequence[Scaling],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`lora_linear` for siblings that share x (q, k and v; gate and up): one low-rank pass over x.

    x is saved once, and the siblings share one dropout mask. Arguments are those of `lora_linear`, one of each for a
    sibling; ranks, output sizes and formats of the weights may differ.

    Returns:
        One [..., N_i] for each sibling.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    call = check_group(x, weights, lora_as, lora_bs, scalings, biases, dropout)
    return _run(call, GROUP.select(call, backends.machine(call.device), backend))
