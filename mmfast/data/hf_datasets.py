"""Samples in a folder of Hugging Face `datasets` on the disk; no network is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmfast.data.ranges import unique_id
from mmfast.data.records import RecordReader, VideoFiles
from mmfast.data.samples import IndexedSamples, Sample, StoredMedium

__all__ = ["HfSamples", "is_dataset_folder"]

_MARKS = ("dataset_dict.json", "state.json")
_ENDINGS = (".parquet", ".arrow")
_NUMBERED = re.compile(r"-\d+-of-\d+$")


class HfSamples(IndexedSamples):
    """The rows of a data set: of `save_to_disk`, or of the parquet or arrow files in a folder.

    A row is a record in any form of `load_samples`, or has a caption in "text". Media are its columns with the feature
    Image or Video, or lists of these; other columns are kept as they are.

    Args:
        folder: the folder. Parquet files are converted in the cache of `datasets` when they are first opened.
        split: which rows. None: all, where there is one split only.
        media_folder: where media that are given by a path start; default: `folder`.

    Raises:
        FileNotFoundError: no such folder.
        ImportError: the package `datasets` is missing.
        ValueError: the folder holds no data set, or not that split, or its files are broken.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str | None = None,
        media_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.media_folder = self.folder if media_folder is None else media_folder
        dataset = _open(self.folder, split)
        kinds = {name: _media_kind(feature) for name, feature in dataset.features.items()}
        self._media = {name: kind for name, kind in kinds.items() if kind}
        # As arrow has them: `datasets` itself would decode every medium.
        self._table = dataset.with_format("arrow")
        self._reader = RecordReader(self.folder.name, VideoFiles(Path(self.media_folder)))
        names = [f"{self.folder.name}-{index}" for index in range(len(dataset))]
        if "id" in dataset.features:
            given = self._table.select_columns("id")[:]["id"].to_pylist()
            names = [name if own is None else str(own) for name, own in zip(names, given, strict=True)]
        taken: dict[str, int] = {}
        super().__init__([unique_id(name, taken) for name in names])

    def read(self, index: int) -> Sample:
        """As `IndexedSamples.read`."""
        (row,) = self._table[index].to_pylist()
        media: dict[str, list[StoredMedium | str]] = {"image": [], "video": []}
        for name, kind in self._media.items():
            cell = row.pop(name)
            cells = cell if isinstance(cell, list) else [cell]
            where = f"{self.folder}[{index}].{name}"
            media[kind] += [_medium(found, where) for found in cells if found is not None]
        return self._reader.stored(row, media, self.ids[index], index, str(self.folder), self.media_folder)


def is_dataset_folder(path: Path) -> bool:
    """Whether `path` looks like a folder that `HfSamples` opens."""
    return path.is_dir() and (any((path / mark).is_file() for mark in _MARKS) or bool(_files(path)))


def _files(folder: Path) -> list[Path]:
    """The files with rows, in the folder or in one of its folders."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return sorted(path for path in found if path.suffix in _ENDINGS)


def _open(folder: Path, split: str | None) -> Any:
    """The rows of the split as a `datasets.Dataset`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data: {folder} is read with the package datasets, which is not installed; pip install mmfast[hf]"
        ) from error
    paths = _paths(folder, split)
    # Broken files raise errors of arrow, of the disk, and of `datasets` itself.
    try:
        if paths[0].is_dir():
            return datasets.load_from_disk(str(paths[0]))
        names = [str(path) for path in paths]
        if paths[0].suffix == ".parquet":
            return datasets.Dataset.from_parquet(names)
        return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
    except Exception as error:
        raise ValueError(
            f"{folder}: datasets cannot read it: {type(error).__name__}: {error}; fetch it again"
        ) from error


def _paths(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, or the folder that `save_to_disk` wrote for it."""
    splits: dict[str, list[Path]] = {}
    if (folder / "dataset_dict.json").is_file():
        splits = {name: [folder / name] for name in _splits(folder / "dataset_dict.json")}
    elif (folder / "state.json").is_file():
        splits = {split or "": [folder]}
    else:
        for file in _files(folder):
            splits.setdefault(_split_of(file), []).append(file)
    if not splits:
        raise ValueError(
            f"{folder}: no data set; a folder of save_to_disk, or one with parquet or arrow files, is accepted"
        )
    if (split or len(splits) > 1) and split not in splits:
        raise ValueError(f"{folder}: the split is {split!r}; one of {', '.join(sorted(splits))} is accepted")
    return splits[split or next(iter(splits))]


def _splits(path: Path) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8")).get("splits")
    if not isinstance(found, list) or not all(map(_is_name, found)):
        raise ValueError(f"{path}: splits is {found!r}; a list of names of folders beside it is accepted")
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and value != ".."


def _split_of(file: Path) -> str:
    """`train` of train-00000-of-00002.parquet, of train.parquet and of train/0000.parquet."""
    name = _NUMBERED.sub("", file.stem)
    return file.parent.name if name.isdigit() else name


def _media_kind(feature: Any) -> str | None:
    """ "image" or "video" of a column with media or lists of them."""
    if isinstance(feature, Sequence) and len(feature) == 1:
        feature = feature[0]
    feature = getattr(feature, "feature", feature)
    return {"Image": "image", "Video": "video"}.get(type(feature).__name__)


def _medium(cell: Any, where: str) -> StoredMedium | str:
    """A medium by its bytes or, without them, its path."""
    data, path = cell.get("bytes"), cell.get("path")
    if data is not None:
        return StoredMedium(where, partial(bytes, data))
    if not path:
        raise ValueError(f"{where}: it has neither bytes nor a path; one of the two is accepted")
    return str(path)
