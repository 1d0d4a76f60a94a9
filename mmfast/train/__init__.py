"""Training: a configuration in, a run folder out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "StageConfig",
    "StageResult",
    "TrainConfig",
    "TrainResult",
    "TrainingInterrupted",
    "load_config",
    "load_recipe",
    "recipe_names",
    "save_config",
    "train",
]

_HOMES = {
    "StageConfig": "config",
    "StageResult": "run",
    "TrainConfig": "config",
    "TrainResult": "loop",
    "TrainingInterrupted": "signals",
    "load_config": "config",
    "load_recipe": "config",
    "recipe_names": "config",
    "save_config": "config",
    "train": "loop",
}

if TYPE_CHECKING:
    from mmfast.train.config import (
        StageConfig,
        TrainConfig,
        load_config,
        load_recipe,
        recipe_names,
        save_config,
    )
    from mmfast.train.loop import TrainResult, train
    from mmfast.train.run import StageResult
    from mmfast.train.signals import TrainingInterrupted


def __getattr__(name: str) -> Any:
    # Recipes and configurations can be read without loading torch's data and training machinery.
    if name in _HOMES:
        return getattr(importlib.import_module(f"mmfast.train.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmfast.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
