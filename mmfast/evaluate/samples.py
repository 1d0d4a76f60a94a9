"""Opening a data set by its name: the formats that `--data` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from mmfast.data.samples import Sample

__all__ = ["FORMATS", "Format", "is_scienceqa", "open_samples", "world_split"]

Opened: TypeAlias = "tuple[Sequence[Sample], str | None]"


@dataclass(frozen=True)
class Format:
    """A kind of data set.

    Args:
        form: how its name is written, for people.
        open: opens what follows the prefix in a name: `open(rest, media_folder, strict)` as `open_samples` does.
        is_it: whether a path without a prefix is of it.
    """

    form: str
    open: Callable[[str, str | None, bool], Opened]
    is_it: Callable[[Path], bool] = lambda path: False


def open_samples(data: str, media_folder: str | None = None, strict: bool = True) -> Opened:
    """Opens a data set by name.

    Args:
        data: `<format>:<rest>` with a key of `FORMATS`, or the path of a file or folder whose format its name or
            content tells.
        media_folder: Folder to which media paths are relative. None: the folder of the file, for ScienceQA `images`
            in that folder.
        strict: Whether a malformed sample is refused now; False has it raise its error when it is indexed. Formats
            that are not read through when they are opened have that always.

    Returns:
        The samples, and the media folder (None for the world, whose images need none).

    Raises:
        OSError: If a file is missing or cannot be read; it names the data set and what is accepted.
        ValueError: If the format is unknown, there is no such split, a sample is malformed, or there are none.
    """
    name, separator, rest = data.partition(":")
    if not separator or name not in FORMATS:
        path = Path(data).expanduser()
        name = next((key for key, known in FORMATS.items() if known.is_it(path)), "")
        rest = str(path)
        if not name:
            there = "its format is not known" if path.exists() else "there is no such file or format"
            raise (ValueError if path.exists() else FileNotFoundError)(f"data: {data!r}: {there}; {_accepted()}")
    try:
        samples, folder = FORMATS[name].open(rest, media_folder, strict)
    except OSError as error:
        # One of our own says it all; the system's has a number.
        problem = f"{error.filename}: {error.strerror}" if error.errno is not None else str(error)
        raise type(error)(f"data: {data!r} cannot be opened: {problem}; {_accepted()}") from error
    if not samples:
        raise ValueError(f"data: {data} holds no samples; a file with one sample at least is accepted")
    return samples, folder


def _accepted() -> str:
    return f"accepted are {', '.join(known.form for known in FORMATS.values())}"


def _open_world(split: str, media_folder: str | None, strict: bool) -> Opened:
    from mmfast.world import samples

    return cast(Any, samples(split)), None


def _open_json(path: str, media_folder: str | None, strict: bool, only: Any = None) -> Opened:
    from mmfast.data import JsonSamples

    folder = media_folder if media_folder is not None else str(Path(path).parent)
    return JsonSamples(path, folder, strict, only), folder


def _open_alpaca(path: str, media_folder: str | None, strict: bool) -> Opened:
    return _open_json(path, media_folder, strict, only="alpaca")


def _open_scienceqa(name: str, media_folder: str | None, strict: bool) -> Opened:
    from mmfast.data import load_scienceqa

    path, _, split = name.rpartition(":")
    if not path:
        raise ValueError(f"data: 'scienceqa:{name}' names no split; {FORMATS['scienceqa'].form} is accepted")
    folder = media_folder if media_folder is not None else str(Path(path).parent / "images")
    return load_scienceqa(path, split, folder), folder


def _open_hf(name: str, media_folder: str | None, strict: bool) -> Opened:
    from mmfast.data import HfSamples

    folder, _, split = name.rpartition(":") if not Path(name).expanduser().is_dir() else (name, "", "")
    samples = HfSamples(Path(folder or name).expanduser(), split if folder else None, media_folder)
    return samples, str(samples.media_folder)


def _open_tar(name: str, media_folder: str | None, strict: bool) -> Opened:
    from mmfast.data import TarSamples, expand_braces

    return TarSamples([Path(path).expanduser() for path in expand_braces(name)], media_folder), media_folder


def _is_dataset_folder(path: Path) -> bool:
    from mmfast.data import is_dataset_folder

    return is_dataset_folder(path)


FORMATS = {
    "json": Format("<file>.json or .jsonl", _open_json, lambda path: path.suffix in (".json", ".jsonl")),
    "alpaca": Format("alpaca:<file>.json", _open_alpaca),
    "scienceqa": Format("scienceqa:<problems.json>:<split>", _open_scienceqa),
    "hf": Format("hf:<folder>[:<split>]", _open_hf, _is_dataset_folder),
    "tar": Format("tar:<shards-{000..009}>.tar", _open_tar, lambda path: path.suffix == ".tar"),
    "world": Format("world:<split>", _open_world),
}
"""The formats by the prefix of their names."""


def is_scienceqa(data: str) -> bool:
    """Whether the name is that of a split of ScienceQA."""
    return data.startswith("scienceqa:")


def world_split(data: str) -> str | None:
    """`<split>` of `world:<split>`, None for a file."""
    return data.removeprefix("world:") if data.startswith("world:") else None
