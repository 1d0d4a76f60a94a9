"""mmfast: fast, memory-efficient adapters that join open language models to vision, video and audio encoders."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "adapt", "data", "evaluate", "generate", "models", "nn", "ops", "optimize", "train", "world"]

if TYPE_CHECKING:
    from mmfast import adapt, data, evaluate, generate, models, nn, ops, train, world
    from mmfast.adapt import optimize


def __getattr__(name: str) -> Any:
    # Submodules load when first used, so that `import mmfast` costs nothing.
    if name == "optimize":
        return importlib.import_module("mmfast.adapt").optimize
    if name in __all__:
        return importlib.import_module(f"mmfast.{name}")
    raise AttributeError(f"module 'mmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
