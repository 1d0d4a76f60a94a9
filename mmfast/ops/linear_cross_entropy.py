"""The loss of a language-model head without its logits: cross_entropy(hidden weightᵀ, labels), labelled rows only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmfast.ops import backends, crossovers, extension, products
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")

# The ignore_index where every row has a label: no label is that.
NONE_IGNORED = -(2**63)

# What rows · V · H must come to before the steps on the host cost less than they save.
LEAST = crossovers.CPU.cpu("linear_cross_entropy")

# Of a small call, by names of their own: to look them up in a package, with caches cold, takes longer than it can win
# back, and so does what F.cross_entropy asks before it calls this one.
_linear, _is_compiling, _FP32 = F.linear, torch.compiler.is_dynamo_compiling, torch.float32
_cross_entropy: Callable[..., Tensor] = torch._C._nn.cross_entropy_loss


def _first_look(*arguments: Any) -> int:
    """`extension.labelled`, which from then on takes its place: the extension is loaded when first needed."""
    global _look
    _look = extension.labelled()
    return _look(*arguments)


_look: Callable[..., int] = _first_look

# So many bytes of logits exist at a time: 512 rows of 32000 float32 logits, enough for efficient matrix products.
WORKSPACE_BYTES = 64 * 2**20


class LossAndAccuracy(NamedTuple):
    """The loss and two counts, which add up over micro-batches and ranks: accuracy is correct / supervised.

    Attributes:
        loss: as without `return_accuracy`.
        correct: [] (int64), rows whose label is the argmax of their logits, the first one on ties. No gradient.
        supervised: [] (int64), rows with a label.
    """

    loss: Tensor
    correct: Tensor
    supervised: Tensor


def reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_accuracy: bool = False,
) -> Tensor | LossAndAccuracy:
    """The definition, with all logits in memory: `F.cross_entropy(F.linear(hidden, weight).float(), labels, ...)`.

        x = hidden weightᵀ
        loss = log Σ_v exp(x[v]) - (1 - ε) x[label] - ε Σ_v x[v] / V        0 where the label is ignore_index

    Unlike that of `F.cross_entropy`, the mean over no row is 0 and has a gradient, which is 0.

    Args:
        hidden: [..., H] (fp32, fp16, bf16, fp64; any strides).
        weight: [V, H] (the same dtype).
        labels: [...] (int64), a row of `weight`, or `ignore_index`.
        ignore_index: the label of the rows that count for nothing.
        reduction: "mean" over the rows with a label, "sum" or "none".
        label_smoothing: ε, from 0 to 1.
        return_accuracy: return the loss and two counts.

    Returns:
        The loss, fp32 (fp64 for fp64): [], or for "none" [...].

    Numerics: logits are rounded to the dtype of `hidden`; what follows is fp32 (fp64 for fp64).
    """
    logits = F.linear(hidden, weight).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = labels.flatten()
    loss = F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        label_smoothing=label_smoothing,
    )
    if reduction == "none":
        loss = loss.view(labels.shape)
    has_label = targets != ignore_index
    supervised = has_label.sum()
    if reduction == "mean":
        loss = loss / supervised.clamp(min=1)
    if not return_accuracy:
        return loss
    correct = ((logits.argmax(-1) == targets) & has_label).sum()
    return LossAndAccuracy(loss, correct, supervised)


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int
    reduction: str
    label_smoothing: float
    return_accuracy: bool

    @property
    def device(self) -> torch.device:
        return self.hidden.device


def check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_accuracy: bool = False,
) -> Call:
    """The arguments of `linear_cross_entropy`, checked. (Labels' values are checked where they are read.)"""
    where = "linear_cross_entropy"
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"{where}: hidden is {list(hidden.shape)} and weight is {list(weight.shape)}; expected [..., H] and "
            "[V, H] with V >= 1; pass the weight of the head, one row a token"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where}: labels is {list(labels.shape)} but hidden {list(hidden.shape)}; expected "
            f"{list(hidden.shape[:-1])}, one label a row; shift them against each other before the call"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"{where}: labels is {labels.dtype}; expected torch.int64; use labels.long()")
    if not hidden.device == weight.device == labels.device:
        raise ValueError(
            f"{where}: hidden is on {hidden.device}, weight on {weight.device}, labels on {labels.device}; "
            "expected one device; move them"
        )
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise TypeError(
            f"{where}: hidden is {hidden.dtype} and weight is {weight.dtype}; expected one of "
            f"{', '.join(map(str, DTYPES))} for both; cast one, or call under torch.autocast"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{where}: reduction is {reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{where}: label_smoothing is {label_smoothing}; expected 0 to 1")
    ignored = NONE_IGNORED if ignore_index is None else ignore_index
    return Call(hidden, weight, labels, ignored, reduction, float(label_smoothing), return_accuracy)


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.hidden.dtype == torch.float64 else None


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    return (Size("work", call.labels.numel() * call.weight.numel(), "rows · V · H is {}"),)


OP = Op(
    "linear_cross_entropy",
    check,
    (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference")),
    _sizes,
)


def _rows_cpu(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor | None,
    label_smoothing: float,
    write_gradient: bool,
    losses: Tensor,
    correct: Tensor,
) -> None:
    """What a backend is: fills losses and correct, and writes scale times the losses' gradient over the logits."""
    view = extension.view
    factors = None if scale is None else view(scale)
    extension.module().linear_cross_entropy_rows(
        view(logits), view(targets), factors, label_smoothing, write_gradient, view(losses), view(correct)
    )


def _rows_triton(logits: Tensor, *rest: Any) -> None:
    from mmfast.kernels.linear_cross_entropy import linear_cross_entropy_rows

    with torch.cuda.device_of(logits):
        linear_cross_entropy_rows(logits, *rest)


def _run(
    rows_kernel: Callable[..., None],
    scale: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[tuple[Any, ...] | None, Tensor, Tensor, Tensor, Tensor]:
    """Takes the rows with a label, a workspace full at a time, through logits, row kernel and gradients.

    Args:
        rows_kernel: see `_rows_cpu`.
        scale: [...] (fp32), a factor on the gradient of each row; None for 1.

    Returns:
        rows: index of the n rows with a label, for a tensor shaped as labels; None for all of them.
        losses [n] (fp32), correct [n] (bool).
        grad_hidden, as hidden, and grad_weight [V, H] (fp32); [0] if not needed.
    """
    device, vocabulary = hidden.device, weight.shape[0]
    rows: tuple[Any, ...] | None = None
    if ignore_index != NONE_IGNORED:
        rows = (labels != ignore_index).nonzero(as_tuple=True)  # on CUDA: the one wait for the device
        # Where nothing is ignored slices take the rows, which copies nothing.
        rows = rows if len(rows[0]) < labels.numel() else None

    def of_rows(tensor: Tensor) -> Tensor:
        return tensor.flatten().contiguous() if rows is None else tensor[rows]

    targets, factors = of_rows(labels), None if scale is None else of_rows(scale)
    count = len(targets)
    losses = torch.empty(count, device=device)
    correct = torch.empty(count, dtype=torch.bool, device=device)
    grad_hidden = torch.zeros(hidden.shape if need_hidden else 0, dtype=hidden.dtype, device=device)
    grad_weight = torch.zeros(weight.shape if need_weight else 0, device=device)

    source, target = hidden, grad_hidden
    if rows is None:
        source, target = hidden.flatten(0, -2), grad_hidden.view(-1, hidden.shape[-1])

    chunk = max(1, WORKSPACE_BYTES // (vocabulary * hidden.element_size()))
    workspace = torch.empty((min(chunk, count), vocabulary), dtype=hidden.dtype, device=device)
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        here = part if rows is None else tuple(index[part] for index in rows)
        x = source[here]
        logits = workspace[: x.shape[0]]
        products.multiply(logits, x, weight.t(), device.type)
        rows_kernel(
            logits,
            targets[part],
            None if factors is None else factors[part],
            label_smoothing,
            need_hidden or need_weight,
            losses[part],
            correct[part],
        )
        if need_hidden:
            gradient = target[part] if rows is None else torch.empty_like(x)
            products.multiply(gradient, logits, weight, device.type)
            if rows is not None:
                target[here] = gradient
        if need_weight:
            _add_product(grad_weight, logits, x)
    return rows, losses, correct, grad_hidden, grad_weight


def _add_product(total: Tensor, logits: Tensor, x: Tensor) -> None:
    """total += logitsᵀ x in fp32, for total [V, H], logits [n, V] and x [n, H]."""
    if x.dtype == total.dtype:
        total.addmm_(logits.t(), x)
        return
    # A product of 16-bit matrices comes out in 16 bits: make of it what fits a workspace, and add that.
    rows = max(1, WORKSPACE_BYTES // (x.shape[1] * x.element_size()))
    for start in range(0, total.shape[0], rows):
        part = slice(start, start + rows)
        total[part].add_(logits[:, part].t() @ x)  # `+=` would copy the part onto itself as well


def _fwd(
    rows_kernel: Callable[..., None],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    rows, losses, correct, *gradients = _run(
        rows_kernel, None, hidden, weight, labels, ignore_index, label_smoothing, need_hidden, need_weight
    )
    if reduction == "none":
        loss = torch.zeros(labels.shape, device=labels.device) if rows else losses.view(labels.shape)
        if rows:
            loss[rows] = losses
    else:
        loss = losses.sum()
        if reduction == "mean":
            loss /= max(losses.numel(), 1)
    return loss, correct.sum(), labels.new_full((), losses.numel()), *gradients


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=torch.float32)
    gradients = _bwd_fake(loss, hidden, weight, labels, ignore_index, 0.0, need_hidden, need_weight, backend)
    return loss, labels.new_empty(()), labels.new_empty(()), *gradients


def _bwd(rows_kernel: Callable[..., None], grad_loss: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _run(rows_kernel, grad_loss, *args)[3:]


def _bwd_fake(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return grad_hidden, weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)


_FWD = backends.define(
    "linear_cross_entropy_fwd",
    "(Tensor hidden, Tensor weight, Tensor labels, int ignore_index, str reduction, float label_smoothing, "
    "bool need_hidden, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    {"cpu": partial(_fwd, _rows_cpu), "triton": partial(_fwd, _rows_triton)},
)
_BWD = backends.define(
    "linear_cross_entropy_bwd",
    "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor labels, int ignore_index, float label_smoothing, "
    "bool need_hidden, bool need_weight) -> (Tensor, Tensor)",
    _bwd_fake,
    {"cpu": partial(_bwd, _rows_cpu), "triton": partial(_bwd, _rows_triton)},
)


class _LinearCrossEntropy(torch.autograd.Function):
    """For one loss forward makes the gradients and backward scales them; for "none" backward makes them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        reduction: str,
        label_smoothing: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The counts have no gradients, rather than zeros.
        ctx.set_materialize_grads(False)
        need_hidden, need_weight = (need and reduction != "none" for need in ctx.needs_input_grad[:2])
        loss, correct, supervised, grad_hidden, grad_weight = _FWD(
            hidden, weight, labels, ignore_index, reduction, label_smoothing, need_hidden, need_weight, backend
        )
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, labels)
        else:
            # Of the sum, also for "mean": divided by the number of rows they would underflow in float16.
            ctx.save_for_backward(grad_hidden, grad_weight, supervised)
        ctx.settings = hidden.dtype, ignore_index, reduction, label_smoothing, backend
        ctx.mark_non_differentiable(correct, supervised)
        return loss, correct, supervised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        dtype, ignore_index, reduction, label_smoothing, backend = ctx.settings
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if reduction == "none":
            grad_hidden, grad_weight = _BWD(
                grad_loss, *ctx.saved_tensors, ignore_index, label_smoothing, need_hidden, need_weight, backend
            )
            grad_weight = grad_weight.to(dtype)
        else:
            grad_hidden, grad_weight, supervised = ctx.saved_tensors
            factor = grad_loss / supervised.clamp(min=1) if reduction == "mean" else grad_loss
            grad_hidden = _scaled(grad_hidden, factor, dtype) if need_hidden else None
            grad_weight = _scaled(grad_weight, factor, dtype) if need_weight else None
        return grad_hidden if need_hidden else None, grad_weight if need_weight else None, *[None] * 5


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · factor [] (fp32) in a new tensor of this dtype, multiplied in fp32."""
    if gradient.device.type == "cpu":
        return (gradient * factor).to(dtype)
    # CUDA would first round a factor without dimensions to the dtype of the gradient.
    return torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    return_accuracy: bool = False,
    backend: str | None = None,
) -> Tensor | LossAndAccuracy:
    """The cross entropy of `hidden weightᵀ` and `labels`: `reference` says which.

    Only rows with a label are multiplied, and at most 64 MiB of logits exist at a time. For "mean" and "sum"
    forward also makes the gradients and saves nothing else: that of `hidden`, in its dtype and full shape (a
    shape that depends on the labels would break `torch.compile(fullgraph=True)`), and if `weight` is trained
    its own in fp32; backward scales them into new tensors. For "none" the inputs are saved, and backward makes
    the logits again. Where no gradient is needed, none is made. Differentiable once, except on the reference.

    Args:
        hidden: [..., H] (fp32, fp16, bf16; fp64 on the reference; any strides).
        weight: [V, H] (the same dtype), frozen or trained. Autocast casts both to its dtype.
        labels: [...] (int64), a row of `weight`, or `ignore_index`.
        ignore_index: the label of the rows that count for nothing. None: every row has a label; on CUDA the host then
            does not wait to learn how many have one.
        reduction: "mean" over the rows with a label (0 if there is none), "sum" or "none".
        label_smoothing: from 0 to 1.
        return_accuracy: return the loss and two counts.
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        The loss (fp32): [], or for "none" [...] with 0 where the label is `ignore_index`.

    Raises:
        ValueError, TypeError: an argument is wrong.
        IndexError: a label is neither a row of `weight` nor `ignore_index`. On CUDA nothing is raised, for the
            host would have to wait: the loss is NaN, and so is the row's gradient.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: logits and their gradient are rounded to the dtype of `hidden`, as in eager PyTorch; between them all
    is fp32, and so is the sum of the gradient of `weight` over chunks. Deterministic.
    """
    # What `check` and `OP.select` would find, in less time than a small call takes: then a mean is PyTorch's own.
    if (
        reduction == "mean"
        and not (ignore_index is None or label_smoothing or return_accuracy or backend or backends._requested)
        and not _is_compiling()
        and 0 < _look(hidden, weight, labels, ignore_index) < LEAST["work"]
    ):
        logits = _linear(hidden, weight)
        if logits.dtype is not _FP32:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if labels.dim() > 1:
            logits, labels = logits.flatten(0, -2), labels.flatten()
        return _cross_entropy(logits, labels, None, 1, ignore_index, 0.0)
    call = check(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        return_accuracy=return_accuracy,
    )
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call)
    if torch.is_grad_enabled() and (call.hidden.requires_grad or call.weight.requires_grad):
        result = LossAndAccuracy(*_LinearCrossEntropy.apply(*call[:6], chosen))
    else:
        result = LossAndAccuracy(*_FWD(*call[:6], False, False, chosen)[:3])
    return result if return_accuracy else result.loss
