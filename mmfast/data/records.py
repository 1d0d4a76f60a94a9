"""Records of data files, in the forms that projects publish, as samples."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from mmfast.data.captions import from_caption
from mmfast.data.samples import Part, Sample, StoredMedium, check_media_path, media_of, shown, validate_sample

IMAGE_MARKER = "<image>"
"""What stands for an image in the text of a LLaVA JSON file."""
VIDEO_MARKER = "<video>"
"""What stands for a video in the text of a Video-ChatGPT JSON file."""

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Naming: TypeAlias = Literal["own", "repeatable", "none"]
"""Whether a record has an id, one that others of its file may have too, or none."""


class VideoFiles:
    """The files of a folder by their names without ending; the folder is listed when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, list[str]] | None = None

    def __getitem__(self, video_id: str) -> str:
        if self._names is None:
            self._names = {}
            for file in self._folder.iterdir() if self._folder.is_dir() else ():
                self._names.setdefault(file.stem, []).append(file.name)
        found = self._names.get(video_id, [])
        return found[0] if len(found) == 1 else f"{video_id}.pkl"


@dataclass(frozen=True)
class RecordReader:
    """Makes samples of records; see `mmfast.data.load_samples` for their forms.

    Args:
        stem: what a record without an id is called, before its number.
        videos: the files that VideoInstruct's records may mean.
        only: the form that every record must have; None: any.
    """

    stem: str
    videos: VideoFiles
    only: Literal["alpaca"] | None = None

    def sample(self, record: Any, index: int, where: str) -> tuple[Sample, Naming]:
        """The sample of a record, not yet with a unique id, and what is known of its id.

        Args:
            record: as it was read.
            index: number of the record in its file.
            where: begins the errors.

        Raises:
            ValueError: it is of no known form, or malformed; names it.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"{where}: a record is {shown(record)}; expected an object")
        record = dict(record)
        if record.keys() >= {"q", "a", "video_id"}:
            record = _from_video_instruct(record, index, self.videos, where)
        form = next((form for form, key in _KEYS.items() if key in record), "messages")
        own = record.get("image_id") if form == "caption" and record.get("id") is None else record.get("id")
        name = f"{self.stem}-{index}" if own is None else str(own)
        where = f"{where}: sample"
        if self.only is not None and form != self.only:
            raise ValueError(
                f"{where} '{name}': it has the keys {', '.join(map(str, record))}; a record of {self.only}'s form, "
                "with instruction, input and output, is accepted"
            )
        if form == "llava":
            sample = _from_llava(record, name, where)
        elif form == "caption":
            sample = from_caption(record, name, index, where)
        elif form == "alpaca":
            sample = _from_alpaca(record, name, where)
        else:
            sample = cast(Sample, {**record, "id": name})
        validate_sample(sample, where)
        return sample, "none" if own is None else "repeatable" if form == "llava" else "own"

    def stored(
        self,
        record: Mapping[str, Any],
        media: Mapping[str, Sequence[StoredMedium | str]],
        name: str,
        index: int,
        where: str,
        media_folder: str | os.PathLike[str] | None,
    ) -> Sample:
        """The sample called `name` of a record whose media are kept beside it, see `with_media`.

        Raises:
            ValueError: as `sample` and `with_media`; a path leaves the media folder.
        """
        record = with_media({**record, "id": name}, media, f"{where}: sample '{name}'")
        sample, _ = self.sample(record, index, where)
        if media_folder is not None:
            check_paths(sample, media_folder, where)
        sample["id"] = name
        return sample


# The key that tells a form; the first that is there decides.
_KEYS = {"llava": "conversations", "messages": "messages", "caption": "caption", "alpaca": "instruction"}


def with_media(record: Mapping[str, Any], media: Mapping[str, Sequence[StoredMedium | str]], where: str) -> Any:
    """`record` with the media that are kept beside it; without such, its own paths stay.

    In messages they fill the parts of their kind in order; in the other forms they become its "image" or "video".

    Args:
        record: of a form that `RecordReader` reads, or with "text" for the caption.
        media: by kind, "image" or "video", in order.
        where: begins the errors.

    Raises:
        ValueError: the record names, or has parts for, more or fewer media.
    """
    record = {key: value for key, value in record.items() if value is not None}
    if "text" in record and not record.keys() & _KEYS.values():
        record["caption"] = record.pop("text")
    stored = {kind: list(found) for kind, found in media.items() if found}
    if "messages" in record:
        return record | {"messages": _filled(record["messages"], stored, where)}
    for kind, found in stored.items():
        named = record.get(kind, found)
        named = named if isinstance(named, list) else [named]
        if len(named) != len(found):
            raise ValueError(f"{where}: it names {len(named)} {kind}s, but {len(found)} are stored with it")
        record[kind] = found if len(found) > 1 else found[0]
    return record


def _filled(messages: Any, stored: Mapping[str, list[Any]], where: str) -> Any:
    """Messages without the empty fields of a table, and with the stored media in their parts."""
    left = {kind: iter(found) for kind, found in stored.items()}
    filled = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = [_filled_part(part, left, where) for part in content]
            message = {**message, "content": parts}
        filled.append(message)
    for kind, rest in left.items():
        if more := len(list(rest)):
            raise ValueError(f"{where}: {more} of the {kind}s stored with it have no part in its messages")
    return filled or messages


def _filled_part(part: Any, left: Mapping[str, Iterator[Any]], where: str) -> Any:
    if not isinstance(part, Mapping):
        return part
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if isinstance(kind, str) and kind in left:
        medium = next(left[kind], None)
        if medium is None:
            raise ValueError(f"{where}: its messages have more {kind} parts than there are {kind}s stored with it")
        part[kind] = medium
    return part


def check_paths(sample: Sample, media_folder: str | os.PathLike[str], where: str) -> None:
    """Refuses a sample with a path that leaves the media folder, see `check_media_path`."""
    for kind, medium in media_of(sample):
        if isinstance(medium, str):
            check_media_path(medium, media_folder, f"{where}: sample '{sample['id']}'", kind)


def _from_video_instruct(record: dict[str, Any], index: int, videos: VideoFiles, where: str) -> dict[str, Any]:
    """A VideoInstruct record as Video-ChatGPT's LLaVA record; further keys are kept.

    Source: Video-ChatGPT `scripts/convert_instruction_json_to_training_format.py`.
    """
    question, answer, video_id = (record[key] for key in ("q", "a", "video_id"))
    if not all(isinstance(value, str) and value for value in (question, answer, video_id)):
        raise ValueError(f"{where}: a record is {shown(record)}; expected texts as 'q', 'a' and 'video_id'")
    asked = f"{VIDEO_MARKER}\n{question}" if index % 2 else f"{question}\n{VIDEO_MARKER}"
    rest = {key: value for key, value in record.items() if key not in ("q", "a", "video_id")}
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {**rest, "id": video_id, "video": videos[video_id], "conversations": turns}


def _from_llava(record: dict[str, Any], name: str, where: str) -> Sample:
    """A LLaVA record as a sample; keys other than `image`, `video` and `conversations` are kept."""
    where = f"{where} '{name}'"
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: conversations is {shown(turns)}; expected a non-empty list of turns")
    for index, turn in enumerate(turns):
        is_turn = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))
        if not is_turn or turn["from"] not in _LLAVA_ROLES:
            raise ValueError(
                f"{where}: conversations[{index}] is {shown(turn)}; expected {{'from': 'human' | 'gpt', 'value': ...}}"
            )
    roles = [_LLAVA_ROLES[turn["from"]] for turn in turns]
    values = [turn["value"] for turn in turns]
    rest = {key: value for key, value in record.items() if key != "conversations"}
    media = {IMAGE_MARKER: _media_of(rest.pop("image", None), "image", IMAGE_MARKER, roles, values, where)}
    # Only where there is a video: elsewhere it is text, an element of HTML.
    if "video" in rest:
        media[VIDEO_MARKER] = _media_of(rest.pop("video"), "video", VIDEO_MARKER, roles, values, where)
    messages = []
    for role, value in zip(roles, values, strict=True):
        content = _split_markers(value, media) if role == "user" else value
        messages.append({"role": role, "content": content})
    return cast(Sample, {**rest, "id": name, "messages": messages})


def _from_alpaca(record: dict[str, Any], name: str, where: str) -> Sample:
    """An Alpaca record as a sample; other keys are kept."""
    where = f"{where} '{name}'"
    values = {key: record.get(key) or "" for key in ("instruction", "input", "output", "image")}
    for key, value in values.items():
        if key == "image" and isinstance(value, StoredMedium):
            continue
        if not isinstance(value, str) or (not value and key in ("instruction", "output")):
            raise ValueError(f"{where}: {key} is {shown(record.get(key))}; expected a text")
    content: list[Part] = [{"type": "image", "image": values["image"]}] if values["image"] else []
    content.append({"type": "text", "text": values["instruction"]})
    if values["input"]:
        content.append({"type": "text", "text": values["input"], "is_input": True})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": values["output"]}]
    rest = {key: value for key, value in record.items() if key not in values}
    return cast(Sample, {**rest, "id": name, "messages": messages})


def _media_of(
    paths: Any, kind: str, marker: str, roles: list[str], values: list[str], where: str
) -> Iterator[dict[str, Any]]:
    """The parts of one kind, in the order of their markers; puts missing markers into the first human turn."""
    paths = [] if paths is None else [paths] if isinstance(paths, str | StoredMedium) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str | StoredMedium) for path in paths):
        raise ValueError(f"{where}: {kind} is {shown(paths)}; expected a path or a list of paths")
    markers = sum(value.count(marker) for role, value in zip(roles, values, strict=True) if role == "user")
    if markers == 0 and paths and "user" in roles:
        first = roles.index("user")
        values[first] = marker * len(paths) + values[first]
    elif markers != len(paths):
        raise ValueError(
            f"{where}: {markers} '{marker}' in the human turns but {len(paths)} {kind}s; expected one marker "
            f"per {kind} (or no marker at all: {kind}s then come first)"
        )
    return iter([{"type": kind, kind: path} for path in paths])


def _split_markers(value: str, media: Mapping[str, Iterator[dict[str, Any]]]) -> list[Any]:
    parts: list[Any] = []
    for text in re.split(f"({'|'.join(media)})", value):
        if text in media:
            parts.append(next(media[text]))
        elif text:
            parts.append({"type": "text", "text": text})
    return parts
