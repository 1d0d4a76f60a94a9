"""The loss on held-out samples, by which the best model of a stage is chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmfast.evaluate.samples import open_samples, world_split
from mmfast.train.batches import MicroBatch, batches_in_order
from mmfast.train.config import TrainConfig
from mmfast.train.rng import rng_state, set_rng_state
from mmfast.train.step import autocast

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mmfast.data import JoinedDataset, Processor
    from mmfast.models.base import MultimodalModel

__all__ = ["HeldOut", "HeldOutResult", "held_out_loss"]


@dataclass(frozen=True)
class HeldOutResult:
    """Sums over all held-out samples and processes."""

    loss: float
    """Mean over the supervised tokens; NaN or infinite if any sample's is."""
    token_accuracy: float
    """Share of the supervised tokens whose largest logit is the label."""
    supervised_tokens: int


class HeldOut:
    """The held-out samples of a run, opened before anything trains; none if the configuration names none.

    Raises:
        OSError: If a source cannot be read.
        ValueError: If it is not one.
    """

    def __init__(self, config: TrainConfig) -> None:
        data = config.eval_data or []
        names = [data] if isinstance(data, str) else data
        self._opened = [(name, *open_samples(name, config.media_folder)) for name in names]
        self._num_workers = config.num_workers
        self._read = False

    def dataset(self, processor: Processor) -> JoinedDataset | None:
        """The samples for a stage's processor, or None. Reads every medium once, as it is too late after hours.

        Raises:
            ValueError: If a sample cannot be read or has no supervised token; the message names it.
        """
        from mmfast.data import EncodedDataset, JoinedDataset, check_supervision

        if not self._opened:
            return None
        datasets = []
        for name, samples, folder in self._opened:
            datasets.append(EncodedDataset(samples, processor, folder))
            if world_split(name) is None:
                check_supervision(datasets[-1])
        joined = JoinedDataset(datasets)
        if not self._read:
            for _ in batches_in_order(joined, 1, self._num_workers):
                pass
            self._read = True
        return joined


@torch.no_grad()
def held_out_loss(
    model: MultimodalModel,
    batches: Iterable[MicroBatch],
    accelerator: Accelerator,
    dtype: torch.dtype,
    divided: bool = True,
) -> HeldOutResult:
    """The mean loss per supervised token, without logits and one micro-batch at a time.

    The model is in evaluation mode meanwhile and in training mode afterwards; the random state stays as it was, so that
    a run that measures goes on as one that does not.

    Args:
        model: The model.
        batches: The micro-batches of this process.
        accelerator: Says where to compute, and sums over processes.
        dtype: bfloat16 computes under autocast.
        divided: Whether each process has a share of the micro-batches, and not all of them.
    """
    device = accelerator.device
    random = rng_state(device)
    model.eval()
    loss, correct, supervised = 0.0, 0, 0
    try:
        for batch in batches:
            inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
            with autocast(device, dtype):
                output = model(**inputs, loss_reduction="sum")
            loss += output.loss.item()
            correct += int(output.correct_tokens)
            supervised += int(output.supervised_tokens)
    finally:
        model.train()
        set_rng_state(random, device)
    if accelerator.num_processes > 1 and divided:
        sums = torch.tensor([loss, correct, supervised], dtype=torch.float64, device=device)
        summed: Any = accelerator.reduce(sums, reduction="sum")
        loss, correct, supervised = summed[0].item(), int(summed[1]), int(summed[2])
    return HeldOutResult(loss / supervised, correct / supervised, supervised)
