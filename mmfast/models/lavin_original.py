"""LaVIN in the layout of the original repository: the adapters alone, in `checkpoint-<epoch>.pth`.

Source of the names: https://github.com/luogen1996/LaVIN lavin/mm_adapter.py, lavin/model.py, util/misc.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.files import load_pickled, replace_atomically
from mmfast.nn import MixtureAdapter

if TYPE_CHECKING:
    from mmfast.models.lavin import Lavin

__all__ = ["original_state", "read_original", "write_original"]

_FILE = "checkpoint-0.pth"
_MODALITY = "adapter_modality_embedding.weight"
# Our lists of adapters, with the prefix of one of theirs and how it is recognised.
_ADAPTERS = {
    "adapters": "layers.{}.adapter_attn.",
    "vision_adapters": "backbone.visual.transformer.resblocks.{}.adapter_attn.",
}
_CONNECTOR = {
    f"connector.{index}.{part}": f"adapter_proj.conv_{name}.{part}"
    for index, name in ((0, "A"), (2, "B"))
    for part in ("weight", "bias")
}
# Which of an adapter's tensors are in which of ours; the two experts are stacked there.
_TENSORS = {
    "down_weight": "conv_A.weight",
    "down_bias": "conv_A.bias",
    "up_weight": "conv_B.weight, conv_D.weight",
    "up_bias": "conv_B.bias, conv_D.bias",
    "router_weight": "expert_weights.weight",
    "router_bias": "expert_weights.bias",
}
# The published temperature: 10, but 5 for language models of this width (scripts/finetuning_sqa_13b.sh).
_WIDTH_13B = 5120
_SHOWN = 8


def read_original(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Reads the adapters' tensors; of the file's other content its arguments are read, and nothing is executed.

    Args:
        path: The file, or a folder with one `checkpoint-<epoch>.pth`.

    Returns:
        The trained state of `Lavin` in float32; the names in the file of each of its tensors; and the settings that the
        file tells: temperature, bottleneck_size and connector_size.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If tensors are missing or unexpected, or a shape does not follow from the others.
    """
    path = _find(path)
    tensors, arguments = _load(path)
    groups = _grouped(tensors, path)
    scale = float(arguments.get("adapter_scale", 1.0))
    if scale != 1:
        raise ValueError(f"read_original: {path} was trained with adapter_scale {scale}; 1 is accepted")
    state: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for ours, template in _ADAPTERS.items():
        for index, tensors in enumerate(groups[ours]):
            adapter = _adapter(tensors, f"{path}: {template.format(index)}")
            state |= {f"{ours}.{index}.{key}": value for key, value in adapter.state_dict().items()}
            names |= {f"{ours}.{index}.{key}": template.format(index) + value for key, value in _TENSORS.items()}
    singles = {**_CONNECTOR, "modality.weight": _MODALITY}
    state |= {ours: groups["rest"][theirs] for ours, theirs in singles.items()}
    bottleneck, width = state["adapters.0.down_weight"].shape
    settings = {
        "temperature": float(arguments.get("temperature", 5.0 if width == _WIDTH_13B else 10.0)),
        "bottleneck_size": bottleneck,
        "connector_size": len(state["connector.0.weight"]),
    }
    return {key: value.float() for key, value in state.items()}, names | singles, settings


def write_original(model: Lavin, folder: Path) -> dict[str, str]:
    """Writes the adapters as `checkpoint-0.pth`, in their own dtype, with the arguments that build them again.

    Raises:
        ValueError: If other parts were trained too, or class tokens of other blocks than the published ones.
    """
    from mmfast.models.lavin import equidistant

    published = equidistant(model.config.vision_config.num_hidden_layers)
    others = sorted(model.trained_parts & {"language_model", "lora"})
    if others or model.config.vision_blocks != published:
        found = f"also trained {', '.join(others)}" if others else f"takes blocks {model.config.vision_blocks}"
        raise ValueError(
            f"to_original: the model {found}; the published layout holds adapters, connector and modality token alone, "
            f"for class tokens of the blocks {published}"
        )
    tensors, names = original_state(model)
    arguments = argparse.Namespace(
        adapter_type="attn",
        visual_adapter_type="router",
        adapter_dim=model.config.bottleneck_size,
        adapter_scale=1.0,
        hidden_proj=model.config.connector_size,
        n_prompt=len(model.config.vision_blocks),
        temperature=model.config.temperature,
    )
    state = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = {"model": state, "epoch": 0, "args": arguments}
    replace_atomically(folder / _FILE, lambda file: torch.save(content, file))
    return names


def original_state(model: Lavin) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The published tensors of a model's adapters, and their names by the name here."""
    state = model.trained_state()
    names = {**_CONNECTOR, "modality.weight": _MODALITY}
    tensors = {theirs: state[ours] for ours, theirs in names.items()}
    for ours, template in _ADAPTERS.items():
        for index, adapter in enumerate(getattr(model, ours)):
            prefix = template.format(index)
            tensors |= {prefix + key: value for key, value in adapter.to_lavin().items()}
            names |= {f"{ours}.{index}.{key}": prefix + value for key, value in _TENSORS.items()}
    return tensors, names


def _find(path: Path) -> Path:
    found = sorted(path.glob("checkpoint-*.pth")) if path.is_dir() else [path]
    if len(found) != 1 or not found[0].is_file():
        what = f"a folder with {len(found)} files" if path.is_dir() else "not there"
        raise FileNotFoundError(
            f"read_original: {path} is {what}; a checkpoint-<epoch>.pth, or a folder with one, is accepted"
        )
    return found[0]


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under the names without "module.", and the arguments of the training."""
    # Its arguments are a Namespace, which holds values and runs nothing.
    content = load_pickled(path, "read_original", "tensors and plain values", [argparse.Namespace])
    tensors = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"read_original: {path} does not hold tensors by name under 'model'; LaVIN's file is accepted")
    arguments = content.get("args")
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}, (
        vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    )


def _grouped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The tensors of each adapter by their names in it, in lists by layer, and the rest; strict."""
    groups: dict[str, Any] = {"rest": dict(tensors)}
    for ours, template in _ADAPTERS.items():
        pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)") + "(.+)")
        found: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            if match := pattern.fullmatch(name):
                found.setdefault(int(match[1]), {})[match[2]] = groups["rest"].pop(name)
        if sorted(found) != list(range(len(found))) or not found:
            raise ValueError(
                f"read_original: {path} has adapters for {len(found)} layers as {template.format('<i>')}*: "
                f"{sorted(found)[:_SHOWN]}; one for every layer from 0 on is accepted; is it a checkpoint of LaVIN?"
            )
        groups[ours] = [found[index] for index in range(len(found))]
    expected = {*_CONNECTOR.values(), _MODALITY}
    missing, unexpected = sorted(expected - groups["rest"].keys()), sorted(groups["rest"].keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"read_original: {path} lacks {missing} and has {unexpected[:_SHOWN]} that LaVIN does not have; exactly "
            "the adapters of all layers, adapter_proj and adapter_modality_embedding are accepted"
        )
    return groups


def _adapter(tensors: Mapping[str, Tensor], where: str) -> MixtureAdapter:
    try:
        return MixtureAdapter.from_lavin(tensors)
    except ValueError as error:
        raise ValueError(f"read_original: {where}: {error}") from error
