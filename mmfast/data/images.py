"""Opening images: every failure names the sample and the file; no path leaves the media folder."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mmfast.data.samples import BadSampleError, ImagePart, check_media_path

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ASPECT_RATIO = 200
"""A longer image is refused: resized by its shorter side, as encoders ask for, it would not fit in memory."""


def load_image(part: ImagePart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Image:
    """The image of `part` in RGB, turned upright by its EXIF orientation.

    What its file is, its content tells, not its name. Of an animation it is the first frame; transparency is dropped;
    of 16 bits, the upper 8 are taken.

    Args:
        part: `part["image"]` is a path (relative to `media_folder`, or absolute and below it), a `StoredMedium` or a
            PIL image.
        media_folder: needed for paths only. Links are followed, and must end inside it.
        sample_id: for the errors.

    Raises:
        BadSampleError: the file is missing, broken, cut short, no image, has 32 bits per channel, more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` or is longer than `MAX_ASPECT_RATIO` allows; or the path leaves
            `media_folder`.
    """
    import PIL.ImageOps

    with _opened(part, media_folder, sample_id) as image:
        is_wide = image.mode == "I" and image.format == "PNG"  # Pillow before 11.1 opens 16 bits so
        upright = PIL.ImageOps.exif_transpose(image)
        return _upper_bits(upright, is_wide).convert("RGB")


def image_size(part: ImagePart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> tuple[int, int]:
    """Height and width of what `load_image` gives, from the header of the file: no pixel is decoded.

    An EXIF orientation that stands behind the pixels of a PNG file is not seen.

    Raises:
        BadSampleError: as `load_image`, but for what is broken behind the header.
    """
    import PIL.Image
    from PIL.ExifTags import Base

    with _opened(part, media_folder, sample_id) as image:
        # PNG's own method decodes the image, to look for EXIF behind it; Pillow itself turns TIFF.
        orientation = PIL.Image.Image.getexif(image).get(Base.Orientation, 1)
        is_turned = orientation >= 5 and image.format != "TIFF"
        return (image.width, image.height) if is_turned else (image.height, image.width)


@contextlib.contextmanager
def _opened(part: ImagePart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Iterator[Image]:
    """The image of `part`, its pixels not yet decoded; any error while it is used names sample and file."""
    import PIL.Image

    source = part["image"]  # then one with Path's method open, or a PIL image
    if isinstance(source, str):
        source = resolve_media(source, media_folder, sample_id, "image")
    # Decoders raise far more than OSError on broken files (SyntaxError, ValueError, struct.error, ...): whatever
    # they raise, the file is at fault.
    try:
        if isinstance(source, PIL.Image.Image):
            yield source
            return
        with source.open("rb") as file, PIL.Image.open(file, formats=_formats()) as image:
            _check_size(image)
            yield image
    except Exception as error:
        raise BadSampleError(
            f"sample '{sample_id}': cannot read image '{source}': {type(error).__name__}: {error}; expected an image "
            "that Pillow opens; replace it or remove the sample",
            "too large" if isinstance(error, PIL.Image.DecompressionBombError) else "unreadable",
        ) from error


def image_digest(images: Iterable[Image]) -> str:
    """A hash of the sizes and the RGB pixels of images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's formats without the one that is a program, which Pillow has Ghostscript run."""
    import PIL.Image

    PIL.Image.init()
    return tuple(name for name in PIL.Image.ID if name != "EPS")


def _check_size(image: Image) -> None:
    import PIL.Image

    width, height = image.size
    # Pillow itself only warns between one and two times this limit.
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise PIL.Image.DecompressionBombError(
            f"{width}x{height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {limit}"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise PIL.Image.DecompressionBombError(
            f"one side of {width}x{height} pixels is more than {MAX_ASPECT_RATIO} times the other"
        )


def _upper_bits(image: Image, is_wide: bool) -> Image:
    """An image of 16 bits as one of 8, which Pillow would make by clipping; any other as it is."""
    import numpy as np
    import PIL.Image

    if image.mode.startswith("I;16") or is_wide:
        return PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}) and no known range; 8 or 16 bits are accepted")
    return image


def pad_to_square(image: Image, mean: Sequence[float]) -> Image:
    """`image` in the middle of a square whose border has the mean colour.

    Args:
        image: RGB.
        mean: the image processor's `image_mean`, three values in [0, 1]; the border is floor(255 · mean).

    Returns:
        A square image; an odd border is one pixel wider at the bottom or right. A square image is returned as is.

    Source: LLaVA `llava/mm_utils.py` (Apache-2.0), which pads so in its second training stage and in evaluation.
    """
    import PIL.Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    colour = tuple(math.floor(255 * value) for value in mean)
    square = PIL.Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def resolve_media(path: str, media_folder: str | os.PathLike[str] | None, sample_id: str, kind: str) -> Path:
    """The file at `path`, below `media_folder`.

    Args:
        path: relative to `media_folder`, or absolute.
        media_folder: links are followed, and must end inside it.
        sample_id: for the errors.
        kind: "image" or "video", for the errors.

    Raises:
        BadSampleError: there is no media folder, the path leaves it, or no such file.
    """
    where = f"sample '{sample_id}'"
    if media_folder is None:
        raise BadSampleError(f"{where}: {kind} path {path!r} without a media folder; pass media_folder")
    check_media_path(path, media_folder, where, kind)
    try:
        folder = Path(media_folder).resolve()
        file = (folder / path).resolve()
        is_file = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL or an over-long name
        raise BadSampleError(
            f"{where}: {kind} path {path!r} cannot be resolved: {error}; correct the path", "missing"
        ) from error
    if not file.is_relative_to(folder):
        raise BadSampleError(
            f"{where}: {kind} path {path!r} leads to '{file}', outside the media folder '{folder}'; links may not "
            "leave it; pass the folder that holds all media as media_folder",
            "outside",
        )
    if not is_file:
        raise BadSampleError(
            f"{where}: {kind} '{file}' does not exist or is no file; {kind} paths start at the media folder '{folder}'",
            "missing",
        )
    return file
