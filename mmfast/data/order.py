"""The order of training: pure functions of the seed, so that a run continues anywhere without replaying data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `range(num_samples)` for one epoch, int64 [num_samples]; depends on nothing else.

    Raises:
        ValueError: a negative `num_samples` or `epoch`.
    """
    if num_samples < 0 or epoch < 0:
        raise ValueError(f"epoch_order: num_samples is {num_samples} and epoch is {epoch}; both must be >= 0")
    # Hashed, not added: seed 1 in epoch 0 must not repeat seed 0 in epoch 1.
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(num_samples, generator=generator)


@dataclass(frozen=True)
class BatchPlan:
    """Which samples form which batch, for every step of a run; batches are counted over all epochs from 0.

    Args:
        num_samples: size of the data set, at least 1.
        batch_size: samples of one batch over all processes; the last batch of an epoch may have fewer.
        seed: of the order.
        drop_last: leave out the samples of an epoch that fill no batch (other ones every epoch).

    Raises:
        ValueError: no samples, no batch size, or `drop_last` with fewer samples than one batch.
    """

    num_samples: int
    batch_size: int
    seed: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1:
            raise ValueError(
                f"BatchPlan: num_samples is {self.num_samples} and batch_size is {self.batch_size}; both must be >= 1"
            )
        if self.drop_last and self.num_samples < self.batch_size:
            raise ValueError(
                f"BatchPlan: {self.num_samples} samples fill no batch of {self.batch_size}; expected at least one "
                "batch; lower batch_size or keep the last batch (drop_last=False)"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the data."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of batch `step` and its position in that epoch."""
        if step < 0:
            raise ValueError(f"BatchPlan: step is {step}; expected >= 0")
        return divmod(step, self.batches_per_epoch)

    def batches(self, start: int, stop: int | None = None) -> Iterator[list[int]]:
        """The sample indices of the batches `start`, …, `stop` - 1 (without end if `stop` is None).

        Beginning at `start` costs one permutation, however far it is.
        """
        epoch, position = self.locate(start)
        step = start
        while stop is None or step < stop:
            order = epoch_order(self.num_samples, self.seed, epoch)
            while position < self.batches_per_epoch and (stop is None or step < stop):
                begin = position * self.batch_size
                yield order[begin : begin + self.batch_size].tolist()
                position += 1
                step += 1
            epoch, position = epoch + 1, 0

    def batch(self, step: int) -> list[int]:
        """The sample indices of batch `step`."""
        return next(self.batches(step))
