"""The processor of high-resolution models: an image becomes a view of the whole and tiles, as many as suit its size."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from mmfast.data.anyres import Anyres
from mmfast.data.features import Features
from mmfast.data.images import image_size, load_image
from mmfast.data.processor import Processor
from mmfast.data.samples import ImagePart, MediaPart
from mmfast.data.templates import Template


class TiledImage(NamedTuple):
    """An image as the encoder takes it."""

    pixel_values: Tensor
    """float32 [views, 3, S, S]: the whole, then the tiles row by row."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""


class AnyresProcessor(Processor):
    """A `Processor` for images of high resolution; see `mmfast.data.anyres`.

    Pillow resizes, as in the original repository and in transformers without torchvision.

    Args:
        tokenizer: as `Processor`.
        image_processor: of the image encoder; it normalises the views. One of LLaVA-NeXT is taken for the CLIP
            image processor that it contains.
        template: as `Processor`.
        image_grid_pinpoints: the canvases (height, width) in pixels, multiples of the encoder's input.
        patch_merge: `merge` of `Anyres`.
        unpad_rounding: `rounding` of `Anyres`.
        tokens_per_image: features of one view.
        **settings: as `Processor`.

    Raises:
        TypeError: as `Processor`.
        ValueError: as `Processor` and `Anyres`; the image processor would change a square of the size it gives, or
            is one of LLaVA-NeXT with other canvases; `tokens_per_image` is no square number.
    """

    adjustable: ClassVar[tuple[str, ...]] = ("max_length", "media_first")

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: Template,
        image_grid_pinpoints: Sequence[Sequence[int]],
        patch_merge: Any = "spatial_unpad",
        unpad_rounding: Any = "transformers",
        tokens_per_image: int = 1,
        **settings: Any,
    ) -> None:
        tile, side = _side_of(image_processor), math.isqrt(tokens_per_image)
        if side * side != tokens_per_image:
            raise ValueError(
                f"AnyresProcessor: a view has {tokens_per_image} tokens; a square number is accepted; drop the class "
                "token"
            )
        self.anyres = Anyres(image_grid_pinpoints, tile, side, patch_merge, unpad_rounding)
        image_processor = _of_one_view(image_processor, self.anyres)
        super().__init__(tokenizer, image_processor, template, tokens_per_image=tokens_per_image, **settings)

    @property
    def pad_to_square(self) -> bool:  # type: ignore[override]
        """False: images are padded to their canvas.

        Raises:
            ValueError: (assignment) it is to be True.
        """
        return False

    @pad_to_square.setter
    def pad_to_square(self, value: bool) -> None:
        if value:
            raise ValueError(
                "AnyresProcessor: pad_to_square is True, but with high resolution an image is padded to its canvas; "
                "False is accepted; leave it out, or leave image_grid_pinpoints out"
            )

    def count_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> int:
        """Tokens of an image, from the header of its file.

        Raises:
            ValueError: as `image_size`; the image is too long.
        """
        try:
            return self.anyres.num_tokens(image_size(cast(ImagePart, part), media_folder, sample_id))
        except ValueError as error:
            raise _named(error, sample_id) from error

    def read_media(self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> TiledImage:
        """An image as the encoder takes it.

        Raises:
            ValueError: as `load_image`; or its file says another size than it has.
        """
        picture = cast(ImagePart, part)
        image = load_image(picture, media_folder, sample_id)
        size = (image.height, image.width)
        if size != image_size(picture, media_folder, sample_id):
            raise ValueError(
                f"sample '{sample_id}': image '{picture['image']}' has its EXIF orientation behind its pixels, too "
                "late to count its tokens; save it again, upright"
            )
        views = self.anyres.views(image, self.image_processor.resample)
        pixels: Tensor = self.image_processor(images=views, return_tensors="pt")["pixel_values"]
        return TiledImage(pixels.to(torch.float32), size)

    def load_medium(
        self, part: MediaPart, media_folder: str | os.PathLike[str] | None, sample_id: str
    ) -> TiledImage | Features:
        """As in `Processor`; features come with the size of the image, which tells where they stand."""
        medium: TiledImage | Features = super().load_medium(part, media_folder, sample_id)
        if isinstance(medium, TiledImage):
            return medium
        return Features(medium.values, image_size(cast(ImagePart, part), media_folder, sample_id))

    def preprocessing(self) -> str:
        """As in `Processor`."""
        return f"{self.anyres}, {super().preprocessing()}"

    def pictures(self, medium: TiledImage) -> Tensor:
        """The views of an image, see `Processor.pictures`."""
        return super().pictures(medium.pixel_values)

    def collate_media(self, media: Sequence[TiledImage]) -> dict[str, Tensor]:
        """`pixel_values` float32 [all views, 3, S, S]."""
        return {"pixel_values": torch.cat([image.pixel_values for image in media])}

    def collate_all(self, media: Sequence[TiledImage | Features]) -> dict[str, Tensor]:
        """As in `Processor`, and `image_sizes` int64 [images, 2], (height, width), of all images."""
        return {**super().collate_all(media), "image_sizes": torch.tensor([image.size for image in media])}

    def settings(self) -> dict[str, Any]:
        """Arguments of the class beside tokenizer and image processor, the template by its name."""
        return {
            **super().settings(),
            "image_grid_pinpoints": [list(canvas) for canvas in self.anyres.pinpoints],
            "patch_merge": self.anyres.merge,
            "unpad_rounding": self.anyres.rounding,
        }


def as_image_processor(kind: str, image_processor: Any, **changes: Any) -> Any:
    """An image processor of another class of transformers, with the same settings but for `changes`; None leaves out.

    The class is chosen as for a folder on disk, which suits the machine without a warning.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    settings = {**image_processor.to_dict(), **changes, "image_processor_type": kind}
    kept = {name: value for name, value in settings.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(kept), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder)


def _side_of(image_processor: Any) -> int:
    """The side of the square that the image processor gives, and takes as it is."""
    crop, size = dict(image_processor.crop_size), dict(image_processor.size)
    sides = {value for value in (*crop.values(), *size.values()) if value is not None}
    if len(sides) != 1:
        raise ValueError(
            f"AnyresProcessor: the image processor resizes to {size} and crops to {crop}; one square is accepted, of "
            "the encoder's image_size"
        )
    return int(sides.pop())


def _of_one_view(image_processor: Any, anyres: Anyres) -> Any:
    """The CLIP image processor in LLaVA-NeXT's; another one as it is."""
    found = getattr(image_processor, "image_grid_pinpoints", None)
    if found is None:
        return image_processor
    if tuple(tuple(canvas) for canvas in found) != anyres.pinpoints:
        raise ValueError(
            f"AnyresProcessor: the image processor has image_grid_pinpoints {found} but the model {anyres.pinpoints}; "
            "the same are accepted; were the files of two models mixed?"
        )
    return as_image_processor("CLIPImageProcessor", image_processor, image_grid_pinpoints=None, do_pad=None)


def _named(error: ValueError, sample_id: str) -> ValueError:
    where = f"sample '{sample_id}'"
    return error if str(error).startswith(where) else ValueError(f"{where}: {error}")
