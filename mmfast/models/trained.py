"""The folder of a trained model: what was trained as safetensors, and a JSON that says on top of what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmfast.files import replace_atomically, write_json

__all__ = [
    "check_projector_widths",
    "check_state",
    "find_trained",
    "read_description",
    "read_shapes",
    "read_state",
    "some_of",
    "write_trained",
]

DESCRIPTION = "mmfast.json"
WEIGHTS = "trained.safetensors"
FORMAT = 1
_SIZES = {4096: "7B", 5120: "13B"}
_SHOWN = 8


def find_trained(folder: Path) -> Path | None:
    """The folder that holds `mmfast.json`: `folder` itself or, for a run folder, its `model`; else None."""
    return next((place for place in (folder, folder / "model") if (place / DESCRIPTION).is_file()), None)


def read_description(folder: Path) -> dict[str, Any]:
    """Reads `mmfast.json`.

    Raises:
        ValueError: If it was written by a newer release.
    """
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    if description.get("format") != FORMAT:
        raise ValueError(
            f"from_pretrained: {folder / DESCRIPTION} has format {description.get('format')!r}; "
            f"this release reads format {FORMAT}; update mmfast to the release that wrote it"
        )
    return description


def read_state(folder: Path) -> dict[str, Tensor]:
    """Reads every trained tensor, on the CPU."""
    return load_file(folder / WEIGHTS)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in all safetensors files of `folder`, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def write_trained(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes both files, each complete or not at all; the JSON comes last, so that it vouches for the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    replace_atomically(folder / WEIGHTS, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    write_json(folder / DESCRIPTION, {"format": FORMAT, **description})


def check_projector_widths(
    where: str, shapes: Mapping[str, Sequence[int]], in_features: int, out_features: int
) -> None:
    """Refuses a projector made for another encoder or language model, by the names `connector.*`.

    Raises:
        ValueError: If a width differs; the message has both.
    """
    matrices = [shape for name, shape in sorted(shapes.items()) if _is_projector_matrix(name, shape)]
    if not matrices:
        return
    if matrices[-1][0] != out_features:
        raise ValueError(
            f"{where}: this projector is for {_size(matrices[-1][0])}, your language model is "
            f"{_size(out_features)}; equal widths are accepted; pass the language model it was trained with"
        )
    if matrices[0][1] != in_features:
        raise ValueError(
            f"{where}: this projector reads features {matrices[0][1]} wide, your encoder gives {in_features}; "
            "equal widths are accepted; pass the encoder it was trained with"
        )


def check_state(where: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuses a state whose names or shapes differ from the expected ones, with all differences at once.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape.
    """
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    reshaped = [
        f"{name} ({list(state[name].shape)} given, {list(tensor.shape)} in the model)"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    problems = [f"{len(names)} {kind}: {some_of(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"{where}: the tensors do not fit this model; {'; '.join(problems)}; exactly the trained tensors of "
            "the same connector, LoRA and language model are accepted; build the model with the same parts"
        )


def _is_projector_matrix(name: str, shape: Sequence[int]) -> bool:
    return name.startswith("connector.") and name.endswith("weight") and len(shape) == 2


def _size(width: int) -> str:
    return f"{width} ({_SIZES[width]})" if width in _SIZES else str(width)


def some_of(names: Sequence[str]) -> str:
    """The first names of a list for an error, and how many more there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
