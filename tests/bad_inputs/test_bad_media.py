"""Bad images and videos: what is refused, with the name of the file, and what is read, and how."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import BadInput, table
from PIL import Image

from mmfast.data import load_image, load_video
from mmfast.data import videos as videos_module

Maker = Callable[[Path], str]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of a few bytes that says how large it is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def file(name: str, content: bytes | Callable[[], bytes]) -> Maker:
    def make(folder: Path) -> str:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return name

    return make


def link(name: str, target: str) -> Maker:
    def make(folder: Path) -> str:
        (folder / name).symlink_to(target)
        return name

    return make


def folder_called(name: str) -> Maker:
    def make(folder: Path) -> str:
        (folder / name).mkdir()
        return name

    return make


def pipe(name: str) -> Maker:
    def make(folder: Path) -> str:
        os.mkfifo(folder / name)
        return name

    return make


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def swollen() -> bytes:
    """A PNG whose compressed text has 200 MB."""
    whole = encoded(Image.new("RGB", (4, 4)), "PNG")
    packer = zlib.compressobj(9)
    text = b"zTXtk\0\0" + b"".join(packer.compress(bytes(1 << 20)) for _ in range(80)) + packer.flush()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return whole[:33] + chunk + whole[33:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
CANNOT = "sample 's': cannot read image '{folder}/"

IMAGES = [
    BadInput("missing", lambda folder: "a.png", "'{folder}/a.png' does not exist", fault="missing"),
    BadInput("a folder", folder_called("a.png"), "'{folder}/a.png' does not exist or is no file", fault="missing"),
    BadInput("a pipe", pipe("a.png"), "'{folder}/a.png' does not exist or is no file", fault="missing"),
    BadInput("no bytes", file("a.png", b""), [CANNOT + "a.png'", "cannot identify"], fault="unreadable"),
    BadInput("text", file("a.jpg", b"<html>Not found</html>"), CANNOT + "a.jpg'", fault="unreadable"),
    BadInput("a PNG cut short", file("a.png", lambda: half(encoded(noise(), "PNG"))), CANNOT, fault="unreadable"),
    BadInput("a JPEG cut short", file("a.jpg", lambda: half(encoded(noise(), "JPEG"))), CANNOT, fault="unreadable"),
    BadInput("a WebP cut short", file("a.webp", lambda: half(encoded(noise(), "WEBP"))), CANNOT, fault="unreadable"),
    BadInput("a GIF cut short", file("a.gif", lambda: half(encoded(noise(), "GIF"))), CANNOT, fault="unreadable"),
    BadInput("a program for Ghostscript", file("a.eps", EPS), [CANNOT, "cannot identify"], fault="unreadable"),
    BadInput("a bomb", file("a.png", png_header(60_000, 60_000)), CANNOT + "a.png'", fault="too large"),
    BadInput(
        "a small bomb, of which Pillow warns", file("a.png", png_header(10_000, 10_000)),
        [CANNOT, "10000x10000 pixels are more than PIL.Image.MAX_IMAGE_PIXELS"], fault="too large",
    ),
    BadInput(
        "a strip", file("a.png", png_header(3, 60_000)),
        [CANNOT, "one side of 3x60000 pixels is more than 200 times the other"], fault="too large",
    ),
    BadInput(
        "floats", file("a.tiff", lambda: encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")),
        [CANNOT, "32 bits (mode F)"], fault="unreadable",
    ),
    BadInput(
        "integers of 32 bits", file("a.tiff", lambda: encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF")),
        [CANNOT, "32 bits (mode I)"], fault="unreadable",
    ),
    BadInput("a text of a PNG that swells", file("a.png", swollen), CANNOT, fault="unreadable"),
    BadInput("above the folder", lambda folder: "../a.png", "'../a.png' leaves the media folder", fault="outside"),
    BadInput("absolute", lambda folder: "/etc/passwd", "'/etc/passwd' leaves the media folder", fault="outside"),
    BadInput("a link out", link("a.png", "/etc/passwd"), ["'a.png' leads to", "outside"], fault="outside"),
    BadInput("a link to itself", link("a.png", "a.png"), "'a.png'", fault="missing"),
    BadInput("a link to nothing", link("a.png", "b.png"), "'{folder}/b.png' does not exist", fault="missing"),
    BadInput("a NUL in the name", lambda folder: "a\0.png", r"'a\x00.png' cannot be resolved", fault="missing"),
    BadInput("too long a name", lambda folder: "a" * 5000, "cannot be resolved", fault="missing"),
]  # fmt: skip


@table(IMAGES)
def test_bad_image(case: BadInput, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        case.check(tmp_path, lambda name: load_image({"type": "image", "image": name}, tmp_path, "s"))


RED = (255, 0, 0)
SIXTEEN = np.array([[0, 256, 0x7FFF, 0xFFFF]] * 4, np.uint16)


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(images[0], kind, save_all=True, append_images=images[1:], lossless=True)


def with_alpha(mode: str) -> Image.Image:
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    return image if mode == "RGBA" else image.quantize(4)


# Odd files that are read: what they must become, by formulas and not by Pillow's conversion where that would be wrong.
ODD_IMAGES: dict[str, tuple[Callable[[], bytes], str, Any]] = {
    "a PNG called JPEG": (lambda: encoded(Image.new("RGB", (4, 4), RED), "PNG"), "a.jpg", RED),
    "a JPEG called PNG": (lambda: encoded(Image.new("L", (4, 4), 7), "JPEG"), "a.png", (7, 7, 7)),
    "no ending": (lambda: encoded(Image.new("RGB", (4, 4), RED), "PNG"), "a", RED),
    "an animated GIF": (lambda: frames("GIF"), "a.gif", RED),
    "an animated WebP": (lambda: frames("WEBP"), "a.webp", RED),
    "an animated PNG": (lambda: frames("PNG"), "a.png", RED),
    "alpha": (lambda: encoded(with_alpha("RGBA"), "PNG"), "a.png", RED),
    "grey with alpha": (lambda: encoded(Image.new("LA", (4, 4), (9, 0)), "PNG"), "a.png", (9, 9, 9)),
    "a palette": (lambda: encoded(Image.new("RGB", (4, 4), RED).quantize(4), "PNG"), "a.png", RED),
    "a palette with alpha": (lambda: encoded(with_alpha("P"), "PNG"), "a.png", RED),
    "CMYK": (lambda: encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), "a.tiff", RED),
    "one bit": (lambda: encoded(Image.new("1", (4, 4), 1), "PNG"), "a.png", (255, 255, 255)),
    "16 bits in a PNG": (lambda: encoded(Image.fromarray(SIXTEEN), "PNG"), "a.png", SIXTEEN // 256),
    "16 bits in a TIFF": (lambda: encoded(Image.fromarray(SIXTEEN), "TIFF"), "a.tiff", SIXTEEN // 256),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_odd_image(name: str, tmp_path: Path) -> None:
    make, path, expected = ODD_IMAGES[name]
    (tmp_path / path).write_bytes(make())
    image = load_image({"type": "image", "image": path}, tmp_path, "s")
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    wanted = np.broadcast_to(
        np.asarray(expected, int).reshape((1, 1, 3) if np.ndim(expected) == 1 else (4, 4, 1)), pixels.shape
    )
    np.testing.assert_array_equal(pixels, wanted)


def video(frames: int = 4, size: tuple[int, int] = (32, 16), kind: str = "mp4") -> bytes:
    av: Any = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", size))))
        container.mux(stream.encode())
    return buffer.getvalue()


FILM = "sample 's': cannot read video '{folder}/a.mp4'"
VIDEOS = [
    BadInput("missing", lambda folder: "a.mp4", "video '{folder}/a.mp4' does not exist", fault="missing"),
    BadInput("a folder", folder_called("a.mp4"), "video '{folder}/a.mp4' does not exist or is no", fault="missing"),
    BadInput("no bytes", file("a.mp4", b""), FILM, fault="unreadable"),
    BadInput("text", file("a.mp4", b"<html>Not found</html>"), FILM, fault="unreadable"),
    BadInput("cut short", file("a.mp4", lambda: half(video())), FILM, fault="unreadable"),
    BadInput("a playlist", file("a.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), FILM, fault="unreadable"),
    BadInput(
        "large frames", file("a.mp4", lambda: video(size=(128, 64))), [FILM, "frames of 128x64"], fault="too large"
    ),
    BadInput("many frames", file("a.mp4", lambda: video(40)), [FILM, "40 frames of 32x16"], fault="too large"),
    BadInput("above the folder", lambda folder: "../a.mp4", "video path '../a.mp4' leaves", fault="outside"),
    BadInput("a link out", link("a.mp4", "/etc/passwd"), ["video path 'a.mp4' leads to", "outside"], fault="outside"),
]  # fmt: skip


@table(VIDEOS)
def test_bad_video(case: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos_module, "MAX_FRAME_PIXELS", 64 * 64)
    monkeypatch.setattr(videos_module, "MAX_VIDEO_PIXELS", 20 * 32 * 16)
    case.check(tmp_path, lambda name: load_video({"type": "video", "video": name}, tmp_path, "s"))


def test_a_video_within_the_limits_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video())
    assert len(load_video({"type": "video", "video": "a.mp4"}, tmp_path, "s")) == 4
