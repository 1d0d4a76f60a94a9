"""Samples: the one form every data set is read into, its checks, and the readers of data files.

    {"id": "cat-1", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "cat.jpg"},
                                     {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."}]}

A sample has 0..N media, images or videos, anywhere in its user turns. A content that is a plain string means one text
part. A text part of a user turn may be its input, `{"type": "text", "text": ..., "is_input": True}`: what the
instruction is about, as in Alpaca's data. A template that has a place for it writes it there, others on a line of its
own after the question.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, cast

from mmfast.data.captions import from_caption

IMAGE_MARKER = "<image>"
"""What stands for an image in the text of a LLaVA JSON file."""
VIDEO_MARKER = "<video>"
"""What stands for a video in the text of a Video-ChatGPT JSON file."""

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class TextPart(TypedDict):
    """A piece of text."""

    type: Literal["text"]
    text: str
    is_input: NotRequired[bool]


class ImagePart(TypedDict):
    """An image: a path relative to the media folder, or a `PIL.Image.Image`."""

    type: Literal["image"]
    image: Any


class VideoPart(TypedDict):
    """A clip: a path relative to the media folder, or a sequence of `PIL.Image.Image`, its frames."""

    type: Literal["video"]
    video: Any


MediaPart: TypeAlias = ImagePart | VideoPart
Part: TypeAlias = TextPart | MediaPart


class Message(TypedDict):
    """One turn; `content` as a string means one text part."""

    role: Literal["system", "user", "assistant"]
    content: list[Part] | str


class Sample(TypedDict):
    """One conversation. `answer` and `kind` are used by evaluation only; further keys are kept as they are."""

    id: str
    messages: list[Message]
    answer: NotRequired[str]
    kind: NotRequired[str]


def content_parts(message: Message) -> list[Part]:
    """The content of `message` as a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content


def with_media_first(messages: Sequence[Message]) -> list[Message]:
    """The same turns, in which media stand before the text, which becomes one part.

    Source: LLaVA `llava/train/train.py`, which trains on all data so, whatever the order in the file.
    """
    turns = []
    for message in messages:
        parts = content_parts(message)
        media = [part for part in parts if part["type"] != "text"]
        if media:
            text = "".join(cast(TextPart, part)["text"] for part in parts if part["type"] == "text")
            rest = [{"type": "text", "text": text}] if text else []
            message = cast(Message, {**message, "content": [*media, *rest]})
        turns.append(message)
    return turns


def without_last_answer(sample: Sample) -> Sample:
    """`sample` without its final assistant turn: what a model is asked when the answer is to be generated."""
    messages = sample["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return cast(Sample, {**sample, "messages": messages})


def validate_sample(sample: Any, where: str = "sample", allow_empty_answers: bool = False) -> None:
    """Checks that `sample` has the form above.

    The turns are an optional system turn, then user and assistant in turn, beginning with user. A sample may end
    with a user turn (a question to be answered). Images stand in user turns only.

    Args:
        sample: to check.
        where: begins the errors, for example the file and line.
        allow_empty_answers: accept answers without text, as a model may give them in a conversation.

    Raises:
        ValueError: names `where` (for example the file), the sample's id and the field.
    """
    if not isinstance(sample, Mapping):
        raise ValueError(f"{where}: a sample is {_shown(sample)}; expected an object with 'id' and 'messages'")
    sample_id = sample.get("id")
    if not isinstance(sample_id, str) or not sample_id:
        raise ValueError(f"{where}: id is {_shown(sample_id)}; expected a non-empty string; name every sample")
    where = f"{where} '{sample_id}'"
    messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages is {_shown(messages)}; expected a non-empty list of turns")
    for index, message in enumerate(messages):
        _validate_message(message, f"{where}: messages[{index}]", allow_empty_answers)
    _validate_turn_order([message["role"] for message in messages], where)


def _validate_message(message: Any, where: str, allow_empty_answers: bool) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant"):
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"{where}.role is {_shown(role)}; accepted are 'system', 'user', 'assistant'")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise ValueError(f"{where}.content is {_shown(content)}; expected a string or a list of parts")
    parts = content_parts(cast(Message, message))
    for index, part in enumerate(parts):
        _validate_part(part, message["role"], f"{where}.content[{index}]")
    if message["role"] != "assistant" or allow_empty_answers:
        return
    if not "".join(cast(TextPart, part)["text"] for part in parts).strip():
        raise ValueError(f"{where}.content: the answer is empty; remove the turn or give it a text")


def _validate_part(part: Any, role: str, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.text is {_shown(part.get('text'))}; expected a string")
        is_input = part.get("is_input", False)
        if not isinstance(is_input, bool) or (is_input and role != "user"):
            raise ValueError(
                f"{where}.is_input is {_shown(is_input)} in a turn of '{role}'; True in a user turn, or none, is valid"
            )
    elif kind == "image":
        if role != "user":
            raise ValueError(f"{where}: an image in a turn of '{role}'; move it to a user turn")
        image = part.get("image")
        # A PIL image is recognised by what is used of it, so that Pillow need not be imported here.
        if not (isinstance(image, str) and image) and not hasattr(image, "convert"):
            raise ValueError(f"{where}.image is {_shown(image)}; expected a path or a PIL image")
    elif kind == "video":
        if role != "user":
            raise ValueError(f"{where}: a video in a turn of '{role}'; move it to a user turn")
        video = part.get("video")
        frames = video if isinstance(video, Sequence) and not isinstance(video, str) else ()
        if not (isinstance(video, str) and video) and not (frames and all(hasattr(f, "convert") for f in frames)):
            raise ValueError(f"{where}.video is {_shown(video)}; expected a path or a sequence of PIL images")
    else:
        raise ValueError(f"{where} is {_shown(part)}; accepted types are 'text', 'image' and 'video'")


def _validate_turn_order(roles: list[str], where: str) -> None:
    first = 1 if roles[0] == "system" else 0
    if len(roles) == first:
        raise ValueError(f"{where}: only a system turn; expected a user turn after it")
    for index, role in enumerate(roles[first:]):
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise ValueError(
                f"{where}: messages[{first + index}] is a turn of '{role}' where one of '{expected}' is expected; "
                "after an optional system turn, user and assistant take turns; merge or remove turns"
            )


def check_media_path(path: str, media_folder: str | os.PathLike[str], where: str, kind: str = "image") -> None:
    """Refuses a path that, as written, leaves `media_folder`; touches no file (links are followed on opening).

    Raises:
        ValueError: `path` has a `..`, or is absolute and not below `media_folder`.
    """
    pure = PurePath(path)
    escapes = ".." in pure.parts
    if pure.is_absolute() and not escapes:
        escapes = not pure.is_relative_to(os.path.abspath(media_folder))
    if escapes:
        raise ValueError(
            f"{where}: {kind} path {path!r} leaves the media folder '{os.fspath(media_folder)}'; accepted are paths "
            "below it; pass the folder that holds all media as media_folder"
        )


def load_samples(path: str | os.PathLike[str], media_folder: str | os.PathLike[str] | None = None) -> list[Sample]:
    """Reads a data file; what it holds is told from the content of each record.

    - a JSON list, or JSON Lines, of samples as described in this module;
    - the same of LLaVA records: `{"id", "image": path | [paths], "conversations": [{"from": "human" | "gpt",
      "value"}]}`. Every `<image>` in a human turn becomes an image part at its position. Without any marker the
      images come first in the first human turn. Video-ChatGPT's have "video" and `<video>`;
    - the same of VideoInstruct records: `{"q", "a", "video_id"}`. As Video-ChatGPT converts them, the video follows
      the question in records of even index and precedes it in the others. The video is the file of the media folder
      whose name without ending is `video_id`: `<video_id>.pkl` (features, see `mmfast.data.features`) if there is
      none or several of them;
    - the same of Alpaca records: `{"instruction", "input": text or "", "output"}`, and `"image": path` for one about an
      image.

    A missing id becomes `<file stem>-<index>`, for VideoInstruct `video_id`. LLaVA files use the image's name as the
    id of several records, so there a repeated id gets a suffix (`#2`, `#3`, …).

    Args:
        path: the file, UTF-8.
        media_folder: where the image paths start; default: the folder of `path`. Files are not opened here.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken JSON (file and line), a malformed sample (id and field), a repeated id in a file of
            messages, markers that do not match the images, a path that leaves the media folder.
    """
    path = Path(path)
    folder = path.parent if media_folder is None else Path(media_folder)
    samples: list[Sample] = []
    unnamed: list[Sample] = []
    taken: dict[str, int] = {}
    videos = _VideoFiles(folder)
    for index, (where, record) in enumerate(_records(path)):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record is {_shown(record)}; expected an object")
        if record.keys() >= {"q", "a", "video_id"}:
            record = _from_video_instruct(record, index, videos, where)
        is_llava, is_caption = "conversations" in record, "caption" in record
        own = record.get("image_id") if is_caption and record.get("id") is None else record.get("id")
        is_named = own is not None
        name = str(own) if is_named else f"{path.stem}-{index}"
        where = f"{where}: sample"
        if is_llava:
            sample = _from_llava(record, name, where)
        elif is_caption:
            sample = from_caption(record, name, index, where)
        elif "instruction" in record and "messages" not in record:
            sample = _from_alpaca(record, name, where)
        else:
            sample = cast(Sample, {**record, "id": name})
        validate_sample(sample, where)
        for kind, medium in _media(sample):
            if isinstance(medium, str):
                check_media_path(medium, folder, f"{where} '{name}'", kind)
        if not is_named:
            unnamed.append(sample)
        elif name in taken and not is_llava:
            raise ValueError(
                f"{where} '{name}': an earlier sample has the same id; ids name samples in errors and results; make "
                "them unique, or remove them"
            )
        else:
            sample["id"] = _unique(name, taken)
        samples.append(sample)
    for sample in unnamed:
        sample["id"] = _unique(sample["id"], taken)
    if not samples:
        raise ValueError(f"{path}: no samples; expected a JSON list or JSON Lines of samples")
    return samples


def _unique(name: str, taken: dict[str, int]) -> str:
    """`name`, or `name` with the first free suffix; `taken` counts the uses of each name."""
    unique = name
    while unique in taken:
        taken[name] += 1
        unique = f"{name}#{taken[name]}"
    taken[unique] = 1
    return unique


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a JSON list or of JSON Lines, each with the place it was read from."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); convert the file to UTF-8") from error
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{error.lineno}: broken JSON: {error.msg} (column {error.colno}); expected a list of samples"
            ) from error
        for record in records:
            yield str(path), record
        return
    annotations = _annotations(text)
    if annotations is not None:
        for record in annotations:
            yield str(path), record
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: broken JSON: {error.msg} (column {error.colno}); expected one whole object per "
                "line, or a file that is one JSON list"
            ) from error


def _annotations(text: str) -> list[Any] | None:
    """The records of a file that is one object with nothing but a list of "annotations"."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return None
    whole = isinstance(content, dict) and content.keys() == {"annotations"} and isinstance(content["annotations"], list)
    return content["annotations"] if whole else None


class _VideoFiles:
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


def _from_video_instruct(record: dict[str, Any], index: int, videos: _VideoFiles, where: str) -> dict[str, Any]:
    """A VideoInstruct record as Video-ChatGPT's LLaVA record; further keys are kept.

    Source: Video-ChatGPT `scripts/convert_instruction_json_to_training_format.py`.
    """
    question, answer, video_id = (record[key] for key in ("q", "a", "video_id"))
    if not all(isinstance(value, str) and value for value in (question, answer, video_id)):
        raise ValueError(f"{where}: a record is {_shown(record)}; expected texts as 'q', 'a' and 'video_id'")
    asked = f"{VIDEO_MARKER}\n{question}" if index % 2 else f"{question}\n{VIDEO_MARKER}"
    rest = {key: value for key, value in record.items() if key not in ("q", "a", "video_id")}
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {**rest, "id": video_id, "video": videos[video_id], "conversations": turns}


def _from_llava(record: dict[str, Any], name: str, where: str) -> Sample:
    """A LLaVA record as a sample; keys other than `image`, `video` and `conversations` are kept."""
    where = f"{where} '{name}'"
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: conversations is {_shown(turns)}; expected a non-empty list of turns")
    for index, turn in enumerate(turns):
        is_turn = isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in _LLAVA_ROLES
        if not is_turn:
            raise ValueError(
                f"{where}: conversations[{index}] is {_shown(turn)}; expected {{'from': 'human' | 'gpt', 'value': ...}}"
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
        if not isinstance(value, str) or (not value and key in ("instruction", "output")):
            raise ValueError(f"{where}: {key} is {_shown(record.get(key))}; expected a text")
    content: list[Part] = [{"type": "image", "image": values["image"]}] if values["image"] else []
    content.append({"type": "text", "text": values["instruction"]})
    if values["input"]:
        content.append({"type": "text", "text": values["input"], "is_input": True})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": values["output"]}]
    rest = {key: value for key, value in record.items() if key not in values}
    return cast(Sample, {**rest, "id": name, "messages": messages})


def _media_of(
    paths: Any, kind: str, marker: str, roles: list[str], values: list[str], where: str
) -> Iterator[dict[str, str]]:
    """The parts of one kind, in the order of their markers; puts missing markers into the first human turn."""
    paths = [] if paths is None else [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: {kind} is {_shown(paths)}; expected a path or a list of paths")
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


def _split_markers(value: str, media: Mapping[str, Iterator[dict[str, str]]]) -> list[Any]:
    parts: list[Any] = []
    for text in re.split(f"({'|'.join(media)})", value):
        if text in media:
            parts.append(next(media[text]))
        elif text:
            parts.append({"type": "text", "text": text})
    return parts


def _media(sample: Sample) -> Iterator[tuple[str, Any]]:
    """The kind of each medium and the medium itself."""
    for message in sample["messages"]:
        for part in content_parts(message):
            if part["type"] != "text":
                yield part["type"], cast(Any, part)[part["type"]]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
