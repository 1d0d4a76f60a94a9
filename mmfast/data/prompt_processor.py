"""The processor of systems whose images enter attention as prompts: they take no place in the text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from mmfast.data.images import load_image
from mmfast.data.processor import Encoded, Processor
from mmfast.data.samples import ImagePart, MediaPart, Sample
from mmfast.data.templates import Template

__all__ = ["PromptProcessor"]


class PromptProcessor(Processor):
    """As `Processor`, but a sample has one image at most, and its text is the same with and without it.

    A batch has `media_rows` [n] int64 beside the media: the row that each belongs to.

    Args:
        channel_order: "rgb", or "bgr": the channels of an image are swapped before its processor sees it, as where
            OpenCV reads images (LLaMA-Adapter V2's 7B).
        *args, **options: as in `Processor`.

    Raises:
        ValueError: as there, and if the order is neither.
    """

    def __init__(self, *args: Any, channel_order: str = "rgb", **options: Any) -> None:
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"PromptProcessor: channel_order is {channel_order!r}; 'rgb' and 'bgr' are accepted")
        super().__init__(*args, **options)
        self.channel_order = channel_order

    def settings(self) -> dict[str, Any]:
        """As in `Processor`, with the order of channels."""
        return {**super().settings(), "channel_order": self.channel_order}

    def preprocessing(self) -> str:
        """As in `Processor`, with the order of channels."""
        return f"{self.channel_order}, {super().preprocessing()}"

    def read_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Any:
        """As in `Processor`, in the order of channels."""
        if self.channel_order == "bgr":
            import PIL.Image

            image = load_image(cast(ImagePart, part), media_folder, sample_id)
            part = {"type": "image", "image": PIL.Image.merge("RGB", image.split()[::-1])}
        return super().read_media(part, media_folder, sample_id)

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
