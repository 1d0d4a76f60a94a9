"""Samples in JSON files: read through once to check them and to find where each stands, then one by one."""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from mmfast.data.ranges import file_state, read_range, unique_id
from mmfast.data.records import RecordReader, VideoFiles, check_paths
from mmfast.data.samples import BadSampleError, Fault, IndexedSamples, Sample

__all__ = ["JsonSamples", "load_samples"]

_CHUNK = 1 << 20
# Spaces and a key at the begin of a file, which tell its form.
_HEAD = 1 << 16
# A record that is not whole after so many characters is broken.
_LONGEST = 1 << 26
_ANNOTATIONS = re.compile(rb'\s*\{\s*"annotations"\s*:\s*(?=\[)')
_SPACES = re.compile(r"\s*")


class _Place(NamedTuple):
    """A record of a file: where it begins, how long it is, and its line, 0 in a list."""

    offset: int
    length: int
    line: int


class JsonSamples(IndexedSamples):
    """The samples of a JSON or JSON Lines file, see `load_samples`; a record is read when it is indexed.

    Args:
        path: the file, UTF-8. It must not change while this is used.
        media_folder: where media paths start; default: the folder of `path`.
        strict: False has a malformed sample raise when it is indexed, not now.
        only: the form that every record must have; None: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_samples`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        media_folder: str | os.PathLike[str] | None = None,
        strict: bool = True,
        only: Literal["alpaca"] | None = None,
    ) -> None:
        super().__init__([])
        self.path = Path(path)
        self.media_folder = self.path.parent if media_folder is None else Path(media_folder)
        self._reader = RecordReader(self.path.stem, VideoFiles(self.media_folder), only)
        self._places = [array("Q") for _ in _Place._fields]
        self._faults: dict[int, tuple[str, Fault]] = {}
        with self.path.open("rb") as file:
            self._state = file_state(file)
            self._index(file, strict)
        if not self.ids:
            raise ValueError(f"{path}: no samples; expected a JSON list or JSON Lines of samples")

    def _index(self, file: BinaryIO, strict: bool) -> None:
        unnamed: list[int] = []
        taken: dict[str, int] = {}
        for index, (place, record) in enumerate(_records(file, self.path)):
            for column, value in zip(self._places, place, strict=True):
                column.append(value)
            own = record.get("id") if isinstance(record, dict) else None
            name, is_named = (str(own), True) if own else (f"{self.path.stem}-{index}", False)
            try:
                if isinstance(record, ValueError):
                    raise record
                sample, naming = self._reader.sample(record, index, self._where(index))
                name, is_named = sample["id"], naming != "none"
                check_paths(sample, self.media_folder, self._where(index))
                if naming == "own" and name in taken:
                    raise BadSampleError(
                        f"{self._where(index)}: sample '{name}': an earlier sample has the same id; ids name samples "
                        "in errors and results; make them unique, or remove them",
                        "duplicate id",
                    )
            except ValueError as error:
                if strict:
                    raise
                self._faults[index] = str(error), getattr(error, "fault", "malformed")
            if not is_named:
                unnamed.append(index)
            self.ids.append(unique_id(name, taken) if is_named else name)
        for index in unnamed:
            self.ids[index] = unique_id(self.ids[index], taken)

    def _where(self, index: int) -> str:
        line = self._places[_Place._fields.index("line")][index]
        return f"{self.path}:{line}" if line else str(self.path)

    def read(self, index: int) -> Sample:
        """As `IndexedSamples.read`; the file must be as it was."""
        if index in self._faults:
            raise BadSampleError(*self._faults[index])
        offset, length, _ = (column[index] for column in self._places)
        record = json.loads(read_range(self.path, self._state, offset, length))
        sample, _ = self._reader.sample(record, index, self._where(index))
        sample["id"] = self.ids[index]
        return sample


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
    return JsonSamples(path, media_folder)[:]


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[_Place, Any]]:
    """The records of a JSON list or of JSON Lines; in the place of a broken line, the error."""
    start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    file.seek(start)
    head = file.read(_HEAD)
    annotations = _ANNOTATIONS.match(head)
    if annotations:
        yield from _listed(file, path, start + annotations.end(), end="]}")
    elif head.lstrip().startswith(b"["):
        yield from _listed(file, path, start + len(head) - len(head.lstrip()), end="]")
    else:
        file.seek(start)
        yield from _lines(file, path, start)


def _lines(file: BinaryIO, path: Path, offset: int) -> Iterator[tuple[_Place, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = _Place(offset, len(line), number)
            try:
                yield place, json.loads(line.decode())
            except UnicodeDecodeError as error:
                yield place, ValueError(f"{path}:{number}: not UTF-8 ({error}); convert the file to UTF-8")
            except RecursionError:
                yield place, ValueError(f"{path}:{number}: nested too deeply; a record of a few levels is accepted")
            except json.JSONDecodeError as error:
                yield (
                    place,
                    ValueError(
                        f"{path}:{number}: broken JSON: {error.msg} (column {error.colno}); expected one whole object "
                        "per line, or a file that is one JSON list"
                    ),
                )
        offset += len(line)


def _listed(file: BinaryIO, path: Path, offset: int, end: str) -> Iterator[tuple[_Place, Any]]:
    """The elements of the list that begins at byte `offset`; `end` is all that may follow the last, spaces aside."""
    text = _Window(file, path, offset)
    text.take("[")
    if not text.starts(end[0]):
        while True:
            begin, value = text.offset, text.value()
            yield _Place(begin, text.offset - begin, 0), value
            if not text.take(","):
                break
    rest = "".join(text.rest().split())
    if rest != end:
        raise ValueError(f"{path}: broken JSON: {rest[:40]!r} where its list ends; expected a list of samples, alone")


class _Window:
    """A UTF-8 file as text, read forwards; `offset` is the byte that is read next."""

    def __init__(self, file: BinaryIO, path: Path, offset: int) -> None:
        self._file, self._path = file, path
        file.seek(offset)
        self.offset, self._text, self._at = offset, "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()

    def starts(self, character: str) -> bool:
        """Whether this character is next."""
        self._fill()
        return self._text.startswith(character, self._at)

    def take(self, character: str) -> bool:
        """Goes behind this character, and spaces around it, and says whether it was there."""
        self._skip_spaces()
        found = self.starts(character)
        if found:
            self._go_to(self._at + 1)
            self._skip_spaces()
        return found

    def value(self) -> Any:
        """The JSON value that begins here; goes behind it."""
        self._fill()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                line, _ = self._line_and_column(self._at)
                raise ValueError(
                    f"{self._path}:{line}: nested too deeply; a record of a few levels is accepted"
                ) from error
            except json.JSONDecodeError as error:
                if len(self._text) - self._at <= _LONGEST and self._more():
                    continue
                line, column = self._line_and_column(error.pos)
                raise ValueError(
                    f"{self._path}:{line}: broken JSON: {error.msg} (column {column}); expected a list of samples"
                ) from error
            self._go_to(end)
            return value

    def rest(self) -> str:
        while self._more():
            pass
        return self._text[self._at :]

    def _skip_spaces(self) -> None:
        while True:
            self._fill()
            end = cast(re.Match[str], _SPACES.match(self._text, self._at)).end()
            is_end = end == len(self._text)
            self._go_to(end)
            if not is_end or not self._more():
                return

    def _go_to(self, end: int) -> None:
        self.offset += len(self._text[self._at : end].encode())
        self._at = end

    def _fill(self) -> None:
        if len(self._text) - self._at <= _CHUNK // 2:
            self._more()

    def _more(self) -> bool:
        chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 ({error}); convert the file to UTF-8") from error
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(chunk)

    def _line_and_column(self, position: int) -> tuple[int, int]:
        self._file.seek(0)
        before = self._file.read(self.offset).decode("utf-8-sig") + self._text[self._at : position]
        return before.count("\n") + 1, len(before) - before.rfind("\n")
