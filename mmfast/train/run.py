"""The run folder: what may be started or resumed in it, and what a checkpoint of a run consists of."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.files import explained_writing, remove_leftovers, replace_folder, write_json
from mmfast.train.checkpoint import Checkpoint, read_newest_checkpoint
from mmfast.train.config import TrainConfig, load_config, save_config

if TYPE_CHECKING:
    from torch import Tensor

    from mmfast.models.base import MultimodalModel

__all__ = ["Progress", "RunFolder", "StageResult", "versions"]

# A resumed run may differ in these: they change nothing of what is computed.
_FREE = (
    "out",
    "num_workers",
    "sharding",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "keep_best",
    "max_nonfinite_steps",
    "max_bad",
)


@dataclass
class StageResult:
    """What one finished stage did."""

    name: str
    """Its name."""
    steps: int
    """Optimiser steps."""
    trainable_parameters: int
    """Parameters that trained."""
    seconds: float
    """Wall time of its steps, over all resumes."""
    peak_memory_mb: float
    """Peak of GPU memory, or of the process's resident memory, in MB of 10^6 bytes; the largest of all resumes."""
    loss: float | None
    """Loss of its last step; None if that one was not finite."""
    eval_loss: float | None = None
    """Loss on the held-out samples at its end; None without such samples, or if it was not finite."""
    best_eval_loss: float | None = None
    """The lowest of these losses in the stage; None as above."""
    best_step: int | None = None
    """The step of the run after which that was measured."""
    bad_samples: list[str] = field(default_factory=list)
    """Errors of the bad samples that were met and replaced, each once."""


@dataclass
class Progress:
    """Where a run is: everything that is neither a tensor nor in the configuration."""

    stage: int = 0
    """Index of the stage that the next step belongs to; the number of stages when all are done."""
    step: int = 0
    """Optimiser steps of that stage that are done; with the seed it fixes epoch and position in the data."""
    total_steps: int = 0
    """Optimiser steps of the whole run that are done."""
    nonfinite_steps: int = 0
    """Steps that were skipped because the loss or a gradient was not finite."""
    supervised_tokens: int = 0
    """Tokens that entered a loss so far."""
    seconds: float = 0.0
    """Wall time of the running stage so far."""
    peak_memory_mb: float = 0.0
    """Peak memory of the running stage so far."""
    gradients_checked: bool = False
    """Whether the running stage's gradients were checked."""
    last_loss: float | None = None
    """Loss of the last step; None before the first, and where it was not finite."""
    eval_loss: float | None = None
    """The running stage's last loss on the held-out samples; None before the first, and where it was not finite."""
    best_eval_loss: float | None = None
    """The lowest of these losses; None before the first that was finite."""
    best_step: int | None = None
    """The step of the run after which that was measured."""
    bad_samples: list[str] = field(default_factory=list)
    """Errors of the bad samples that the running stage has met, each once."""
    finished: list[StageResult] = field(default_factory=list)
    """The stages that are done."""

    def next_stage(self) -> None:
        """Moves to the beginning of the next stage."""
        self.stage += 1
        self.step = 0
        self.seconds = self.peak_memory_mb = 0.0
        self.gradients_checked = False
        self.eval_loss = self.best_eval_loss = self.best_step = None
        self.bad_samples = []

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """What `to_dict` returned, again.

        Raises:
            ValueError: If it is that of another release.
        """
        try:
            return cls(**{**values, "finished": [StageResult(**result) for result in values["finished"]]})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"train: the checkpoint's progress cannot be read ({type(error).__name__}: {error}); that of this "
                "release is accepted; resume with the release that wrote it"
            ) from error


class RunFolder:
    """The folder of one run: `config.yaml`, `log.jsonl`, `checkpoints/`, perhaps `best/` and, at the end, `model/`.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.model = self.path / "model"

    def check_new(self) -> None:
        """Checks that a run can be started here.

        Raises:
            FileExistsError: If a run that has made a step, or a model, is there already.
            OSError: If nothing can be written there.
        """
        stepped = self.log.is_file() and self.log.stat().st_size > 0
        there = [path.name for path in (self.checkpoints, self.best, self.model) if path.exists()]
        if there or stepped:
            names = ", ".join([*there, *([self.log.name] if stepped else [])])
            raise FileExistsError(
                f"train: {self.path} holds a run already ({names}); a new or empty folder is accepted; continue it "
                "with --resume, or choose another --out"
            )
        _check_writable(self.path)

    def start(self, config: TrainConfig) -> None:
        """Makes the folder and writes the configuration."""
        with explained_writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        save_config(config, self.config)

    def save_best(self, model: MultimodalModel, trained: Mapping[str, Tensor], step: int, eval_loss: float) -> None:
        """Puts the model, whose whole `trained_state` is given, in the place of the best one so far.

        Raises:
            OSError: If it cannot be written; the one before stays whole.
        """

        def write(folder: Path) -> None:
            model.save_trained(folder, trained)
            write_json(folder / "evaluation.json", {"step": step, "eval_loss": eval_loss})

        replace_folder(self.best, write)

    def resume(self, config: TrainConfig) -> Checkpoint:
        """Reads the newest whole checkpoint and removes what a crash left half-written.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            OSError: If nothing can be written there.
            ValueError: If the configuration is another one, or every checkpoint is damaged.
        """
        if not self.config.is_file():
            raise FileNotFoundError(
                f"train: {self.path} holds no run to resume (no config.yaml); the folder of a started run is "
                "accepted; start without --resume"
            )
        _check_same(load_config(self.config), config, self.config)
        for folder in (self.path, self.checkpoints, self.model):
            _check_writable(folder)
            remove_leftovers(folder)
        checkpoint = read_newest_checkpoint(self.checkpoints)
        if checkpoint is None:
            raise FileNotFoundError(
                f"train: {self.path} has no checkpoint yet, so there is nothing to resume; remove the folder and "
                "start without --resume"
            )
        return checkpoint


def versions() -> dict[str, str]:
    """Versions of what computes, for the record."""
    import torch
    import transformers

    import mmfast

    return {
        "mmfast": mmfast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_writable(folder: Path) -> None:
    """Writes a byte into `folder`, or where it is to be made, under no name; after hours of training is too late."""
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    with explained_writing(place), tempfile.TemporaryFile(dir=place) as file:
        file.write(b"0")


def _check_same(saved: TrainConfig, given: TrainConfig, where: Path) -> None:
    for item in fields(TrainConfig):
        old, new = getattr(saved, item.name), getattr(given, item.name)
        if item.name not in _FREE and old != new:
            raise ValueError(
                f"train: {item.name} is {new!r}, but the run in {where} was started with {old!r}; the same value is "
                f"accepted (only {', '.join(_FREE)} may change); resume with --config {where}"
            )
