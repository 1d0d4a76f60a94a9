"""Which trained models there are on the disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mmfast.models.trained import DESCRIPTION, find_trained, read_description

__all__ = ["Run", "find_runs", "named_runs"]


@dataclass(frozen=True)
class Run:
    """A folder that `open_model` opens.

    Args:
        name: What a person knows it by.
        folder: The folder.
        description: Its mmfast.json; empty for a folder in another library's layout.
        changed: When it was written, in seconds since 1970.
    """

    name: str
    folder: Path
    description: dict[str, Any]
    changed: float

    @property
    def label(self) -> str:
        """Name, system and date."""
        system = self.description.get("system", "llava")
        return f"{self.name} · {system} · {datetime.fromtimestamp(self.changed):%Y-%m-%d %H:%M}"

    @property
    def is_world(self) -> bool:
        """Whether it stands on the embedded world's backbones."""
        return self.description.get("llm") == self.description.get("encoder") == "world"


def find_runs(root: Path) -> list[Run]:
    """Every model below a folder, the newest first: of runs, of their `best`, and of any other folder of one."""
    runs = []
    for place, folders, files in os.walk(root):
        # Hidden ones are being written.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if DESCRIPTION not in files:
            continue
        folder = Path(place)
        # A run is known by its own folder, in which its model is `model`.
        shown = folder.parent if folder.name == "model" and folder != root else folder
        runs.append(_run(shown.relative_to(root).as_posix() if shown != root else root.name, shown))
    return sorted(runs, key=lambda run: -run.changed)


def named_runs(folders: Sequence[str]) -> list[Run]:
    """The models in these folders, in order.

    Raises:
        FileNotFoundError: If a folder does not exist or holds no model.
    """
    runs = []
    for name in folders:
        folder = Path(name).expanduser()
        if find_trained(folder) is None and not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"demo: {name} holds no trained model; a finished run folder, or a folder with mmfast.json or of "
                "transformers' LLaVA, is accepted; make one: mmfast quickstart"
            )
        runs.append(_run(name, folder))
    return runs


def _run(name: str, folder: Path) -> Run:
    trained = find_trained(folder)
    if trained is None:
        return Run(name, folder, {}, (folder / "config.json").stat().st_mtime)
    try:
        description = read_description(trained)
    except ValueError as error:  # a run that cannot be opened is still shown; opening it tells why
        description = {"system": str(error).partition(";")[0]}
    return Run(name, folder, description, (trained / DESCRIPTION).stat().st_mtime)
