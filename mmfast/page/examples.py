"""Questions to begin with, for runs on the embedded world."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from mmfast.data.samples import content_parts
from mmfast.page.chat import Question

__all__ = ["COUNT", "world_questions"]

COUNT = 3
_FRAME_MS = 400


@cache
def world_questions(kind: str, folder: Path) -> tuple[Question, ...]:
    """Held-out questions of the world, their media written into a folder.

    Args:
        kind: "image" or "video".
        folder: It exists.

    Raises:
        ImportError: If scikit-learn, which has the digits, is missing.
    """
    from mmfast.world import samples

    chosen = samples("questions-test" if kind == "image" else "clips-test")[:COUNT]
    return tuple(_question(sample, kind, folder / f"example-{i}") for i, sample in enumerate(chosen))


def _question(sample: Any, kind: str, file: Path) -> Question:
    text, path = "", file.with_suffix(".png" if kind == "image" else ".gif")
    for part in content_parts(sample["messages"][0]):
        if part["type"] == "text":
            text = part["text"].strip()
        elif part["type"] == "image":
            part["image"].save(path)
        else:
            first, *rest = part["video"]
            first.save(path, save_all=True, append_images=rest, duration=_FRAME_MS, loop=0)
    return Question(text, (str(path),))
