"""One optimiser step: gradients of a window of micro-batches, their reduction over processes, and their checks."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmfast.train.batches import IGNORE_INDEX, MicroBatch, micro_batch
from mmfast.train.sharding import is_sharded, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage
    from mmfast.train.config import StageConfig

__all__ = [
    "WindowResult",
    "accumulate_gradients",
    "autocast",
    "build_optimizer",
    "check_gradients",
    "check_optimizer",
    "clip_gradients",
    "clip_groups",
    "held_frozen",
    "untrained",
]

_NAMED = 6
# The first release whose 8-bit optimiser runs on CPUs too.
_BITSANDBYTES = (0, 50)
# The kinds of micro-batches, each with the other one.
_OTHER = {"media": "text", "text": "media"}
# Gradients are summed over processes in buffers of about this size.
_BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class WindowResult:
    """Sums over a window of micro-batches and all processes."""

    loss: float
    """Mean over the supervised tokens."""
    supervised_tokens: int
    correct_tokens: int
    tokens: int
    """All tokens that are not padding."""
    media: int
    """Rows of the media that went in; 0 where there was text alone."""
    kinds: frozenset[str]
    """Kinds of its micro-batches: "media", "text"."""
    bad: int
    """Bad samples that were replaced in it."""
    norms: tuple[float, ...] = ()
    """What `clip` gave."""


def check_optimizer(name: str) -> None:
    """Refuses an optimiser that cannot run here, before anything is loaded.

    Raises:
        ImportError: If it needs a package that is missing or too old.
    """
    if name != "adamw_8bit":
        return
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        found = "missing"
    if found == "missing" or tuple(map(int, found.split(".")[:2])) < _BITSANDBYTES:
        least = ".".join(map(str, _BITSANDBYTES))
        raise ImportError(
            f"train: optimizer is adamw_8bit, for which bitsandbytes {least} or newer is accepted, but it is {found}; "
            f'pip install "bitsandbytes>={least}", or use the optimizer adamw'
        )


def build_optimizer(
    model: MultimodalModel, stage: Stage, config: StageConfig, optimizer: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW over the stage's parameter groups; weight decay acts on matrices only.

    Each group has the name of its part and, as `peak_lr`, the rate that the schedule scales.

    Args:
        model: A model in the stage `stage`.
        stage: What trains, with its learning rates.
        config: Gives the betas and the weight decay.
        optimizer: "adamw", or "adamw_8bit" for moments in 8 bits, see `mmfast.train.eight_bit`.
    """
    # The biases of several experts stand in one matrix.
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    groups = []
    for part in model.parameter_groups(stage):
        matrices = [p for p in part["params"] if p.ndim >= 2 and id(p) not in biases]
        vectors = [p for p in part["params"] if p.ndim < 2 or id(p) in biases]
        for params, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if params:
                group = {"name": part["name"], "params": params, "lr": part["lr"], "peak_lr": part["lr"]}
                groups.append(group | {"weight_decay": decay})
    if optimizer == "adamw_8bit":
        # Its import warns of a package for products of 4-bit matrices, which are not made here.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        from mmfast.train.eight_bit import AdamW8bit

        reduced: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas)
        return reduced
    # Fused is the fastest form on CPUs too: for 60 small tensors 0.35 ms, against 1.1 (foreach) and 1.8.
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)


def accumulate_gradients(
    model: MultimodalModel,
    window: Sequence[MicroBatch],
    accelerator: Accelerator,
    dtype: torch.dtype,
    stage: Stage | None = None,
    clip: Callable[[], list[Tensor]] | None = None,
) -> WindowResult:
    """Adds to the gradients those of the window's mean loss per supervised token.

    The mean is over the tokens of the whole window and of all processes, so neither the micro-batch size nor the
    number of processes changes the result: each micro-batch adds the sum of its losses divided by that number.

    In a stage with routes a part gets gradients from micro-batches of its kind alone, and the mean is over the tokens
    of that kind: exactly the step that it would make without the others.

    A sharded model computes in all processes at once, so a process with fewer micro-batches than others runs ones
    without a supervised token in the end.
    The host waits for the device once, at the end.

    Args:
        model: The model in training mode, sharded or whole; its gradients are zero or None.
        window: The micro-batches of one step on this process; may be empty.
        accelerator: Says where to compute, and sums over processes.
        dtype: bfloat16 computes under autocast.
        stage: The stage that the model is in, for its routes; with these each micro-batch is of one kind.
        clip: Called when the gradients are whole, with `clip_gradients` in it; its norms are read with the sums.
    """
    device = accelerator.device
    media_inputs = (*model.media_inputs, "features")
    counts = [
        *(sum(len(batch.inputs["label_rows"]) for batch in window if batch.kind == kind) for kind in _OTHER),
        sum(batch.tokens for batch in window),
        sum(len(batch.inputs[name]) for batch in window for name in media_inputs if name in batch.inputs),
        sum(len(batch.bad) for batch in window),
    ]
    *by_kind, tokens, media, bad = _sum_over_processes(counts, accelerator)
    own, supervised = dict(zip(_OTHER, by_kind, strict=True)), sum(by_kind)
    routes = stage.routes if stage else None
    others = untrained(model, stage)
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    sharded = is_sharded(model)
    for batch in _in_step(model, window, accelerator, routes is not None) if sharded else window:
        inputs = {
            name: value if name in model.host_inputs else value.to(device, non_blocking=True)
            for name, value in batch.inputs.items()
        }
        with held_frozen(others[batch.kind]):
            with autocast(device, dtype):
                output = model(**inputs, loss_reduction="sum")
            part = output.loss / (supervised if routes is None else own[batch.kind])
            # A text-only micro-batch has no path to the connector, and nothing to add if that alone trains.
            if part.requires_grad:
                part.backward()
        loss += output.loss.detach() / supervised
        correct += output.correct_tokens
    if accelerator.num_processes > 1:
        if not sharded:
            _sum_gradients(model, accelerator)
        loss, correct = accelerator.reduce((loss, correct), reduction="sum")  # type: ignore[assignment]
    kinds = frozenset(kind for kind, count in own.items() if count)
    norms = clip() if clip else []
    # In one tensor, to wait once; float32 has every whole number up to 2^24, and so every count of a window.
    mean, correct_tokens, *read = torch.stack([loss, correct.float(), *(norm.float() for norm in norms)]).tolist()
    return WindowResult(mean, supervised, int(correct_tokens), tokens, media, kinds, bad, tuple(read))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """In which the model computes: none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def untrained(model: MultimodalModel, stage: Stage | None) -> dict[str, list[nn.Parameter]]:
    """For each kind of micro-batch what the stage trains, but not with such samples."""
    routes = stage.routes if stage else None
    return {kind: [] if routes is None else _trained(model, routes[_OTHER[kind]]) for kind in _OTHER}


def clip_groups(model: MultimodalModel, stage: Stage) -> list[list[nn.Parameter]]:
    """What is clipped together: all that trains, or that of each kind of samples where these train different parts."""
    routes = [tuple(stage.train)] if stage.routes is None else stage.routes.values()
    return [_trained(model, parts) for parts in routes]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to a global norm of at most `max_norm` (0: never) and returns the norm before, []."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def check_gradients(model: MultimodalModel, stage: Stage, window: Sequence[MicroBatch]) -> dict[str, int]:
    """Checks that everything that trains got a gradient that says something.

    What the model names in `zero_at_first` is excepted: LoRA's A has no gradient before B has left zero.

    Returns:
        How many tensors of each part have one.

    Raises:
        RuntimeError: If a trainable tensor has no gradient, or a gradient of zeros; the message names the parts
            and the first tensors, and the samples.
    """
    problems, counts = [], {}
    for part in stage.train:
        named = model.part_parameters(part)
        counts[part] = sum(p.requires_grad for p in named.values())
        missing = [name for name, p in named.items() if p.requires_grad and p.grad is None]
        zero = [
            name
            for name, p in named.items()
            if p.grad is not None
            and not any(fnmatch(name, pattern) for pattern in model.zero_at_first)
            and not bool(whole(p.grad).any())
        ]
        for kind, names in (("no gradient", missing), ("a gradient of zeros", zero)):
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                problems.append(f"{part}: {len(names)} tensors have {kind} ({', '.join(names[:_NAMED])}{more})")
    if problems:
        ids = [sample for batch in window for sample in batch.ids]
        raise RuntimeError(
            f"train: in stage {stage.name}, after its first step, {'; '.join(problems)}; every tensor that trains "
            f"must have a gradient; take the part out of the stage, or look at the samples {', '.join(ids[:_NAMED])}"
        )
    return counts


def _trained(model: MultimodalModel, parts: Sequence[str]) -> list[nn.Parameter]:
    return [p for part in parts for p in model.part_parameters(part).values() if p.requires_grad]


@contextmanager
def held_frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """None of them gets a gradient inside."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _sum_over_processes(counts: list[int], accelerator: Accelerator) -> list[int]:
    if accelerator.num_processes == 1:
        return counts
    total: Any = accelerator.reduce(torch.tensor(counts, device=accelerator.device), reduction="sum")
    return [int(count) for count in total.tolist()]


def _in_step(
    model: MultimodalModel, window: Sequence[MicroBatch], accelerator: Accelerator, by_kind: bool
) -> list[MicroBatch]:
    """The micro-batches of this process with as many idle ones as it has fewer than another process.

    With `by_kind` all processes run those with media first, then those of text alone.
    """
    kinds = list(_OTHER) if by_kind else ["text"]
    groups = [[batch for batch in window if not by_kind or batch.kind == kind] for kind in kinds]
    sizes = torch.tensor([[len(group) for group in groups]], device=accelerator.device)
    most: Any = accelerator.gather(sizes)
    return [
        batch
        for kind, group, size in zip(kinds, groups, most.amax(0).tolist(), strict=True)
        for batch in (*group, *[_idle_batch(model, kind)] * (size - len(group)))
    ]


def _idle_batch(model: MultimodalModel, kind: str) -> MicroBatch:
    """A short micro-batch of this kind without a supervised token: its loss and its gradients are zero."""
    if kind == "media":
        inputs = model.example_inputs(1, model.example_media(1)[1] + 2)
    else:
        ids = torch.zeros(1, 2, dtype=torch.int64)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return micro_batch([], {**inputs, "labels": torch.full_like(inputs["input_ids"], IGNORE_INDEX)})


def _sum_gradients(model: nn.Module, accelerator: Accelerator) -> None:
    """Sums the gradients over processes. One without samples, or without images, takes part with zeros."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64, device=accelerator.device)
    anywhere: Any = accelerator.reduce(present, reduction="sum")
    taking_part = [p for p, count in zip(parameters, anywhere.tolist(), strict=True) if count]
    for parameter in taking_part:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([cast(Tensor, parameter.grad) for parameter in taking_part]):
        summed: Any = accelerator.reduce(torch.cat([gradient.flatten() for gradient in bucket]), reduction="sum")
        for gradient, values in zip(bucket, summed.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(values.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, together no larger than a bucket unless a single one is."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        bucket: list[Tensor] = []
        size = 0
        for gradient in gradients:
            if gradient.dtype != dtype:
                continue
            if bucket and size + gradient.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(gradient)
            size += gradient.nbytes
        yield bucket
