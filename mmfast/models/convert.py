"""Published checkpoints become folders that `open_model` opens; LLaVA's projector is read and written here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from mmfast.models import get_system
from mmfast.models.llava import Llava
from mmfast.models.llava_original import write_projector
from mmfast.models.trained import find_trained

__all__ = ["convert", "to_original"]


def convert(
    source: str,
    out: str,
    llm: str,
    encoder: str,
    system: str = "llava",
    template: str | None = None,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: Literal["default", "full"] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    q_former: str | None = None,
    gate_activation: Literal["tanh", "identity"] | None = None,
    prompt_length: int | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Turns a checkpoint in the layout that a system's authors published into a folder that mmfast opens.

    The sizes of the parts are compared first, from configurations alone; the language model's and the encoder's
    weights are not read at all. What was trained becomes float32, which holds float16 and bfloat16 exactly.

    Args:
        source: The checkpoint's file, or the folder that holds it: for llava mm_projector.bin (LoRA adapters beside
            it are not converted).
        out: Folder to write.
        llm: Folder of the language model that it was trained with, or world.
        encoder: Folder of the encoder that it was trained with, or world.
        system: Which system's checkpoint it is.
        template: Conversation template to chat with. None: the system's own; for llava plain, for a projector alone
            is the result of its first stage.
        vision_feature_layer: For llava: hidden states of the encoder that are its features (mm_vision_select_layer);
            None: -2.
        vision_feature_select_strategy: For llava: default drops the class token (patch), full keeps it (cls_patch);
            None: default.
        dtype: Dtype in which the language model and the encoder are opened.
        q_former: For minigpt4: the pretrained Q-Former that it was trained on, a file in LAVIS's layout or a folder of
            transformers' BLIP-2.
        gate_activation: For llama_adapter: what gates pass through. None: what the authors' inference code does; a file
            of version 1 that was trained with their code wants tanh.
        prompt_length: For llama_adapter: prompts of each layer, which version 1's file does not say; None: 10.
        overwrite: Whether a model that is already in the folder may be replaced.

    Returns:
        The name in the checkpoint of each tensor.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        FileExistsError: If the folder holds a model already.
        ValueError: If there is no such system, it has no such option, the file is not its checkpoint, or sizes are
            not those of the models.
    """
    model_class = get_system(system)
    if find_trained(Path(out)) is not None and not overwrite:
        raise FileExistsError(f"convert: {out} holds a model already; choose another folder or set overwrite")
    given = {
        "vision_feature_layer": vision_feature_layer,
        "vision_feature_select_strategy": vision_feature_select_strategy,
        "q_former": q_former,
        "gate_activation": gate_activation,
        "prompt_length": prompt_length,
    }
    options = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in options if name not in model_class.original_options]
    if unknown:
        raise ValueError(
            f"convert: {', '.join(unknown)} is set, but the system {system} has "
            f"{' and '.join(model_class.original_options) or 'no such option'}; leave it out"
        )
    model, names = model_class.from_original(source, llm, encoder, template=template, dtype=dtype, **options)
    model.save_trained(out)
    _report(model.config.connector if isinstance(model, Llava) else system, model.trained_state(), names, out)
    return names


def to_original(model: Llava, path: str | Path) -> dict[str, str]:
    """Writes a model's connector as the original repository's `mm_projector.bin`.

    Only the connector is written, in its own dtype. `export(run, out, to="original")` writes a whole model.

    Args:
        model: The model.
        path: The file to write; a file already there is replaced.

    Returns:
        The name in the file of each tensor of the connector.

    Raises:
        ValueError: If the connector has no weights.
    """
    return write_projector(model, Path(path).expanduser())


def _report(what: str, state: dict[str, Tensor], names: dict[str, str], out: str) -> None:
    width = max(len(name) for name in names.values())
    print(f"{what}: {len(names)} tensors")
    for key, name in names.items():
        print(f"  {name:<{width}} -> {key} {list(state[key].shape)}")
    print(f"written to {out}")
