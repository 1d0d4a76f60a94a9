"""LLaVA in the layout of transformers' `LlavaForConditionalGeneration`, or `LlavaNext…` of high resolution, both ways.

Both ways lead through those classes themselves, so the names of the weights are right for the release at hand.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)

from mmfast.adapt import merged_state_dict
from mmfast.data import Anyres
from mmfast.data.anyres_processor import as_image_processor
from mmfast.encoders import ClipEncoder
from mmfast.models.trained import read_shapes

if TYPE_CHECKING:
    from mmfast.models.llava import Llava

__all__ = ["LlavaParts", "is_llava_folder", "read_llava", "write_llava"]

_SIZES = {4096: "7B", 5120: "13B"}
_CLASSES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}


@dataclass(frozen=True)
class LlavaParts:
    """What a folder in transformers' layout holds."""

    encoder: ClipEncoder
    connector: nn.Sequential
    language_model: PreTrainedModel
    image_token_id: int
    image_grid_pinpoints: list[list[int]] | None
    """Of high resolution; None for LLaVA and LLaVA-1.5. Likewise the newline."""
    image_newline: Tensor | None


def is_llava_folder(folder: Path) -> bool:
    """Whether `folder` has a `config.json` with the model type "llava" or "llava_next"."""
    return _model_type(folder) in _CLASSES


def _model_type(folder: Path) -> str | None:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None


def read_llava(folder: Path, dtype: torch.dtype | None = None) -> LlavaParts:
    """Opens a folder in transformers' layout and takes the model apart; nothing is copied but the connector.

    Args:
        folder: The folder, with weights as safetensors.
        dtype: Dtype of the encoder and the language model; by default the saved one. The connector and the
            newline are float32.

    Raises:
        ValueError: If the weights are of another size than `config.json` says (found before any is loaded), some
            are missing, or the projector is not two linear layers with a GELU between.
    """
    config_class, model_class = _CLASSES[str(_model_type(folder))]
    config: Any = config_class.from_pretrained(folder)
    _check_config(folder, config)
    _check_sizes(folder, config, read_shapes(folder))
    opened: Any = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    model, report = opened
    if report["missing_keys"]:
        raise ValueError(
            f"from_pretrained: {folder} lacks the weights {sorted(report['missing_keys'])[:8]}; a whole model is "
            "accepted; was the download complete?"
        )
    projector = model.model.multi_modal_projector
    connector = nn.Sequential(projector.linear_1, nn.GELU(), projector.linear_2).float()
    encoder = ClipEncoder(model.model.vision_tower, config.vision_feature_layer, config.vision_feature_select_strategy)
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    newline = None if pinpoints is None else model.model.image_newline.detach().float()
    return LlavaParts(encoder, connector, _take_language_model(model), config.image_token_id, pinpoints, newline)


def write_llava(model: Llava, folder: Path, **kwargs: Any) -> None:
    """Writes transformers' layout; `model` is left as it is.

    Args:
        model: The model; its LoRA is merged in the written copy. Everything is written in the dtype of the
            language model.
        folder: The folder to write.
        **kwargs: Passed to transformers' `save_pretrained`.

    Raises:
        ValueError: If the connector is not "mlp2x_gelu", or the rules of high resolution are not LLaVA-NeXT's.
    """
    anyres = model.anyres
    if anyres is not None and (anyres.merge, anyres.rounding) != ("spatial_unpad", "transformers"):
        raise ValueError(
            f"save_pretrained: patch_merge is {anyres.merge!r} and unpad_rounding {anyres.rounding!r}, but "
            "transformers' LLaVA-NeXT has only 'spatial_unpad' and 'transformers'; use save_trained(folder), which "
            "Llava.from_pretrained opens; where images of the rare sizes on which the roundings differ do not matter, "
            "say so in its mmfast.json"
        )
    if model.config.connector != "mlp2x_gelu":
        raise ValueError(
            f"save_pretrained: the connector is {model.config.connector!r}, but transformers' LLaVA has only "
            "'mlp2x_gelu'; use save_trained(folder), which Llava.from_pretrained opens, or train that connector"
        )
    dtype = model.get_input_embeddings().weight.dtype
    target = _build_target(model, dtype)
    target.save_pretrained(folder, **kwargs)
    _write_processor(model, folder)


def _check_config(folder: Path, config: Any) -> None:
    found = {
        "vision_config.model_type": (config.vision_config.model_type, "clip_vision_model"),
        "projector_hidden_act": (config.projector_hidden_act, "gelu"),
        "multimodal_projector_bias": (config.multimodal_projector_bias, True),
    }
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if pinpoints is not None:
        found["vision_feature_select_strategy"] = (config.vision_feature_select_strategy, "default")
    for name, (value, accepted) in found.items():
        if value != accepted:
            raise ValueError(
                f"from_pretrained: {folder / 'config.json'} has {name} {value!r}; {accepted!r} is accepted; "
                "open this model with transformers"
            )
    if pinpoints is not None:
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        try:
            Anyres(pinpoints, side, side // patch)
        except ValueError as error:
            raise ValueError(f"from_pretrained: {folder / 'config.json'}: {error}") from error


def _check_sizes(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compares `config.json` with the headers of the weights, where both say something."""
    text, vision = config.text_config, config.vision_config
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    expected = {
        ("", "embed_tokens.weight"): (text.vocab_size, text.hidden_size),
        ("language_model", "layers.0.self_attn.q_proj.weight"): (heads, text.hidden_size),
        ("", "multi_modal_projector.linear_1.weight"): (text.hidden_size, vision.hidden_size),
        ("", "multi_modal_projector.linear_2.weight"): (text.hidden_size, text.hidden_size),
        ("", "patch_embedding.weight"): (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
        ("", "image_newline"): (text.hidden_size,),
    }
    for name, shape in shapes.items():
        for (part, ending), wanted in expected.items():
            if part in name and name.endswith(ending) and shape != wanted:
                raise ValueError(
                    f"from_pretrained: {folder}: {name} is {_sized(shape)} but config.json makes it "
                    f"{_sized(wanted)}; weights and configuration of one model are accepted; were the files of two "
                    "models mixed?"
                )


def _sized(shape: tuple[int, ...]) -> str:
    sizes = [_SIZES[width] for width in shape if width in _SIZES]
    return f"{list(shape)}" + (f" ({sizes[0]})" if sizes else "")


def _take_language_model(model: Any) -> PreTrainedModel:
    decoder: Any = model.model.language_model
    with torch.device("meta"):
        language_model: Any = AutoModelForCausalLM.from_config(decoder.config)
    setattr(language_model, language_model.base_model_prefix, decoder)
    language_model.set_output_embeddings(model.lm_head)
    # The decoder and the head around it answer for one configuration.
    language_model.config = decoder.config
    language_model.config.tie_word_embeddings = model.lm_head.weight is decoder.get_input_embeddings().weight
    language_model.generation_config = model.generation_config
    empty = [name for name, parameter in language_model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"from_pretrained: {type(language_model).__name__} has weights outside its decoder and its head: {empty}; "
            "a language model of the Llama kind is accepted"
        )
    return language_model


def _build_target(model: Llava, dtype: torch.dtype) -> Any:
    """transformers' model on the model's own tensors, but for those that merging or growing makes."""
    language_model = model.language_model
    prefix = language_model.base_model_prefix + "."
    state = merged_state_dict(language_model)
    decoder = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    rows = max(decoder["embed_tokens.weight"].shape[0], _needed_rows(model))
    decoder["embed_tokens.weight"] = _grow(decoder["embed_tokens.weight"], rows)
    head = decoder["embed_tokens.weight"] if tied else _grow(model.get_output_embeddings().weight.detach(), rows)
    connector = model.connector.state_dict()
    projector = {
        f"linear_{i}.{key}": connector[f"{j}.{key}"] for i, j in ((1, 0), (2, 2)) for key in ("weight", "bias")
    }
    config = _target_config(model, rows, tied)
    with torch.device("meta"):
        target: Any = _CLASSES[config.model_type][1](config)
    _assign(target.model.vision_tower, model.encoder.complete_state_dict(), dtype)
    _assign(target.model.multi_modal_projector, projector, dtype)
    _assign(target.model.language_model, decoder, dtype)
    _assign(target.lm_head, {"weight": head}, dtype)
    if model.image_newline is not None:
        target.model.image_newline = nn.Parameter(model.image_newline.detach().to(dtype))
    if tied:
        target.lm_head.weight = target.model.language_model.embed_tokens.weight
    target.generation_config = copy.deepcopy(language_model.generation_config)
    return target


def _target_config(model: Llava, rows: int, tied: bool) -> LlavaConfig | LlavaNextConfig:
    text = copy.deepcopy(model.language_model.config)
    text.vocab_size, text.tie_word_embeddings = rows, tied
    settings: dict[str, Any] = {
        "vision_config": copy.deepcopy(model.encoder.config),
        "text_config": text,
        "image_token_index": model.config.image_token_id,
        "image_seq_length": model.encoder.num_patches,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": model.encoder.layer,
        "vision_feature_select_strategy": _strategy(model.encoder),
        "tie_word_embeddings": tied,
    }
    if model.anyres is None:
        return LlavaConfig(**settings)
    return LlavaNextConfig(**settings, image_grid_pinpoints=[list(canvas) for canvas in model.anyres.pinpoints])


def _needed_rows(model: Llava) -> int:
    """transformers looks every id up before it puts the features there, so each needs an embedding."""
    tokens = 0 if model.processor is None else len(model.processor.tokenizer)
    return max(tokens, model.config.image_token_id + 1)


def _grow(weight: Tensor, rows: int) -> Tensor:
    """Appends rows [rows - V, C] that are the mean of the others."""
    missing = rows - weight.shape[0]
    if missing <= 0:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def _assign(module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    module.load_state_dict({name: tensor.detach().to(dtype) for name, tensor in state.items()}, assign=True)


def _strategy(encoder: ClipEncoder) -> Literal["default", "full"]:
    return "full" if encoder.select in ("full", "cls_patch") else "default"


def _write_processor(model: Llava, folder: Path) -> None:
    if model.processor is None:
        return
    model.processor.save_pretrained(folder)
    processor_class: Any = LlavaProcessor
    image_processor = model.processor.image_processor
    if model.anyres is not None:
        pinpoints = [list(canvas) for canvas in model.anyres.pinpoints]
        image_processor = as_image_processor("LlavaNextImageProcessor", image_processor, image_grid_pinpoints=pinpoints)
        # Over the encoder's own, for readers of this file alone.
        image_processor.save_pretrained(folder)
        processor_class = LlavaNextProcessor
    processor_class(
        image_processor=image_processor,
        tokenizer=model.processor.tokenizer,
        patch_size=model.encoder.config.patch_size,
        vision_feature_select_strategy=_strategy(model.encoder),
        image_token=model.processor.image_token,
        # The class token, which the strategy "default" takes off again.
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
