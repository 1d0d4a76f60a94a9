"""A data set of encoded samples, made when asked for, and the check that every sample teaches something."""

from __future__ import annotations

import heapq
import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import ConcatDataset, Dataset

from mmfast.data.budget import spent_budget
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import Sample, content_parts

# As many as the largest micro-batch that is likely.
_HEAVIEST = 256
# Of English text; only their order matters.
_CHARACTERS_PER_TOKEN = 4


class EncodedDataset(Dataset[Encoded]):
    """Samples encoded by a processor, one at a time when indexed; nothing is kept.

    Args:
        samples: a list or any sequence, also one that makes its samples when indexed.
        processor: encodes them.
        media_folder: where image paths start.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        media_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.samples = samples
        self.processor = processor
        self.media_folder = media_folder

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        """The encoded sample.

        Raises:
            ValueError: as `Processor.encode`; or the sample has no supervised token.
        """
        encoded = self.processor.encode(self.samples[index], media_folder=self.media_folder)
        if encoded.supervised_tokens == 0:
            raise ValueError(f"sample '{encoded.id}' {_reason(self.processor)}")
        return encoded

    def rough_size(self, index: int) -> tuple[bool, int]:
        """Whether the sample has media, and about its length: characters of text, and four for each media token.

        Reads and tokenises nothing. (False, 0) of a bad sample, whose error comes when it is encoded.
        """
        try:
            parts = [part for message in self.samples[index]["messages"] for part in content_parts(message)]
            text = sum(len(part["text"]) for part in parts if part["type"] == "text")
        except (ValueError, KeyError, TypeError):
            return False, 0
        media = sum(part["type"] != "text" for part in parts)
        return media > 0, text + _CHARACTERS_PER_TOKEN * self.processor.tokens_per_image * media


class JoinedDataset(ConcatDataset[Encoded]):
    """Data sets of one processor, one after the other; training shuffles over all.

    In the place of a bad sample stands the next good one, which has the errors as `Encoded.bad`. That depends on the
    data alone: not on the order, nor on who reads.

    Args:
        datasets: at least one.
        max_bad: how many samples may be bad; as many in a row are replaced. With 0 the first raises its error.
    """

    def __init__(self, datasets: Sequence[EncodedDataset], max_bad: int = 0) -> None:
        super().__init__(datasets)
        self.parts = list(datasets)
        self.processor = datasets[0].processor
        self.max_bad = max_bad

    def rough_size(self, index: int) -> tuple[bool, int]:
        """As `EncodedDataset.rough_size`."""
        part = bisect_right(self.cumulative_sizes, index)
        return self.parts[part].rough_size(index - (self.cumulative_sizes[part - 1] if part else 0))

    def __getitem__(self, index: int) -> Encoded:
        """The encoded sample, or the one in its place.

        Raises:
            ValueError: as `EncodedDataset`; or more samples in a row are bad than may be, it names them.
        """
        errors: list[str] = []
        for offset in range(len(self)):
            try:
                encoded = super().__getitem__((index + offset) % len(self))
            except ValueError as error:
                if self.max_bad == 0:
                    raise
                errors.append(str(error))
                if len(errors) > self.max_bad:
                    break
            else:
                return replace(encoded, bad=tuple(errors)) if errors else encoded
        raise ValueError(spent_budget(errors, self.max_bad))


@dataclass(frozen=True)
class SupervisionReport:
    """What `check_supervision` counted: samples, tokens (image tokens included), tokens that are learned, bad ones."""

    samples: int
    tokens: int
    supervised_tokens: int
    longest: int
    heaviest: list[tuple[int, int]]
    """(tokens, index) of the longest samples, the longest first: what a training step is tried with."""
    bad: int = 0


def check_supervision(dataset: EncodedDataset, limit: int | None = None, max_bad: int = 0) -> SupervisionReport:
    """Refuses a data set in which a sample has no supervised token; decodes no media.

    Args:
        dataset: to check.
        limit: look at the first `limit` samples only. The others are checked when they are indexed.
        max_bad: how many samples may have none, or be bad in another way that shows without their media.

    Raises:
        ValueError: names the first of these samples and their number; or as `Processor.encode`; or the data set is
            empty.
    """
    from tqdm import tqdm

    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count < 1:
        raise ValueError(f"check_supervision: {len(dataset)} samples, limit is {limit}; expected at least one sample")
    supervised = 0
    lengths = array("l")
    unsupervised: list[str] = []
    errors: list[str] = []
    for index in tqdm(range(count), desc="checking samples", unit="sample", disable=count <= 2000):
        try:
            encoded = dataset.processor.encode(
                dataset.samples[index], media_folder=dataset.media_folder, load_media=False
            )
        except ValueError as error:
            if max_bad == 0:
                raise
            errors.append(str(error))
            lengths.append(0)
            if len(errors) > max_bad:
                raise ValueError(spent_budget(errors, max_bad)) from error
            continue
        lengths.append(len(encoded.input_ids))
        supervised += encoded.supervised_tokens
        if encoded.supervised_tokens == 0:
            unsupervised.append(encoded.id)
    if len(unsupervised) + len(errors) > max_bad:
        names = ", ".join(f"'{name}'" for name in unsupervised[:10])
        more = ", …" if len(unsupervised) > 10 else ""
        raise ValueError(
            f"check_supervision: {len(unsupervised)} of {count} samples ({names}{more}): each "
            + _reason(dataset.processor)
        )
    heaviest = heapq.nlargest(_HEAVIEST, zip(lengths, range(count), strict=True))
    bad = len(unsupervised) + len(errors)
    return SupervisionReport(count, sum(lengths), supervised, heaviest[0][0], heaviest, bad)


def _reason(processor: Processor) -> str:
    return (
        f"has no supervised token within max_length={processor.max_length} (template '{processor.template.name}'), so "
        "nothing would be learned from it; raise max_length, shorten the question, or remove the sample"
    )
