"""Configurations of the backbones that published recipes name, to count and to plan without their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig

from mmfast.models.parts import resolve_language_model, text_config_of

__all__ = ["LANGUAGE_MODELS", "VISION_MODELS", "text_config_named", "vision_config_named"]

_LLAMA_7B: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA_13B: dict[str, Any] = {
    **_LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_V1_5 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_CLIP_LARGE: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "Vision-CAIR/vicuna-7b": _LLAMA_7B,
    "huggyllama/llama-7b": _LLAMA_7B,
    "huggyllama/llama-13b": _LLAMA_13B,
    "lmsys/vicuna-7b-v1.3": _LLAMA_7B,
    "lmsys/vicuna-13b-v1.3": _LLAMA_13B,
    "lmsys/vicuna-7b-v1.5": {**_LLAMA_7B, **_V1_5},
    "lmsys/vicuna-13b-v1.5": {**_LLAMA_13B, **_V1_5},
    "meta-llama/Llama-2-7b-chat-hf": {**_LLAMA_7B, **_V1_5},
    # LLaVA-Lightning-7B-v1-1, the base of Video-ChatGPT: three words of LLaVA's first release.
    "mmaaz60/LLaVA-7B-Lightening-v1-1": {**_LLAMA_7B, "vocab_size": 32003},
}
"""Arguments of `LlamaConfig` (whose defaults are the 7B's sizes) by the name of the repository on the Hub."""

VISION_MODELS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "Salesforce/blip2-flan-t5-xxl": {"model_type": "blip_2_vision_model"},
}
"""Configurations of vision towers by the name of the repository on the Hub."""


def text_config_named(name: str | Path) -> Any:
    """The configuration of a language model: of a local folder, "world", or one of `LANGUAGE_MODELS`.

    Raises:
        FileNotFoundError: If it is none of these.
    """
    if _is_folder(name):
        return text_config_of(resolve_language_model(name))
    if str(name) not in LANGUAGE_MODELS:
        raise FileNotFoundError(_unknown("language model", name, LANGUAGE_MODELS))
    return LlamaConfig(**LANGUAGE_MODELS[str(name)])


def vision_config_named(name: str | Path) -> Any:
    """The configuration of a vision encoder: of a local folder, "world", or one of `VISION_MODELS`.

    Raises:
        FileNotFoundError: If it is none of these.
    """
    if _is_folder(name):
        from mmfast.encoders import ClipEncoder

        config: Any = AutoConfig.from_pretrained(ClipEncoder.resolve(name))
        return getattr(config, "vision_config", config)
    if str(name) not in VISION_MODELS:
        raise FileNotFoundError(_unknown("encoder", name, VISION_MODELS))
    return AutoConfig.for_model(**VISION_MODELS[str(name)])


def _is_folder(name: str | Path) -> bool:
    return name == "world" or Path(name).expanduser().is_dir()


def _unknown(part: str, name: str | Path, known: dict[str, Any]) -> str:
    return (
        f'{part}: {str(name)!r} is neither a folder nor known; a local folder, "world" or one of {", ".join(known)} is '
        "accepted; nothing is downloaded, so fetch the model first"
    )
