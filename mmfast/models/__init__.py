"""One file per system: which parts, how features enter, what each training stage trains."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "SYSTEMS",
    "Llava",
    "LlavaConfig",
    "LoraSpec",
    "MultimodalModel",
    "MultimodalOutput",
    "Stage",
    "get_system",
]

SYSTEMS = {"llava": "mmfast.models.llava:Llava"}
"""Name of each system and where its model class is."""

_HOMES = {
    "Llava": "llava",
    "LlavaConfig": "llava",
    "LoraSpec": "stages",
    "MultimodalModel": "base",
    "MultimodalOutput": "base",
    "Stage": "stages",
}

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel, MultimodalOutput
    from mmfast.models.llava import Llava, LlavaConfig
    from mmfast.models.stages import LoraSpec, Stage


def get_system(name: str) -> type[Any]:
    """The model class of a system.

    Raises:
        ValueError: If there is no such system.
    """
    if name not in SYSTEMS:
        raise ValueError(f"get_system: the system is {name!r}; accepted are {', '.join(sorted(SYSTEMS))}")
    module, _, attribute = SYSTEMS[name].partition(":")
    system: type[Any] = getattr(importlib.import_module(module), attribute)
    return system


def __getattr__(name: str) -> Any:
    # transformers loads only when a model is asked for.
    if name in _HOMES:
        return getattr(importlib.import_module(f"mmfast.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmfast.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
