"""Frames of videos: which are taken, how files are read, and what is said of those that cannot be."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfast.data.videos import frame_indices, load_video

av: Any = pytest.importorskip("av")

SIZE = (48, 32)


def write_video(path: Path, frames: int, codec: str = "libx264", pixels: str = "yuv420p", **options: str) -> Path:
    """A clip whose frame i is grey of level 8 i on its right half."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *SIZE, pixels
        for index in range(frames):
            image = np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)
            image[:, SIZE[0] // 2 :] = 8 * index
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image).reformat(format=pixels)))
        container.mux(stream.encode())
    return path


def write_sound(path: Path, codec: str = "pcm_s16le") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def load(path: Path, num_frames: int = 100, **options: Any) -> list[Any]:
    return load_video({"type": "video", "video": path.name}, path.parent, "clip-1", num_frames, **options)


def levels(frames: list[Image.Image]) -> list[int]:
    """The number of each frame, from its grey level."""
    return [round(frame.getpixel((SIZE[0] - 4, 8))[0] / 8) for frame in frames]


@pytest.mark.parametrize(
    ("total", "first", "last"),
    [
        (1000, [5, 15, 25], 994),
        (3000, [15, 45], 2984),
        (101, [0, 1, 2], 99),
        (50, [0, 1, 2], 48),
        (2, [0, 0], 0),
        (1, [0], 0),
    ],
)
def test_frame_indices_are_the_published_ones(total: int, first: list[int], last: int) -> None:
    chosen = frame_indices(total)
    assert len(chosen) == min(total, 100)
    assert chosen[: len(first)] == first
    assert chosen[-1] == last


def test_frame_indices_of_fifty_repeat_one_and_leave_out_the_last() -> None:
    chosen = frame_indices(50)
    assert sorted(set(chosen)) == list(range(49))


def test_frame_indices_are_those_of_numpy() -> None:
    for total in range(1, 400):
        count = min(total, 100)
        edges = np.round(np.arange(count + 1) * ((total - 1) / count)).astype(int)
        assert frame_indices(total) == [math.floor(pair) for pair in (edges[:-1] + edges[1:]) / 2]


def test_frame_indices_refuse_no_frames() -> None:
    with pytest.raises(ValueError, match="total is 0 and num_frames is 100"):
        frame_indices(0)
    with pytest.raises(ValueError, match="num_frames is 0"):
        frame_indices(5, 0)


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mp4", "libx264", "yuv420p"),  # with B-frames: the order of packets is not that of frames
        ("a.mkv", "libx264", "yuv420p"),  # no number of frames in the header
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.h264", "libx264", "yuv420p"),  # no header at all
        ("a.mkv", "ffv1", "bgr0"),
    ],
)
def test_load_video_takes_the_frames_of_any_container(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    path = write_video(tmp_path / name, 30, codec, pixels)
    frames = load(path, 7)
    assert levels(frames) == frame_indices(30, 7)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", SIZE)}
    assert levels(load(path)) == frame_indices(30)


@pytest.mark.parametrize(("frames", "expected"), [(1, [0]), (2, [0, 0]), (3, [0, 1, 1])])
def test_load_video_of_short_clips(tmp_path: Path, frames: int, expected: list[int]) -> None:
    assert frame_indices(frames) == expected
    assert levels(load(write_video(tmp_path / "a.mp4", frames))) == expected


def test_load_video_takes_an_image_as_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", SIZE, (255, 0, 0)).save(tmp_path / "still.png")
    (frame,) = load(tmp_path / "still.png")
    assert frame.getpixel((5, 5)) == (255, 0, 0)


def test_load_video_takes_frames_in_memory() -> None:
    frames = [Image.new("L", SIZE, 8 * index) for index in range(9)]
    taken = load_video({"type": "video", "video": frames}, None, "clip-1", 8)
    assert levels(taken) == list(range(8))
    assert {frame.mode for frame in taken} == {"RGB"}
    with pytest.raises(ValueError, match="'clip-1': the video is a sequence of no images"):
        load_video({"type": "video", "video": []}, None, "clip-1")


def test_load_video_transforms_every_frame_it_takes(tmp_path: Path) -> None:
    seen = []

    def reduce(frame: Image.Image) -> int:
        seen.append(frame)
        return levels([frame])[0]

    assert load(write_video(tmp_path / "a.mp4", 30), 3, transform=reduce) == frame_indices(30, 3)
    assert len(seen) == 3


def test_load_video_turns_frames_as_the_file_asks() -> None:
    from mmfast.data import videos

    class Frame:
        rotation = 90

        def to_image(self) -> Image.Image:
            image = Image.new("RGB", SIZE)
            image.putpixel((SIZE[0] - 1, 0), (255, 255, 255))
            return image

    upright = videos._upright(Frame())
    assert upright.size == SIZE[::-1]
    assert upright.getpixel((0, 0)) == (255, 255, 255)


def test_load_video_refuses_a_sound(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=r"'clip-1': cannot read video '.*a\.wav'.* no video stream .*audio"):
        load(tmp_path / "a.wav")


def test_load_video_refuses_the_cover_of_a_sound(tmp_path: Path) -> None:
    write_video(tmp_path / "cover.mp4", 1, "mjpeg", "yuvj420p")
    path = tmp_path / "song.mp4"
    with av.open(str(tmp_path / "cover.mp4")) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(ValueError, match="has no video stream"):
        load(path)


def test_load_video_refuses_files_that_break_off(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", 30, movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 7 // 10])
    with pytest.raises(ValueError, match=r"'clip-1': cannot read video '.*cut\.mp4'.*cut short"):
        load(tmp_path / "cut.mp4")


def test_load_video_takes_what_is_left_where_the_format_does_not_tell(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", 30).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 7 // 10])
    shown = levels(load(tmp_path / "cut.mkv"))
    assert 5 < len(shown) < 30
    assert shown == frame_indices(len(shown))


def test_load_video_refuses_damaged_frames(tmp_path: Path) -> None:
    content = bytearray(write_video(tmp_path / "a.mkv", 30, "ffv1", "bgr0").read_bytes())
    with av.open(str(tmp_path / "a.mkv")) as container:
        data = [bytes(packet) for packet in container.demux() if packet.size]
    start = content.index(data[15])
    content[start : start + len(data[15])] = bytes(byte ^ 255 for byte in data[15])
    (tmp_path / "bad.mkv").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read video '.*bad\.mkv'"):
        load(tmp_path / "bad.mkv")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 4096])
def test_load_video_refuses_what_is_no_video(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"'clip-1': cannot read video '.*a\.mp4'"):
        load(tmp_path / "a.mp4")


LISTS = ["ffconcat version 1.0\nfile a.ts\n", "#EXTM3U\n#EXTINF:3,\na.ts\n#EXT-X-ENDLIST\n"]


@pytest.mark.parametrize("listing", LISTS)
def test_load_video_opens_no_file_that_a_playlist_names(tmp_path: Path, listing: str) -> None:
    write_video(tmp_path / "a.ts", 10)
    (tmp_path / "list.m3u8").write_text(listing)
    with pytest.raises(ValueError, match=r"cannot read video '.*list\.m3u8'"):
        load(tmp_path / "list.m3u8")
    assert len(load(tmp_path / "a.ts")) == 10


def test_load_video_refuses_paths_outside_the_media_folder(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "a.mp4", 2)
    (tmp_path / "media" / "link.mp4").symlink_to(tmp_path / "a.mp4")
    for video, message in [
        ("../a.mp4", "video path '../a.mp4' leaves the media folder"),
        ("link.mp4", "leads to .*outside the media folder"),
        ("none.mp4", "video '.*none.mp4' does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_video({"type": "video", "video": video}, tmp_path / "media", "clip-1")
    with pytest.raises(ValueError, match="without a media folder"):
        load_video({"type": "video", "video": "a.mp4"}, None, "clip-1")


def test_load_video_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install mmfast\[video\]"):
        load(tmp_path / "a.mp4")
