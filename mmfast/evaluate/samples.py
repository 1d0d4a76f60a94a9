"""Opening a data set by its name: a file, or a part of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mmfast.data.samples import Sample

__all__ = ["open_samples", "world_split"]

_WORLD = "world:"


def open_samples(data: str, media_folder: str | None = None) -> tuple[Sequence[Sample], str | None]:
    """Opens a data set by name.

    Args:
        data: `world:<split>` for the embedded world, else a JSON or JSONL file.
        media_folder: Folder to which image paths are relative. None: the folder of the file.

    Returns:
        The samples, and the media folder (None for the world, whose images need none).

    Raises:
        ValueError: If the world has no such split, or the file holds no samples.
    """
    split = world_split(data)
    if split is not None:
        from mmfast.world import samples

        return cast(Any, samples(split)), None
    from mmfast.data import load_samples

    folder = media_folder if media_folder is not None else str(Path(data).parent)
    loaded = load_samples(data, folder)
    if not loaded:
        raise ValueError(f"data: {data} holds no samples; a file with one sample at least is accepted")
    return loaded, folder


def world_split(data: str) -> str | None:
    """`<split>` of `world:<split>`, None for a file."""
    return data.removeprefix(_WORLD) if data.startswith(_WORLD) else None
