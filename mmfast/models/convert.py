"""The original LLaVA repository's projector becomes a model that `Llava.from_pretrained` opens, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mmfast.connectors import build_connector
from mmfast.encoders import ClipEncoder
from mmfast.models.llava import Llava, LlavaConfig
from mmfast.models.llava_original import connector_kind, read_projector, write_projector
from mmfast.models.parts import absolute_name, open_processor, resolve_language_model, text_config_of
from mmfast.models.trained import check_projector_widths, find_trained

__all__ = ["convert", "to_original"]


def convert(
    source: str,
    out: str,
    llm: str,
    encoder: str,
    template: str = "plain",
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> dict[str, str]:
    """Turns the original LLaVA repository's `mm_projector.bin` into a folder that mmfast opens.

    The sizes of the three parts are compared first, from configurations alone; the language model's and the
    encoder's weights are not read at all. The projector becomes float32, which holds float16 and bfloat16
    exactly.

    Args:
        source: The file mm_projector.bin, or the folder that holds it. LoRA adapters beside it are not converted.
        out: Folder to write.
        llm: Folder of the language model that the projector was trained with, or world.
        encoder: Folder of the CLIP model that the projector was trained with, or world.
        template: Conversation template to chat with. A projector alone is the result of the first stage: plain.
        vision_feature_layer: Hidden states of the encoder that are its features (mm_vision_select_layer).
        vision_feature_select_strategy: default drops the class token (patch), full keeps it (cls_patch).
        dtype: Dtype in which the language model and the encoder are opened.
        overwrite: Whether a model that is already in the folder may be replaced.

    Returns:
        The name in the original file of each key of the connector.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        FileExistsError: If the folder holds a model already.
        ValueError: If the file is not a projector, or its sizes are not those of the two models.
    """
    if find_trained(Path(out)) is not None and not overwrite:
        raise FileExistsError(f"convert: {out} holds a model already; choose another folder or set overwrite")
    state, names = read_projector(Path(source).expanduser())
    kind = connector_kind(state)
    llm_folder, encoder_folder = resolve_language_model(llm), ClipEncoder.resolve(encoder)
    text = text_config_of(llm_folder)
    vision = AutoConfig.from_pretrained(encoder_folder)
    vision = getattr(vision, "vision_config", vision)
    shapes = {f"connector.{key}": tuple(tensor.shape) for key, tensor in state.items()}
    check_projector_widths("convert", shapes, vision.hidden_size, text.hidden_size)
    connector = build_connector(kind, vision.hidden_size, text.hidden_size)
    connector.load_state_dict(state)
    base_dtype: torch.dtype = getattr(torch, dtype)
    # The frozen parts only say what they are; the meta device gives them no memory.
    with torch.device("meta"):
        tower = ClipEncoder.from_config(vision, vision_feature_layer, vision_feature_select_strategy)
        language_model = AutoModelForCausalLM.from_config(text, dtype=base_dtype)
    processor = open_processor(llm_folder, encoder_folder, template, tower.num_patches)
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        connector=kind,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        image_token_id=processor.image_token_id,
        template=template,
    )
    model = Llava(config, tower, connector, language_model, processor)
    model.base_names = {"llm": absolute_name(llm), "encoder": absolute_name(encoder)}
    model.save_trained(out)
    _report(kind, state, names, out)
    return names


def to_original(model: Llava, path: str | Path) -> dict[str, str]:
    """Writes a model's connector as the original repository's `mm_projector.bin`.

    Only the connector is written, in its own dtype. `export(run, out, to="original")` writes a whole model.

    Args:
        model: The model.
        path: The file to write; a file already there is replaced.

    Returns:
        The name in the file of each key of the connector.

    Raises:
        ValueError: If the connector has no weights.
    """
    return write_projector(model, Path(path).expanduser())


def _report(kind: str, state: dict[str, torch.Tensor], names: dict[str, str], out: str) -> None:
    width = max(len(name) for name in names.values())
    print(f"{kind}: {len(names)} tensors")
    for key, name in names.items():
        print(f"  {name:<{width}} -> connector.{key} {list(state[key].shape)}")
    print(f"written to {out}")
