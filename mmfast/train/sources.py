"""The data of a run, opened and tried before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from mmfast.data.budget import allowed_bad
from mmfast.evaluate.samples import open_samples, world_split
from mmfast.train.config import StageConfig, TrainConfig
from mmfast.train.setup import stage_processor

if TYPE_CHECKING:
    from mmfast.data import JoinedDataset, Processor, Sample
    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage

__all__ = ["Sources", "check_first_samples"]

# Samples, at the most, of which one at least must be good for a run to start.
_MOST_TRIED = 100
# About a minute of tokenising; a sample further on is checked when it is read, and named all the same.
_CHECKED_AT_START = 50_000


class Sources:
    """The data of all stages, opened before anything trains, each once."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._opened: dict[tuple[str, str | None], Any] = {}
        for stage in config.stages:
            self.of(stage)

    def of(self, stage: StageConfig) -> list[tuple[str, Sequence[Sample], str | None]]:
        """Name, samples and media folder of each source of a stage."""
        data, folder = stage.data or self._config.data, stage.media_folder or self._config.media_folder
        found = []
        for name in [data] if isinstance(data, str) else cast(list[str], data):
            if (name, folder) not in self._opened:
                # With a budget a malformed sample counts as any other bad one.
                strict = str(self._config.max_bad) == "0"
                self._opened[name, folder] = open_samples(name, folder, strict)
            found.append((name, *self._opened[name, folder]))
        return found

    def allowed_bad(self, stage: StageConfig) -> int:
        """How many samples of a stage may be bad."""
        return allowed_bad(self._config.max_bad, sum(len(samples) for _, samples, _ in self.of(stage)))

    def joined(self, stage: StageConfig, processor: Processor) -> tuple[JoinedDataset, list[int]]:
        """The samples of a stage, and the indices of the longest of them, as far as they were counted."""
        from mmfast.data import EncodedDataset, JoinedDataset, check_supervision

        datasets = []
        heaviest: list[tuple[int, int]] = []
        left = allowed = self.allowed_bad(stage)
        for name, samples, media_folder in self.of(stage):
            datasets.append(EncodedDataset(samples, processor, media_folder))
            if world_split(name) is None:
                # Samples from a file can be wrong; those of the embedded world are made, at a cost, when they are read.
                start = sum(map(len, datasets[:-1]))
                report = check_supervision(datasets[-1], _CHECKED_AT_START, left)
                left -= report.bad
                heaviest += [(tokens, start + index) for tokens, index in report.heaviest]
        return JoinedDataset(datasets, allowed), [index for _, index in sorted(heaviest, reverse=True)]


def check_first_samples(model: MultimodalModel, stages: Sequence[Stage], config: TrainConfig, sources: Sources) -> None:
    """Has each stage read the beginning of each of its sources, so that what never fits is refused at once.

    Raises:
        ValueError: If there is no good sample among the first; as `check_supervision`.
    """
    from mmfast.data import EncodedDataset, check_supervision

    for stage, own in zip(stages, config.stages, strict=True):
        processor = stage_processor(model, stage, own, config.max_length)
        for _, samples, folder in sources.of(own):
            allowed = min(sources.allowed_bad(own), _MOST_TRIED - 1, len(samples) - 1)
            check_supervision(EncodedDataset(samples, processor, folder), limit=allowed + 1, max_bad=allowed)
