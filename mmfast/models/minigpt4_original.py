"""MiniGPT-4 and MiniGPT-v2 in the layout of the original repository: `checkpoint_<epoch>.pth`.

Source of the names: https://github.com/Vision-CAIR/MiniGPT-4 `minigpt4/runners/runner_base.py`,
`minigpt4/models/minigpt4.py`, `minigpt4/models/minigpt_base.py` (BSD-3-Clause). The file keeps what trained and the
buffers of all parts, and is loaded without complaint about what is missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmfast.connectors.q_former import from_lavis, to_lavis
from mmfast.files import read_tensors, replace_atomically

if TYPE_CHECKING:
    from mmfast.models.minigpt4 import MiniGPT4

__all__ = ["read_original", "write_original"]

_ROOT = "model"
_LORA = re.compile(r"llama_model\.base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_BUFFER = re.compile(r".*\.(rotary_emb\.inv_freq|position_ids|relative_position_index)")


def read_original(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what trained; nothing in the file is ever executed.

    Args:
        path: A file of `torch.save` with the tensors under "model", beside optimizer, scaler, config and epoch; or a
            folder with one such file, called checkpoint_<epoch>.pth.

    Returns:
        The tensors in float32 under the names of `MiniGPT4`, and the name in the file of each. Buffers are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds tensors of another system, or no `llama_proj`.
    """
    where, path = "read_original", _file(Path(path).expanduser())
    original = read_tensors(path, where, None if path.suffix == ".safetensors" else _ROOT)
    names = {_own(name): name for name in original if not _BUFFER.fullmatch(name)}
    foreign = names.get("")
    if foreign is not None or not {"connector.weight", "connector.bias"} <= names.keys():
        found = f"holds {foreign!r}" if foreign is not None else "lacks llama_proj.weight or llama_proj.bias"
        raise ValueError(
            f"{where}: {path} {found}, so it is no checkpoint of MiniGPT-4 or MiniGPT-v2; llama_proj, LoRA of "
            "llama_model and a Qformer that trained are accepted; was another system meant?"
        )
    return {key: original[name].float() for key, name in names.items()}, names


def write_original(model: MiniGPT4, folder: Path) -> dict[str, str]:
    """Writes what trained as `checkpoint_0.pth`, which is `{"model": tensors}`, whole or not at all.

    Returns:
        The name in the file of each tensor.
    """
    state = model.trained_state()
    names = {key: _original(key) for key in state}
    content = {_ROOT: {name: state[key].detach().cpu().contiguous() for key, name in names.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    replace_atomically(folder / "checkpoint_0.pth", lambda temporary: torch.save(content, temporary))
    return names


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("checkpoint_*.pth"))
    if len(files) != 1:
        raise ValueError(
            f"read_original: {path} holds {len(files)} files checkpoint_<epoch>.pth; one is accepted; pass the file "
            "itself"
        )
    return files[0]


def _own(name: str) -> str:
    """Our name of an original one, or "" if there is none."""
    if name in ("llama_proj.weight", "llama_proj.bias"):
        return f"connector.{name.removeprefix('llama_proj.')}"
    lora = _LORA.fullmatch(name)
    if lora is not None:
        return f"language_model.{lora[1]}.lora_{lora[2].lower()}"
    key = from_lavis(name)
    return f"q_former.{key}" if key else ""


def _original(key: str) -> str:
    part, _, rest = key.partition(".")
    if part == "connector":
        return f"llama_proj.{rest}"
    if part == "q_former":
        return to_lavis(rest)
    layer, _, matrix = rest.rpartition(".lora_")
    return f"llama_model.base_model.model.{layer}.lora_{matrix.upper()}.weight"
