"""Samples in WebDataset tars: indexed once by their headers, then read by offset, in any order; nothing is unpacked.

Source of the layout: https://github.com/webdataset/webdataset (files of one sample share the name up to its first dot).
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mmfast.data.ranges import file_state, read_range, unique_id
from mmfast.data.records import RecordReader, VideoFiles
from mmfast.data.samples import IndexedSamples, Sample, StoredMedium

__all__ = ["TarSamples", "expand_braces"]

# What a file is, by what follows the last dot of its name.
_KINDS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"), "image"),
    **dict.fromkeys(("mp4", "mkv", "webm", "mov", "avi", "mpg", "mpeg", "m4v"), "video"),
    "json": "record",
    "txt": "caption",
}
_MOST_FILES = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarSamples(IndexedSamples):
    """The samples of one or more tars.

    The files of a sample are those whose names differ only behind the first dot: its media, and a `.json` with a record
    in any form of `load_samples`, or a `.txt` with a caption. Files with other endings are left alone. The id of a
    sample is `<name of the tar>/<name of its files>`.

    Args:
        paths: the tars, not compressed. They must not change while this is used.
        media_folder: where media paths in records start, of records whose media are not in the tar.

    Raises:
        FileNotFoundError: a tar is not there.
        ValueError: a file is no such tar, is cut short, or holds a link, a device, or a name that leads out of it.
    """

    def __init__(self, paths: list[Path], media_folder: str | os.PathLike[str] | None = None) -> None:
        super().__init__([])
        self.paths = paths
        self.media_folder = media_folder
        self._states: list[tuple[int, int]] = []
        self._shard_of, self._begin = array("L"), array("Q")
        endings: dict[str, int] = {}
        self._files = {"ending": array("L"), "offset": array("Q"), "size": array("Q")}
        self._reader = RecordReader("", VideoFiles(Path(media_folder or "")))
        taken: dict[str, int] = {}
        for number, path in enumerate(paths):
            for key, members in self._groups(path).items():
                self.ids.append(unique_id(f"{path.stem}/{key}", taken))
                self._shard_of.append(number)
                self._begin.append(len(self._files["size"]))
                for ending, member in members.items():
                    self._files["ending"].append(endings.setdefault(ending, len(endings)))
                    self._files["offset"].append(member.offset_data)
                    self._files["size"].append(member.size)
        self._begin.append(len(self._files["size"]))
        self._endings = list(endings)

    def _groups(self, path: Path) -> dict[str, dict[str, tarfile.TarInfo]]:
        """The files of each sample by their endings."""
        groups: dict[str, dict[str, tarfile.TarInfo]] = {}
        with path.open("rb") as file:
            self._states.append(file_state(file))
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        _check_member(member, path, self._states[-1][0])
                        folder, name = posixpath.split(member.name)
                        stem, _, ending = name.partition(".")
                        if member.isreg() and _kind(name):
                            group = groups.setdefault(posixpath.join(folder, stem), {})
                            if ending in group:
                                raise ValueError(f"{path}: it has two files {member.name!r}; keep one of them")
                            group[ending] = member
            except tarfile.TarError as error:
                raise ValueError(
                    f"{path}: {type(error).__name__}: {error}; a whole tar is accepted, not compressed, since samples "
                    "are read in any order; unpack it with gunzip or the like, or fetch it again"
                ) from error
        return groups

    def read(self, index: int) -> Sample:
        """As `IndexedSamples.read`; media are read when they are decoded."""
        path = self.paths[self._shard_of[index]]
        media: dict[str, list[StoredMedium | str]] = {"image": [], "video": []}
        record: dict[str, Any] = {}
        for name, read in self._members(index):
            kind = _kind(name)
            if kind in media:
                media[kind].append(StoredMedium(f"{path}:{name}", read))
            elif kind == "caption":
                record.setdefault("text", _decoded(read(), f"{path}:{name}"))
            else:
                record |= _record(read(), f"{path}:{name}")
        if not record:
            raise ValueError(
                f"{path}: sample '{self.ids[index]}': it has neither a .json nor a .txt, one of which it needs"
            )
        return self._reader.stored(record, media, self.ids[index], index, str(path), self.media_folder)

    def _members(self, index: int) -> Iterator[tuple[str, Any]]:
        """Name and reader of each file of a sample."""
        shard = self._shard_of[index]
        for place in range(self._begin[index], self._begin[index + 1]):
            ending, offset, size = (column[place] for column in self._files.values())
            name = f"{self.ids[index].partition('/')[2]}.{self._endings[ending]}"
            yield name, partial(read_range, self.paths[shard], self._states[shard], offset, size)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, as a shell has it: `a-{000..002}.tar`, `{train,val}.tar`.

    Raises:
        ValueError: a range falls, or the names are more than 100,000.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    numbers = _RANGE.fullmatch(found[1])
    items = found[1].split(",")
    if numbers:
        first, last = (int(number) for number in numbers.groups())
        if not 0 <= last - first < _MOST_FILES:
            raise ValueError(
                f"data: {found[0]} in {pattern!r} counts {last - first + 1} files; 1 to {_MOST_FILES} are accepted"
            )
        items = [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]
    names = [name for item in items for name in expand_braces(pattern[: found.start()] + item + pattern[found.end() :])]
    if len(names) > _MOST_FILES:
        raise ValueError(f"data: {pattern!r} names {len(names)} files; {_MOST_FILES} are accepted")
    return names


def _check_member(member: tarfile.TarInfo, path: Path, size: int) -> None:
    name = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{path}: {member.name!r} is no plain file; links, devices and sparse files are not accepted")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{path}: the name {member.name!r} leads out of the tar; names below it are accepted")
    if member.offset_data + member.size > size:
        raise ValueError(f"{path}: {member.name!r} is cut short; fetch the tar again")


def _kind(name: str) -> str | None:
    return _KINDS.get(name.rpartition(".")[2].lower())


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); convert the file to UTF-8") from error


def _record(content: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(_decoded(content, where))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON: {error}; one object is accepted") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: it holds a {type(record).__name__}; one object is accepted")
    return record
