"""The micro-batches of each optimiser step, from any step on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mmfast.data import BatchPlan, EncodedDataset, JoinedDataset

if TYPE_CHECKING:
    from mmfast.data import Processor
    from mmfast.data.processor import Encoded

__all__ = ["IGNORE_INDEX", "MicroBatch", "batches_in_order", "make_micro_batches", "micro_batch", "training_windows"]

IGNORE_INDEX = -100
_TEXT_INPUTS = {"input_ids", "attention_mask", "labels", "sample_lengths", "media_tokens", "label_rows"}
_GRACE_SECONDS = 15
# Sizes of samples, which are asked for twice: where micro-batches are made and where they are counted.
_REMEMBERED = 2**16


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass gets."""

    ids: list[str]
    """The samples' ids, for messages."""
    inputs: dict[str, Tensor]
    """Arguments of `MultimodalModel.forward`, on the CPU: input_ids, labels, where there are media those of the model,
    and what the host knows of them, so that it need not ask the device: sample_lengths, media_tokens, label_rows."""
    tokens: int
    """All tokens that are not padding."""
    bad: tuple[str, ...] = ()
    """Errors of the bad samples in whose place others stand."""

    @property
    def kind(self) -> str:
        """ "media" if any sample has one, else "text"."""
        return "media" if self.inputs.keys() - _TEXT_INPUTS else "text"

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory; the loader calls it where there is a GPU."""
        return replace(self, inputs={name: value.pin_memory() for name, value in self.inputs.items()})


def micro_batch(ids: list[str], inputs: dict[str, Tensor]) -> MicroBatch:
    """What `Processor.collate` (with padding on the right) or `Processor.pack` made of samples, as a micro-batch."""
    inputs = dict(inputs)
    mask = inputs.pop("attention_mask", None)
    if mask is not None:
        inputs["sample_lengths"] = mask.sum(1)
    # The first token of a row is never predicted.
    next_labels = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    inputs["label_rows"] = (next_labels.flatten() != IGNORE_INDEX).nonzero().flatten()
    return MicroBatch(ids, inputs, int(inputs["sample_lengths"].sum()))


def training_windows(
    dataset: EncodedDataset | JoinedDataset,
    plan: BatchPlan,
    steps: range,
    micro_batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    split_kinds: bool = False,
    packing: bool = False,
    group_by_length: bool = False,
) -> Iterator[list[MicroBatch]]:
    """Yields one optimiser step's micro-batches of this process after the other.

    Args:
        dataset: The encoded samples.
        plan: Which samples form which step, over all processes.
        steps: The steps of the stage that are wanted, counted from 0.
        micro_batch_size: Samples per micro-batch; the last of a step may have fewer.
        num_workers: Processes that prepare micro-batches. The result does not depend on it.
        rank: Number of this process. It takes every `world_size`-th sample of a step; a small last batch of
            an epoch may leave it without any.
        world_size: Number of processes.
        split_kinds: Micro-batches hold samples with media or samples without, never both: one is divided in two.
        packing: The samples of a micro-batch share one row without padding.
        group_by_length: The samples of a step are sorted by kind and length before they are divided.
    """
    key = lru_cache(_REMEMBERED)(dataset.rough_size) if group_by_length else None
    windows = _Windows(plan, steps, micro_batch_size, rank, world_size, key)
    batches = _load(dataset, (chunk for window in windows for chunk in window), num_workers, split_kinds, packing)
    for window in windows:
        yield [batch for _ in window for batch in next(batches)]


def batches_in_order(
    dataset: EncodedDataset | JoinedDataset,
    micro_batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    split_kinds: bool = False,
) -> Iterator[MicroBatch]:
    """Yields every sample of this process once, in micro-batches; arguments as those of `training_windows`."""
    share = range(rank, len(dataset), world_size)
    chunks = (list(share[start : start + micro_batch_size]) for start in range(0, len(share), micro_batch_size))
    for batches in _load(dataset, chunks, num_workers, split_kinds):
        yield from batches


def make_micro_batches(
    dataset: EncodedDataset | JoinedDataset, indices: Sequence[int], split_kinds: bool = False, packing: bool = False
) -> list[MicroBatch]:
    """These samples together, as `training_windows` would give them."""
    return _Collate(dataset.processor, split_kinds, packing)([dataset[index] for index in indices])


def _load(
    dataset: EncodedDataset | JoinedDataset,
    chunks: Iterable[list[int]],
    num_workers: int,
    split_kinds: bool,
    packing: bool = False,
) -> Iterator[list[MicroBatch]]:
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=chunks,  # type: ignore[arg-type]
        num_workers=num_workers,
        collate_fn=_Collate(dataset.processor, split_kinds, packing),
        worker_init_fn=_outlive_stop_signals,
        # An own generator: by default the loader draws from the global one, which dropout uses.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


@dataclass(frozen=True)
class _Windows:
    """The sample indices of each step's micro-batches in this process; may be gone through any number of times."""

    plan: BatchPlan
    steps: range
    micro_batch_size: int
    rank: int
    world_size: int
    key: Callable[[int], Any] | None

    def __iter__(self) -> Iterator[list[list[int]]]:
        size = self.micro_batch_size
        for batch in self.plan.batches(self.steps.start, self.steps.stop):
            if self.key:
                batch = sorted(batch, key=self.key)
            share = batch[self.rank :: self.world_size]
            yield [share[start : start + size] for start in range(0, len(share), size)]


@dataclass(frozen=True)
class _Collate:
    processor: Processor
    split_kinds: bool
    packing: bool

    def __call__(self, encoded: list[Encoded]) -> list[MicroBatch]:
        groups = [encoded]
        if self.split_kinds:
            groups = [[item for item in encoded if bool(item.media) is media] for media in (False, True)]
        return [self._batch(group) for group in groups if group]

    def _batch(self, group: list[Encoded]) -> MicroBatch:
        inputs = self.processor.pack(group) if self.packing else self.processor.collate(group)
        inputs["media_tokens"] = torch.tensor([sum(item.media_tokens) for item in group])
        bad = tuple(error for item in group for error in item.bad)
        return replace(micro_batch([item.id for item in group], inputs), bad=bad)


def _outlive_stop_signals(worker: int) -> None:
    # Ctrl-C and many schedulers signal the whole process group, but the step before the checkpoint still needs its
    # batches. SIGTERM only delays the end: it is also how an exiting parent gets rid of its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_SECONDS))
