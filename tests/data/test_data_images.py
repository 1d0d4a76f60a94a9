from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfast.data import image_size, load_image, pad_to_square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def part(image: Any) -> Any:
    return {"type": "image", "image": image}


def test_load_image_is_rgb_from_path_and_from_pil(media: Path) -> None:
    assert load_image(part("red.png"), media, "s").getpixel((0, 0)) == (255, 0, 0)
    assert load_image(part(str(media / "sub" / "blue.png")), media, "s").getpixel((0, 0)) == (0, 0, 255)
    assert load_image(part(Image.new("L", (3, 2), 7)), None, "s").getpixel((0, 0)) == (7, 7, 7)
    assert load_image(part(Image.new("RGBA", (3, 2))), None, "s").mode == "RGB"


def test_load_image_turns_by_exif(media: Path) -> None:
    image = Image.new("RGB", (6, 4), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(media / "turned.jpg", exif=exif)
    assert load_image(part("turned.jpg"), media, "s").size == (4, 6)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_size_is_that_of_the_upright_image(media: Path, suffix: str, orientation: int) -> None:
    image = Image.new("RGB", (6, 4), "white")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(media / f"turned.{suffix}", exif=exif)
    for source in (f"turned.{suffix}", Image.open(media / f"turned.{suffix}")):
        width, height = load_image(part(source), media, "s").size
        assert image_size(part(source), media, "s") == (height, width)


def test_image_size_reads_the_header_alone(media: Path) -> None:
    assert image_size(part("red.png"), media, "s") == (8, 12)
    assert image_size(part("broken.png"), media, "s") == (64, 64)
    for name in ("text.png", "missing.png", "../red.png"):
        with pytest.raises(ValueError, match=f"sample 's'.*{name}"):
            image_size(part(name), media, "s")


@pytest.mark.parametrize("name", ["broken.png", "text.png", "missing.png", "sub", "a\0b"])
def test_load_image_names_sample_and_file(media: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"sample 'cat-1'.*{name}" if "\0" not in name else "sample 'cat-1'"):
        load_image(part(name), media, "cat-1")


@pytest.mark.parametrize("limit", [100, 60, 30])  # 8x12 pixels: below, Pillow warns, Pillow raises
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_load_image_refuses_a_bomb(media: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit >= 96:
        assert load_image(part("red.png"), media, "s").size == (12, 8)
        return
    with pytest.raises(ValueError, match=r"sample 's': cannot read image '.*red.png'.*(pixels)"):
        load_image(part("red.png"), media, "s")


def test_load_image_stays_in_the_media_folder(media: Path, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    (media / "link.png").symlink_to(tmp_path / "outside.png")
    (media / "inside.png").symlink_to(media / "red.png")
    (media / "loop.png").symlink_to(media / "loop.png")
    (media / "up").symlink_to(tmp_path)
    for name in ("link.png", "up/outside.png", "../outside.png", str(tmp_path / "outside.png")):
        with pytest.raises(ValueError, match=r"sample 's': image path .*(outside|leaves) the media folder"):
            load_image(part(name), media, "s")
    with pytest.raises(ValueError, match=r"sample 's': image.*loop.png"):
        load_image(part("loop.png"), media, "s")
    assert load_image(part("inside.png"), media, "s").size == (12, 8)
    # The folder itself may be reached through a link.
    (tmp_path / "alias").symlink_to(media)
    assert load_image(part("red.png"), tmp_path / "alias", "s").size == (12, 8)


def test_load_image_needs_a_media_folder_for_a_path() -> None:
    with pytest.raises(ValueError, match=r"sample 's': image path 'a.png' without a media folder; pass media_folder"):
        load_image(part("a.png"), None, "s")


@pytest.mark.parametrize(("width", "height", "left", "top"), [(5, 2, 0, 1), (2, 5, 1, 0), (7, 2, 0, 2), (1, 4, 1, 0)])
def test_pad_to_square_centres_on_the_mean_colour(width: int, height: int, left: int, top: int) -> None:
    side = max(width, height)
    padded = np.asarray(pad_to_square(Image.new("RGB", (width, height), (1, 2, 3)), CLIP_MEAN))
    expected = np.full((side, side, 3), (122, 116, 104), dtype=np.uint8)
    expected[top : top + height, left : left + width] = (1, 2, 3)
    np.testing.assert_array_equal(padded, expected)


def test_pad_to_square_leaves_a_square() -> None:
    image = Image.new("RGB", (4, 4))
    assert pad_to_square(image, CLIP_MEAN) is image
