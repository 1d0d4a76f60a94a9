"""One file per system: which parts, how features enter, what each training stage trains."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = [
    "SYSTEMS",
    "Lavin",
    "LavinConfig",
    "LlamaAdapter",
    "LlamaAdapterConfig",
    "Llava",
    "LlavaConfig",
    "LoraSpec",
    "MiniGPT4",
    "MiniGPT4Config",
    "MultimodalModel",
    "MultimodalOutput",
    "Stage",
    "VideoChatGpt",
    "VideoChatGptConfig",
    "get_system",
    "open_model",
]

SYSTEMS = {
    "llama_adapter": "mmfast.models.llama_adapter:LlamaAdapter",
    "llava": "mmfast.models.llava:Llava",
    "minigpt4": "mmfast.models.minigpt4:MiniGPT4",
    "lavin": "mmfast.models.lavin:Lavin",
    "video_chatgpt": "mmfast.models.video_chatgpt:VideoChatGpt",
}
"""Name of each system and where its model class is."""

_HOMES = {
    "Lavin": "lavin",
    "LavinConfig": "lavin",
    "LlamaAdapter": "llama_adapter",
    "LlamaAdapterConfig": "llama_adapter",
    "Llava": "llava",
    "LlavaConfig": "llava",
    "LoraSpec": "stages",
    "MiniGPT4": "minigpt4",
    "MiniGPT4Config": "minigpt4",
    "MultimodalModel": "base",
    "MultimodalOutput": "base",
    "Stage": "stages",
    "VideoChatGpt": "video_chatgpt",
    "VideoChatGptConfig": "video_chatgpt",
}

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel, MultimodalOutput
    from mmfast.models.lavin import Lavin, LavinConfig
    from mmfast.models.llama_adapter import LlamaAdapter, LlamaAdapterConfig
    from mmfast.models.llava import Llava, LlavaConfig
    from mmfast.models.minigpt4 import MiniGPT4, MiniGPT4Config
    from mmfast.models.stages import LoraSpec, Stage
    from mmfast.models.video_chatgpt import VideoChatGpt, VideoChatGptConfig


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


def open_model(
    folder: str | Path, llm: str | Path | None = None, encoder: str | Path | None = None, dtype: Any = None
) -> MultimodalModel:
    """Opens a trained model of whatever system, as that system's `from_pretrained` does.

    Args:
        folder: A run folder, a folder of `save_trained`, or one that a system knows, such as transformers' LLaVA.
        llm: The language model to use in place of the one written down, should it have moved.
        encoder: The encoder to use in place of the one written down.
        dtype: Dtype of the pretrained parts; by default the one they were saved or trained in.

    Raises:
        FileNotFoundError: If the folder holds no model, or a pretrained part is not where it was.
        ValueError: If it is of a system that this release does not have, or parts do not fit.
    """
    from mmfast.models.trained import find_trained, read_description

    trained = find_trained(Path(folder).expanduser())
    # Folders of other libraries hold a LLaVA, the only system that these have.
    system = "llava" if trained is None else read_description(trained)["system"]
    model: MultimodalModel = get_system(system).from_pretrained(folder, llm=llm, encoder=encoder, dtype=dtype)
    return model


def __getattr__(name: str) -> Any:
    # transformers loads only when a model is asked for.
    if name in _HOMES:
        return getattr(importlib.import_module(f"mmfast.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmfast.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
