"""Features of a model's frozen parts, kept on the disk: each medium is encoded once, and in no later step or run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from mmfast.data.features import FeatureCache
from mmfast.data.samples import content_parts
from mmfast.models.stages import Stage, StagedModel

if TYPE_CHECKING:
    from mmfast.data import Processor
    from mmfast.data.samples import Sample

__all__ = ["FEATURE_INPUTS", "CachingModel"]

FEATURE_INPUTS = ("features", "has_features")
"""What a model takes in place of media: rows of features, and bool [n], which of all media they are of."""
# Of a configuration: where its folder was and who wrote it, which changes no feature.
_NOT_STRUCTURE = ("_name_or_path", "transformers_version")


class CachingModel(StagedModel):
    """The half of a model that knows what its frozen parts make of media, and keeps that on the disk.

    Attributes:
        processor: Reads media, and what was kept of them.
    """

    no_feature_cache: ClassVar[str | None] = None
    """Why no features of media can be cached, for a system where something trains below all of them."""

    processor: Any  # transformers evaluates this annotation

    @property
    def cached_parts(self) -> tuple[str, ...]:
        """Names of the parts that `frozen_features` runs."""
        return ("encoder",)

    def frozen_features(self, pixel_values: Tensor) -> Tensor:
        """What the frozen parts make of media, [rows, P, D]; no training changes it, so a cache may keep it.

        Its parameters are `media_inputs`, as far as the processor's `collate_media` gives them.
        """
        return self.encoder(pixel_values)

    def _all_features(self, features: Tensor | None, has_features: Tensor | None, **media: Tensor | None) -> Tensor:
        """`frozen_features` of the media of a batch, and those that are given, in the order of the batch.

        Args:
            features: [k, P, D]; None where none are given.
            has_features: bool [rows], which rows are given.
            **media: What `frozen_features` takes; None where all are given.

        Raises:
            ValueError: If there are other numbers of rows.
        """
        present = {name: value for name, value in media.items() if value is not None}
        made = cast(Any, self).frozen_features(**present) if present or features is None else features[:0]
        if features is None and has_features is None:
            return made
        given = made[:0] if features is None else features.to(made.device)
        rows = torch.ones(len(given)) if has_features is None else has_features
        rows = rows.bool()
        told, counts = [int((~rows).sum()), int(rows.sum())], [len(made), len(given)]
        if told != counts:
            raise ValueError(
                f"{type(self).__name__}: {counts[0]} rows are given by media and {counts[1]} by features, but "
                f"has_features tells of {told[0]} and {told[1]}; equal numbers are accepted; let the processor make "
                "them"
            )
        joined = made.new_empty(len(rows), *given.shape[1:], dtype=torch.promote_types(made.dtype, given.dtype))
        for mask, values in ((rows, given), (~rows, made)):
            # Of a mask on the CPU, the indices are found there: nobody waits for the device.
            indices = mask.nonzero().flatten().to(joined.device, non_blocking=True)
            joined[indices] = values.to(joined.dtype)
        return joined

    def fill_feature_cache(
        self,
        folder: str | Path,
        samples: Sequence[Sample],
        media_folder: str | os.PathLike[str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> int:
        """Puts what the frozen parts make of all media of `samples` on the disk, and has the processor read it there.

        These parts are the same in every epoch and run, and so is what they see: they then run once per medium.
        Features of other weights, another layer, dtype or preprocessing have other keys, and damaged files are made
        again. Call it in the stage and under the autocast that training has; another stage ends the cache's use.

        Args:
            folder: The cache's folder; other runs, and processes at the same time, may share it.
            samples: Their media are encoded where they are not in the cache.
            media_folder: Where the samples' paths start.
            rank: Number of this process. It encodes every `world_size`-th medium.
            world_size: Number of processes.
            num_workers: Processes that read media.

        Returns:
            How many media this process encoded.

        Raises:
            ValueError: If the system has no features to cache; or as the processor's `read_media`.
            OSError: If a file cannot be written, as on a full disk.
        """
        if self.no_feature_cache is not None:
            raise ValueError(f"{type(self).__name__}: no features can be cached, since {self.no_feature_cache}")
        return _fill(self, folder, samples, media_folder, rank, world_size, num_workers)

    def set_stage(self, stage: Stage) -> None:
        """As in `StagedModel`. What trains decides which features may be cached, so a cache is used no longer."""
        super().set_stage(stage)
        if self.processor is not None:
            self.processor.cache = None


@torch.no_grad()
def _fill(
    model: CachingModel,
    folder: str | Path,
    samples: Sequence[Sample],
    media_folder: str | os.PathLike[str] | None,
    rank: int,
    world_size: int,
    num_workers: int,
) -> int:
    """See `CachingModel.fill_feature_cache`."""
    processor = model.processor
    device = cast(Any, model).device
    cache = FeatureCache(folder, _revision(model, processor))
    missing = _missing(cache, processor, samples, media_folder, rank, world_size)
    # Read without the cache, which would answer for what is to be made.
    processor.cache = None
    training = model.training
    model.eval()
    loader: DataLoader[Any] = DataLoader(
        _Media(missing, processor, samples, media_folder),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    # Without a terminal there is no bar.
    for key, medium in tqdm(loader, desc="feature cache", unit=" media", disable=None):
        inputs = {name: value.to(device) for name, value in processor.collate_media([medium]).items()}
        # Each medium by itself: its features depend on nothing else that is encoded.
        cache.put(key, model.frozen_features(**inputs))
    model.train(training)
    processor.cache = cache
    return len(missing)


class _Media(Dataset[Any]):
    """The media that are to be encoded, each with its key; read when asked for, in whatever process."""

    def __init__(
        self,
        places: list[tuple[str, int, int]],
        processor: Processor,
        samples: Sequence[Sample],
        media_folder: str | os.PathLike[str] | None,
    ) -> None:
        self.places, self.processor, self.samples, self.media_folder = places, processor, samples, media_folder

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        if index >= len(self.places):
            raise IndexError(index)
        key, sample, part = self.places[index]
        found = self.samples[sample]
        return key, self.processor.read_media(_media_of(found)[part], self.media_folder, found["id"])


def _missing(
    cache: FeatureCache,
    processor: Processor,
    samples: Sequence[Sample],
    media_folder: str | os.PathLike[str] | None,
    rank: int,
    world_size: int,
) -> list[tuple[str, int, int]]:
    """This process's share of the media that are not in the cache: (key, sample, which medium of it)."""
    places, seen = [], set()
    for index in range(len(samples)):
        sample = samples[index]
        for number, part in enumerate(_media_of(sample)):
            key = processor.cache_key(part, media_folder, sample["id"])
            if key is None or key in seen:
                continue
            seen.add(key)
            if len(seen) % world_size == rank and not cache.holds(key):
                places.append((key, index, number))
    return places


def _media_of(sample: Sample) -> list[Any]:
    parts = (part for message in sample["messages"] for part in content_parts(message))
    return [part for part in parts if part["type"] != "text"]


def _revision(model: CachingModel, processor: Processor) -> str:
    """What decides the features of a medium: the weights that run, what runs them, its dtype, the preprocessing."""
    digest = hashlib.sha256()
    for part in model.cached_parts:
        module = getattr(model, part)
        digest.update(f"{module!r} {json.dumps(_structure(module), sort_keys=True, default=str)}".encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    kind = cast(Any, model).device.type
    computed_in = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return f"{cast(Any, model).system} {digest.hexdigest()} autocast {computed_in}\n{processor.preprocessing()}"


def _structure(module: nn.Module) -> dict[str, Any]:
    config = getattr(module, "config", None)
    settings = {} if config is None else config.to_dict()
    return {name: value for name, value in settings.items() if name not in _NOT_STRUCTURE}


def _as_it_is(item: Any) -> Any:
    return item
