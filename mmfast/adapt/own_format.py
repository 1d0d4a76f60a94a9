"""The format of adapters that PEFT has no words for: the model's own tensor names, and each layer's options in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from mmfast.adapt.contents import Contents, Lora
from mmfast.adapt.prompts import Prompts

__all__ = ["PEFT_TYPE", "from_own", "to_own"]

PEFT_TYPE = "MMFAST"
FORMAT = 1


def to_own(contents: Contents, why_not_peft: Sequence[str]) -> dict[str, Any]:
    """The part of `adapter_config.json` that describes the contents."""
    return {
        "peft_type": PEFT_TYPE,
        "format": FORMAT,
        "why_not_peft": list(why_not_peft),
        "lora": {name: asdict(options) for name, options in contents.lora.items()},
        "bias_scale": contents.bias_scale,
        "prompts": {name: asdict(options) for name, options in contents.prompts.items()},
        "tensors": sorted(contents.tensors),
    }


def from_own(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Contents:
    """The contents of a folder in this format.

    Raises:
        ValueError: If it was written by a newer release.
    """
    if config.get("format") != FORMAT:
        raise ValueError(
            f"load_adapter: the adapter has format {config.get('format')!r}; this release reads format {FORMAT}; "
            "update mmfast to the release that wrote it"
        )
    contents = Contents(
        lora={name: Lora(**options) for name, options in config["lora"].items()},
        bias_scale=dict(config["bias_scale"]),
        prompts={name: Prompts(**options) for name, options in config.get("prompts", {}).items()},
        tensors=dict(stored),
        keys={name: name for name in stored},
    )
    contents.problems += [f"missing: {name}" for name in config["tensors"] if name not in stored]
    contents.problems += [f"unexpected: {name}" for name in stored if name not in config["tensors"]]
    return contents
