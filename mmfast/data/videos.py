"""Frames of videos: Video-ChatGPT's choice, decoded with PyAV; every failure names the sample and the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mmfast.data.images import resolve_media
from mmfast.data.samples import BadSampleError, StoredMedium

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmfast.data.samples import VideoPart

T = TypeVar("T")

MAX_FRAME_PIXELS = 1 << 26
"""A video with larger frames is refused, before one is decoded."""
MAX_VIDEO_PIXELS = 1 << 39
"""A video with more pixels in all its frames is refused, before one is decoded: 1920 x 1080 at 30 Hz for 2.4 hours."""


def frame_indices(total: int, num_frames: int = 100) -> list[int]:
    """Which frames of a clip are read: the middles of equal stretches.

    With n = min(total, num_frames) and s = (total - 1) / n, frame i is floor((round(s i) + round(s (i + 1))) / 2),
    where a half is rounded to the even number. The last frame is never taken, but where it is the only one; short
    clips repeat frames: 2 gives 0, 0.

    Args:
        total: frames of the clip, at least 1.
        num_frames: the most frames to read, at least 1.

    Returns:
        min(total, num_frames) indices, ascending.

    Raises:
        ValueError: a number is below 1.

    Source: Video-ChatGPT `video_chatgpt/eval/model_utils.py`, `scripts/save_spatio_temporal_clip_features.py`.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(
            f"frame_indices: total is {total} and num_frames is {num_frames}; both must be 1 or more; a clip without "
            "frames cannot be shown"
        )
    count = min(total, num_frames)
    stretch = (total - 1) / count
    return [(round(stretch * index) + round(stretch * (index + 1))) // 2 for index in range(count)]


def load_video(
    part: VideoPart,
    media_folder: str | os.PathLike[str] | None,
    sample_id: str,
    num_frames: int = 100,
    transform: Callable[[Image], T] | None = None,
) -> list[Image] | list[T]:
    """The frames of `part` that `frame_indices` names, in RGB.

    A file is decoded in full: its frames are counted as they decode, not taken from its header, which many formats
    leave empty. An image counts as a clip of one frame, an animated one as a video. A file that breaks off or holds a
    frame that does not decode is an error; where the format does not tell that the end is missing (Matroska, MPEG-TS),
    the clip is what is left.

    Args:
        part: `part["video"]` is a path (relative to `media_folder`, or absolute and below it), a `StoredMedium`, or a
            sequence of PIL images, the clip's frames.
        media_folder: needed for paths only. Links are followed, and must end inside it.
        sample_id: for the errors.
        num_frames: the most frames to read.
        transform: applied to each chosen frame as soon as it is decoded, so that the large ones need not be kept.

    Returns:
        min(frames, num_frames) images, or what `transform` made of each.

    Raises:
        ImportError: a path, and PyAV is not installed.
        BadSampleError: the file is missing, broken, cut short, without frames, without a video stream (a sound), or
            larger than the limits above; or the path leaves `media_folder`.
    """
    source = part["video"]
    make: Callable[[Image], Any] = transform or (lambda image: image)
    if not isinstance(source, str | StoredMedium):
        images: Sequence[Image] = source
        if not images:
            raise BadSampleError(
                f"sample '{sample_id}': the video is a sequence of no images; expected at least one frame"
            )
        return [make(images[index].convert("RGB")) for index in frame_indices(len(images), num_frames)]
    path = resolve_media(source, media_folder, sample_id, "video") if isinstance(source, str) else source
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"sample '{sample_id}': video '{path}' is read with PyAV, which is not installed; pip install mmfast[video]"
        ) from error
    try:
        return _decode(av, path, num_frames, make)
    # FFmpeg's errors, and whatever a decoder or a conversion raises on a broken file: the file is at fault.
    except Exception as error:
        raise BadSampleError(
            f"sample '{sample_id}': cannot read video '{path}': {type(error).__name__}: {error}; expected a file with "
            "a video stream that PyAV decodes to its end; replace it or remove the sample",
            "too large" if isinstance(error, OverflowError) else "unreadable",
        ) from error


def _decode(av: Any, path: Path | StoredMedium, num_frames: int, make: Callable[[Image], T]) -> list[T]:
    # One packet is nearly always one frame, and packets are counted without decoding. Where it is not so, the clip is
    # decoded again, with the number that came out.
    expected = sum(1 for _ in _packets(av, path))
    while True:
        wanted = set(frame_indices(expected, num_frames)) if expected else set()
        kept: dict[int, T] = {}
        count = 0
        for frame in _frames(av, path, expected):
            if count in wanted:
                kept[count] = make(_upright(frame))
            count += 1
        if count == 0:
            raise ValueError("the video stream has no frames")
        if count == expected:
            return [kept[index] for index in frame_indices(count, num_frames)]
        expected = count


def _frames(av: Any, path: Path | StoredMedium, expected: int) -> Iterator[Any]:
    for packet in _packets(av, path, flush=True):
        codec = packet.stream.codec_context
        _check_size(codec.width, codec.height, expected)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise ValueError("a frame is damaged")
            yield frame


def _check_size(width: int, height: int, frames: int) -> None:
    """Refuses, by an OverflowError, what would take hours or fill the memory; a stream may change its size midway."""
    if width * height > MAX_FRAME_PIXELS:
        raise OverflowError(f"frames of {width}x{height} pixels; {MAX_FRAME_PIXELS} pixels are accepted")
    if width * height * frames > MAX_VIDEO_PIXELS:
        raise OverflowError(
            f"{frames} frames of {width}x{height} pixels; {MAX_VIDEO_PIXELS} pixels in all are accepted; cut the clip"
        )


def _packets(av: Any, path: Path | StoredMedium, flush: bool = False) -> Iterator[Any]:
    """The packets of the file's video stream; with `flush`, at the end an empty one that brings out the last frames."""
    # Playlists name further files and addresses; a file object and no protocol leave them nothing to open.
    with path.open("rb") as file, av.open(file, options={"protocol_whitelist": "none"}) as container:
        pictures = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            raise ValueError(f"the file has no video stream (its streams: {kinds})")
        # One thread, for several may lose other frames of a damaged file in every run; and an error where one is found.
        streams[0].codec_context.thread_count = 1
        streams[0].codec_context.options = {
            "err_detect": "crccheck+bitstream+buffer+explode",
            "max_pixels": str(MAX_FRAME_PIXELS),
        }
        for packet in container.demux(streams[0]):
            if packet.is_corrupt:
                raise ValueError("a packet is damaged or cut short")
            if packet.size or flush:
                yield packet


def _upright(frame: Any) -> Image:
    """The frame in RGB, turned as its file asks for (phones store how they were held)."""
    image: Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
