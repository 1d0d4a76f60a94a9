"""The one folder that holds everything that trained, in PEFT's format where PEFT has words for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfast.adapt import own_format, peft_format
from mmfast.adapt.contents import collect, put
from mmfast.adapt.layers import has_adapters
from mmfast.files import replace_atomically, write_json

__all__ = ["AdapterReport", "load_adapter", "save_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


class AdapterReport(NamedTuple):
    """What was saved from a model, or loaded into it.

    Attributes:
        peft_type: "LORA", which stock PEFT loads, or "MMFAST", which only this package does.
        why_not_peft: For "MMFAST": what PEFT has no words for.
        tensors: Key in the file to the name of the parameter or buffer in the model.
        base_model: Name or path of the model that it belongs to, if known.
        revision: Revision of that model, if known.
    """

    peft_type: str
    why_not_peft: tuple[str, ...]
    tensors: dict[str, str]
    base_model: str | None
    revision: str | None


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model: str | None = None, revision: str | None = None
) -> AdapterReport:
    """Writes `adapter_config.json` and `adapter_model.safetensors`: the adapters, and all else that trained.

    That is every parameter that requires a gradient, with the buffers of its module; frozen weights are not written.
    Whole modules that trained (norms, a projector, a head) are PEFT's `modules_to_save`, biases its `bias`; stock PEFT
    loads the folder with equal logits. What PEFT has no words for (bias-scale adapters, a part of a module, the base
    weight under a LoRA) makes it a folder of `peft_type` "MMFAST", which stock PEFT refuses by that name.

    Args:
        model: Any module; its parameters are named relative to it.
        folder: Made if it does not exist. An adapter in it is replaced, each file at once; the config comes last.
        base_model: Name or path of the base model. Default: what the model says of itself (`name_or_path`).
        revision: Of the base model. Default: the commit it was downloaded at.

    Raises:
        ValueError: If there is nothing to save, a layer is merged, or a tensor is on the meta device.
    """
    contents = collect(model)
    reasons = tuple(peft_format.why_not_peft(model, contents))
    described = own_format.to_own(contents, reasons) if reasons else peft_format.to_peft(model, contents)
    own_name = getattr(model, "name_or_path", None) or None
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    config = {
        **described,
        "base_model_name_or_path": base_model or own_name,
        "revision": revision or (commit if base_model is None else None),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Clones, because a file of safetensors holds no shared memory: tied weights are in it once for each name.
    state = {contents.keys[name]: tensor.clone().contiguous() for name, tensor in contents.tensors.items()}
    replace_atomically(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)
    return _report(config, reasons, contents.keys)


def load_adapter(model: nn.Module, folder: str | Path) -> AdapterReport:
    """Puts what `save_adapter`, or PEFT's `save_pretrained`, wrote into a base model.

    Afterwards exactly the loaded parameters require a gradient; the model's mode (`train`, `eval`) stays. LoRA layers
    are float32, other tensors keep the dtype of the model.

    Args:
        model: The base model, in the classes that the adapter was trained in, without adapters. It may be quantised.
        folder: Holds `adapter_config.json` and `adapter_model.safetensors` (or, from an older PEFT,
            `adapter_model.bin`, of which nothing but tensors is unpickled).

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        ValueError: If the model has adapters already; the adapter uses something that is not supported, which is
            named; or tensors are missing, unexpected or of another shape: all are listed. Nothing is changed then.
    """
    if has_adapters(model):
        raise ValueError(
            "load_adapter: the model has adapters already; a model without is accepted; remove(model) or merge(model) "
            "comes first"
        )
    folder = Path(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    stored = _read(folder)
    kind = config.get("peft_type")
    if kind == own_format.PEFT_TYPE:
        contents = own_format.from_own(config, stored)
    elif kind == peft_format.PEFT_TYPE:
        contents = peft_format.from_peft(config, stored, model)
    else:
        raise ValueError(
            f"load_adapter: {folder / CONFIG} has peft_type {kind!r}; {peft_format.PEFT_TYPE!r} and "
            f"{own_format.PEFT_TYPE!r} are accepted; load it with peft"
        )
    put(f"load_adapter: {folder}", model, contents)
    return _report(config, tuple(config.get("why_not_peft", ())), contents.keys)


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).exists() or not (folder / PICKLED).exists():
        return load_file(folder / WEIGHTS)
    stored: dict[str, Tensor] = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    return stored


def _report(config: dict[str, Any], reasons: tuple[str, ...], keys: dict[str, str]) -> AdapterReport:
    names = {key: name for name, key in keys.items()}
    base_model, revision = config.get("base_model_name_or_path"), config.get("revision")
    return AdapterReport(config["peft_type"], reasons, names, base_model, revision)
