"""The processor of systems whose images enter attention as prompts: they take no place in the text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import MediaPart, Sample
from mmfast.data.templates import Template

__all__ = ["PromptProcessor"]


class PromptProcessor(Processor):
    """As `Processor`, but a sample has one image at most, and its text is the same with and without it.

    A batch has `media_rows` [n] int64 beside the media: the row that each belongs to.
    """

    @Processor.template.setter  # type: ignore[misc, attr-defined]
    def template(self, template: Template) -> None:
        """Without what a template puts around media."""
        bare = replace(template, media_prefix="", media_suffix="", media_separator="")
        Processor.template.fset(self, bare)  # type: ignore[attr-defined]

    def count_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> int:
        """None: an image stands at no place in the text."""
        return 0

    def encode(
        self,
        sample: Sample,
        add_generation_prompt: bool = False,
        media_folder: str | os.PathLike[str] | None = None,
        load_media: bool = True,
    ) -> Encoded:
        """As `Processor.encode`.

        Raises:
            ValueError: as there, and if the sample has more than one image.
        """
        encoded = super().encode(sample, add_generation_prompt, media_folder, load_media)
        if len(encoded.media_tokens) > 1:
            raise ValueError(
                f"sample '{sample['id']}': it has {len(encoded.media_tokens)} images; this model takes one in a "
                "conversation; remove the others, or start over (/reset in a chat)"
            )
        return encoded

    def collate(
        self, encoded: Sequence[Encoded], padding_side: Literal["left", "right"] = "right"
    ) -> dict[str, Tensor]:
        """As `Processor.collate`, with `media_rows` where there is a medium."""
        batch = super().collate(encoded, padding_side)
        rows = [row for row, item in enumerate(encoded) for _ in item.media]
        return batch | ({"media_rows": torch.tensor(rows)} if rows else {})
