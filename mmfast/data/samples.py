"""Samples: the one form every data set is read into, and its checks.

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

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, NotRequired, TypeAlias, TypedDict, cast, overload

Fault: TypeAlias = Literal["malformed", "duplicate id", "outside", "missing", "unreadable", "too large"]
"""What can be wrong with a sample: the record itself, its id, or a medium of it."""


class BadSampleError(ValueError):
    """A sample that cannot be used; `fault` says what is wrong with it, the message which one and why."""

    def __init__(self, message: str, fault: Fault = "malformed") -> None:
        super().__init__(message)
        self.fault: Fault = fault

    def __reduce__(self) -> tuple[type[BadSampleError], tuple[str, Fault]]:
        return type(self), (str(self), self.fault)


@dataclass(frozen=True)
class StoredMedium:
    """A medium inside another file, such as a tar.

    Args:
        name: what errors call it.
        read: gives the bytes of what would be its own file; called when it is decoded.
    """

    name: str
    read: Callable[[], bytes]

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """As `Path.open`."""
        return io.BytesIO(self.read())

    def __str__(self) -> str:
        return self.name


class TextPart(TypedDict):
    """A piece of text."""

    type: Literal["text"]
    text: str
    is_input: NotRequired[bool]


class ImagePart(TypedDict):
    """An image: a path relative to the media folder, a `StoredMedium`, or a `PIL.Image.Image`."""

    type: Literal["image"]
    image: Any


class VideoPart(TypedDict):
    """A clip: a path relative to the media folder, a `StoredMedium`, or a sequence of `PIL.Image.Image`, its frames."""

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
        raise ValueError(f"{where}: a sample is {shown(sample)}; expected an object with 'id' and 'messages'")
    sample_id = sample.get("id")
    if not isinstance(sample_id, str) or not sample_id:
        raise ValueError(f"{where}: id is {shown(sample_id)}; expected a non-empty string; name every sample")
    where = f"{where} '{sample_id}'"
    messages = sample.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages is {shown(messages)}; expected a non-empty list of turns")
    for index, message in enumerate(messages):
        _validate_message(message, f"{where}: messages[{index}]", allow_empty_answers)
    _validate_turn_order([message["role"] for message in messages], where)


def _validate_message(message: Any, where: str, allow_empty_answers: bool) -> None:
    if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant"):
        role = message.get("role") if isinstance(message, Mapping) else message
        raise ValueError(f"{where}.role is {shown(role)}; accepted are 'system', 'user', 'assistant'")
    content = message.get("content")
    if not isinstance(content, str | list):
        raise ValueError(f"{where}.content is {shown(content)}; expected a string or a list of parts")
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
            raise ValueError(f"{where}.text is {shown(part.get('text'))}; expected a string")
        try:
            part["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}.text has half a character at {error.start}, {part['text'][error.start]!r}; whole ones are "
                "accepted; write the file again as UTF-8"
            ) from error
        is_input = part.get("is_input", False)
        if not isinstance(is_input, bool) or (is_input and role != "user"):
            raise ValueError(
                f"{where}.is_input is {shown(is_input)} in a turn of '{role}'; True in a user turn, or none, is valid"
            )
    elif kind == "image":
        if role != "user":
            raise ValueError(f"{where}: an image in a turn of '{role}'; move it to a user turn")
        image = part.get("image")
        # A PIL image is recognised by what is used of it, so that Pillow need not be imported here.
        if not (isinstance(image, str | StoredMedium) and image) and not hasattr(image, "convert"):
            raise ValueError(f"{where}.image is {shown(image)}; expected a path or a PIL image")
    elif kind == "video":
        if role != "user":
            raise ValueError(f"{where}: a video in a turn of '{role}'; move it to a user turn")
        video = part.get("video")
        frames = video if isinstance(video, Sequence) and not isinstance(video, str) else ()
        is_file = isinstance(video, str | StoredMedium) and video
        if not is_file and not (frames and all(hasattr(f, "convert") for f in frames)):
            raise ValueError(f"{where}.video is {shown(video)}; expected a path or a sequence of PIL images")
    else:
        raise ValueError(f"{where} is {shown(part)}; accepted types are 'text', 'image' and 'video'")


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
        BadSampleError: `path` has a `..`, or is absolute and not below `media_folder`.
    """
    pure = PurePath(path)
    escapes = ".." in pure.parts
    if pure.is_absolute() and not escapes:
        escapes = not pure.is_relative_to(os.path.abspath(media_folder))
    if escapes:
        raise BadSampleError(
            f"{where}: {kind} path {path!r} leaves the media folder '{os.fspath(media_folder)}'; accepted are paths "
            "below it; pass the folder that holds all media as media_folder",
            "outside",
        )


class IndexedSamples(Sequence[Sample]):
    """Samples that are read when indexed; of each, only the id is kept in memory.

    Args:
        ids: of the samples, unique.
    """

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids

    @abstractmethod
    def read(self, index: int) -> Sample:
        """The sample of an index in `range(len(self))`.

        Raises:
            ValueError: it is malformed; names it.
        """

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """The sample, or the samples of a slice."""
        if isinstance(index, slice):
            return [self.read(position) for position in range(*index.indices(len(self)))]
        return self.read(range(len(self))[index])


def media_of(sample: Sample) -> Iterator[tuple[str, Any]]:
    """The kind of each medium and the medium itself."""
    for message in sample["messages"]:
        for part in content_parts(message):
            if part["type"] != "text":
                yield part["type"], cast(Any, part)[part["type"]]


def shown(value: Any) -> str:
    """`value` for an error, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
