"""A small world in which everything is real: handwritten digits, questions about them, and two frozen backbones.

The vision encoder has seen no text and the language model no image; a method under test has to join them.
`python -m mmfast.world` trains both again.
"""

from __future__ import annotations

from pathlib import Path

from mmfast.world.datasets import WorldSamples, chance_accuracy, samples

__all__ = ["WorldSamples", "chance_accuracy", "samples", "weights"]

_FOLDERS = ("encoder", "llm")


def weights(name: str) -> Path:
    """The folder of the shipped backbone `name`, for `from_pretrained`: "encoder" or "llm".

    "encoder" is a `transformers.CLIPVisionModel` with its image processor, "llm" a `LlamaForCausalLM` with its
    tokenizer.

    Raises:
        ValueError: another name.
        FileNotFoundError: the package was installed without its weights.
    """
    if name not in _FOLDERS:
        raise ValueError(
            f"world: there are no weights {name!r}; accepted are {', '.join(_FOLDERS)}; choose one of them"
        )
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"world: {folder} has no model.safetensors; install mmfast with its package data, "
            f"or train the weights again: python -m mmfast.world"
        )
    return folder
