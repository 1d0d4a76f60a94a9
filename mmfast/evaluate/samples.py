"""Opening a data set by its name: a file, a split of ScienceQA, or of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mmfast.data.samples import Sample

__all__ = ["is_scienceqa", "open_samples", "world_split"]

_WORLD = "world:"
_SCIENCEQA = "scienceqa:"


def open_samples(data: str, media_folder: str | None = None) -> tuple[Sequence[Sample], str | None]:
    """Opens a data set by name.

    Args:
        data: `world:<split>` for the embedded world;
            `scienceqa:<path of problems.json>:<split>`; else a JSON or JSONL file.
        media_folder: Folder to which image paths are relative. None: the folder of the file, for ScienceQA `images`
            in that folder.

    Returns:
        The samples, and the media folder (None for the world, whose images need none).

    Raises:
        ValueError: If there is no such split, or the file holds no samples.
    """
    split = world_split(data)
    if split is not None:
        from mmfast.world import samples

        return cast(Any, samples(split)), None
    if is_scienceqa(data):
        from mmfast.data.scienceqa import load_scienceqa

        path, _, split = data.removeprefix(_SCIENCEQA).rpartition(":")
        folder = media_folder if media_folder is not None else str(Path(path).parent / "images")
        return load_scienceqa(path, split, folder), folder
    from mmfast.data import load_samples

    folder = media_folder if media_folder is not None else str(Path(data).parent)
    loaded = load_samples(data, folder)
    if not loaded:
        raise ValueError(f"data: {data} holds no samples; a file with one sample at least is accepted")
    return loaded, folder


def is_scienceqa(data: str) -> bool:
    """Whether the name is that of a split of ScienceQA."""
    return data.startswith(_SCIENCEQA)


def world_split(data: str) -> str | None:
    """`<split>` of `world:<split>`, None for a file."""
    return data.removeprefix(_WORLD) if data.startswith(_WORLD) else None
