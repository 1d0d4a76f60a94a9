"""LLaVA in the layout of the original repository: `mm_projector.bin`, and a whole `llava_llama` folder.

Source of the names: https://github.com/haotian-liu/LLaVA `llava/train/train.py`, `llava/model/llava_arch.py`
(Apache-2.0).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.adapt import merged_state_dict
from mmfast.files import read_tensors
from mmfast.models.parts import resolve_language_model

if TYPE_CHECKING:
    from mmfast.models.llava import Llava

__all__ = ["PROJECTOR_FILE", "connector_kind", "read_newline", "read_projector", "write_original", "write_projector"]

PROJECTOR_FILE = "mm_projector.bin"
_PREFIX = "model.mm_projector."
_NEWLINE = "model.image_newline"
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)


def read_projector(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the projector's tensors; nothing in the file is ever executed.

    Args:
        path: A file written by `torch.save` or as safetensors, or a folder with `mm_projector.bin`.

    Returns:
        The connector's state dict in float32, and the name in the file of each of its keys.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds more or other than a projector's tensors.
    """
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"read_projector: {path} does not exist; a mm_projector.bin, or the folder with one, is accepted"
        )
    content = read_tensors(path, "read_projector")
    embeddings = [name for name in content if name.endswith("embed_tokens.weight")]
    if embeddings:
        raise ValueError(
            f"read_projector: {path} holds {', '.join(embeddings)}: it was trained with start and end tokens "
            "around the image (mm_use_im_start_end), which Llava does not have; a projector trained without "
            "them is accepted"
        )
    names: dict[str, str] = {}
    for name in content:
        match = re.fullmatch(r"(?:.*\.)?mm_projector\.(.+)", name)
        if match is None or match[1] in names:
            raise ValueError(
                f"read_projector: {path} holds {name!r}, which is not one tensor of a projector; names that end "
                "in mm_projector.weight or mm_projector.<index>.weight, and likewise bias, are accepted"
            )
        names[match[1]] = name
    return {key: content[name].float() for key, name in names.items()}, names


def read_newline(folder: Path) -> Tensor:
    """The newline [C] of high resolution in a whole `llava_llama` folder; `mm_projector.bin` does not hold it.

    Raises:
        ValueError: If it is in none of the folder's safetensors files.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if _NEWLINE in file.keys():  # noqa: SIM118
                return file.get_tensor(_NEWLINE)
    raise ValueError(f"read_newline: {folder} has no {_NEWLINE}; the folder of a model of high resolution is accepted")


def connector_kind(state: Mapping[str, Tensor]) -> str:
    """The kind of connector that a state dict belongs to, see `mmfast.connectors.build_connector`.

    Raises:
        ValueError: If the keys are those of no kind, or the shapes do not follow from each other.
    """
    if state.keys() == {"weight", "bias"}:
        layers = [""]
    else:
        layers = [f"{2 * index}." for index in range(len(state) // 2)]
    expected = {f"{layer}{part}" for layer in layers for part in ("weight", "bias")}
    shapes = {key: list(tensor.shape) for key, tensor in sorted(state.items())}
    if not state or state.keys() != expected:
        raise ValueError(
            f"connector_kind: the projector has the keys {sorted(state)}; weight and bias (linear), or those of "
            "the layers 0, 2, … (mlp<depth>x_gelu) are accepted; was the file cut?"
        )
    width = next(iter(state[f"{layers[0]}bias"].shape), 0)
    for index, layer in enumerate(layers):
        weight, bias = shapes[f"{layer}weight"], shapes[f"{layer}bias"]
        fits = len(weight) == 2 and weight[0] == width and (index == 0 or weight[1] == width)
        if not fits or bias != [width]:
            raise ValueError(
                f"connector_kind: the projector has the shapes {shapes}; [C, D] for the first weight, [C, C] for "
                "the next and [C] for each bias are accepted"
            )
    return "linear" if layers == [""] else f"mlp{len(layers)}x_gelu"


def write_projector(model: Llava, path: Path) -> dict[str, str]:
    """Writes the connector as the original's `mm_projector.bin`, in its own dtype, whole or not at all.

    Returns:
        The name in the file of each tensor of the connector.

    Raises:
        ValueError: If the connector has no parameters, and so nothing to write.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.connector.state_dict().items()}
    if not state:
        raise ValueError(
            f"to_original: the connector is {model.config.connector!r}, which has no weights; "
            "'linear' and 'mlp<depth>x_gelu' are accepted"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    temporary = Path(name)
    try:
        torch.save({_PREFIX + key: tensor for key, tensor in state.items()}, temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return {f"connector.{key}": _PREFIX + key for key in state}


def write_original(model: Llava, folder: Path) -> None:
    """Writes a folder for the original repository: the whole language model, the projector, the tokenizer.

    LoRA is merged in the written copy. The encoder is not part of this layout; `config.json` names it. The
    projector is also written alone, as `mm_projector.bin`.

    Args:
        model: The model, left as it is.
        folder: An empty folder.

    Raises:
        ValueError: If the language model is not a Llama, the only one of `llava_llama`, or high resolution rounds
            otherwise than the original.
    """
    from huggingface_hub import save_torch_state_dict

    config = model.language_model.config
    if config.model_type != "llama":
        raise ValueError(
            f"export: the language model is a {config.model_type!r}, but the original layout llava_llama holds a "
            "'llama'; use to='hf', which takes any"
        )
    if model.anyres is not None and model.anyres.rounding != "original":
        raise ValueError(
            f"export: unpad_rounding is {model.anyres.rounding!r}, but the original layout has 'original' only; where "
            "images of the rare sizes on which they differ do not matter, say so in the run's mmfast.json"
        )
    write_projector(model, folder / PROJECTOR_FILE)
    dtype = model.get_input_embeddings().weight.dtype
    state = merged_state_dict(model.language_model)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    state |= {_PREFIX + key: tensor.detach().to(dtype) for key, tensor in model.connector.state_dict().items()}
    if model.image_newline is not None:
        state[_NEWLINE] = model.image_newline.detach().to(dtype)
    save_torch_state_dict(state, folder)
    text = json.dumps(_original_config(model, dtype), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    # Without <image>, which our processor adds to the tokenizer and the original handles outside of it.
    tokenizer = resolve_language_model(model.base_names["llm"])
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def _original_config(model: Llava, dtype: torch.dtype) -> dict[str, Any]:
    text = model.language_model.config
    config: dict[str, Any] = text.to_dict()
    rope = config.pop("rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    processor: Any = model.processor
    return {
        **config,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        # Names of the release of transformers that the original is pinned to.
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling": {**rope, "type": rope["rope_type"]} if scaled else None,
        "mm_vision_tower": model.base_names["encoder"],
        "mm_hidden_size": model.encoder.hidden_size,
        "mm_projector_type": model.config.connector,
        "mm_vision_select_layer": model.encoder.layer,
        "mm_vision_select_feature": "patch" if model.encoder.select in ("patch", "default") else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad" if processor.pad_to_square else "square",
        **_original_tiling(model),
        "tokenizer_model_max_length": processor.max_length,
        "tokenizer_padding_side": "right",
    }


def _original_tiling(model: Llava) -> dict[str, Any]:
    """What the original's `config.json` says of high resolution; its canvases are (width, height)."""
    if model.anyres is None:
        return {}
    canvases = [[width, height] for height, width in model.anyres.pinpoints]
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": canvases,
        "mm_patch_merge_type": model.anyres.merge,
    }
