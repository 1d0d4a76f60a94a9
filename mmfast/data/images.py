"""Opening images: every failure names the sample and the file; no path leaves the media folder."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmfast.data.samples import ImagePart, check_media_path

if TYPE_CHECKING:
    from PIL.Image import Image


def load_image(part: ImagePart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> Image:
    """The image of `part` in RGB, turned upright by its EXIF orientation.

    Args:
        part: `part["image"]` is a path (relative to `media_folder`, or absolute and below it) or a PIL image.
        media_folder: needed for paths only. Links are followed, and must end inside it.
        sample_id: for the errors.

    Raises:
        ValueError: the file is missing, broken, cut short, no image, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`; or the path leaves `media_folder`.
    """
    import PIL.ImageOps

    with _opened(part, media_folder, sample_id) as image:
        return PIL.ImageOps.exif_transpose(image).convert("RGB")


def image_size(part: ImagePart, media_folder: str | os.PathLike[str] | None, sample_id: str) -> tuple[int, int]:
    """Height and width of what `load_image` gives, from the header of the file: no pixel is decoded.

    An EXIF orientation that stands behind the pixels of a PNG file is not seen.

    Raises:
        ValueError: as `load_image`, but for what is broken behind the header.
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

    source = part["image"]
    if isinstance(source, str):
        source = resolve_media(source, media_folder, sample_id, "image")
    # Decoders raise far more than OSError on broken files (SyntaxError, ValueError, struct.error, ...): whatever
    # they raise, the file is at fault.
    try:
        if isinstance(source, PIL.Image.Image):
            yield source
            return
        with PIL.Image.open(source) as image:
            width, height = image.size
            # Pillow itself only warns between one and two times this limit.
            limit = PIL.Image.MAX_IMAGE_PIXELS
            if limit is not None and width * height > limit:
                raise ValueError(f"{width}x{height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS = {limit}")
            yield image
    except Exception as error:
        raise ValueError(
            f"sample '{sample_id}': cannot read image '{source}': {type(error).__name__}: {error}; expected an image "
            "that Pillow opens; replace it or remove the sample"
        ) from error


def image_digest(images: Iterable[Image]) -> str:
    """A hash of the sizes and the RGB pixels of images."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr(image.size).encode() + image.convert("RGB").tobytes())
    return digest.hexdigest()


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
        ValueError: there is no media folder, the path leaves it, or no such file.
    """
    where = f"sample '{sample_id}'"
    if media_folder is None:
        raise ValueError(f"{where}: {kind} path {path!r} without a media folder; pass media_folder")
    check_media_path(path, media_folder, where, kind)
    try:
        folder = Path(media_folder).resolve()
        file = (folder / path).resolve()
        is_file = file.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL or an over-long name
        raise ValueError(f"{where}: {kind} path {path!r} cannot be resolved: {error}; correct the path") from error
    if not file.is_relative_to(folder):
        raise ValueError(
            f"{where}: {kind} path {path!r} leads to '{file}', outside the media folder '{folder}'; links may not "
            "leave it; pass the folder that holds all media as media_folder"
        )
    if not is_file:
        raise ValueError(
            f"{where}: {kind} '{file}' does not exist or is no file; {kind} paths start at the media folder '{folder}'"
        )
    return file
