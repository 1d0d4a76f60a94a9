"""Video-ChatGPT's published layout: the projector and the whole input embedding, of which two rows were trained.

Source of the names: Video-ChatGPT `video_chatgpt/train/llava_trainer.py` (what is saved) and
`video_chatgpt/model/video_chatgpt.py` (the order of the added tokens).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.files import read_tensors, replace_atomically
from mmfast.models.trained import check_projector_widths

if TYPE_CHECKING:
    from mmfast.models.video_chatgpt import VideoChatGpt

__all__ = ["ORIGINAL_FILE", "read_original", "write_original"]

ORIGINAL_FILE = "mm_projector.bin"
_NAMES = {
    "connector.weight": "model.mm_projector.weight",
    "connector.bias": "model.mm_projector.bias",
    "markers.weight": "model.embed_tokens.weight",
}
# Added to the base's vocabulary in this order: <vid_patch>, <vid_start>, <vid_end>. The first is never looked up.
_ADDED_TOKENS = 3


def read_original(
    path: Path, vocab_size: int, hidden_size: int, vision_config: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what was trained; nothing in the file is ever executed.

    Only the last two rows of the embedding were trained; the others are those of the base language model.

    Args:
        path: The file, written by `torch.save` or as safetensors, or a folder with `mm_projector.bin`.
        vocab_size: Rows V of the base language model's embedding (32003 for LLaVA-Lightning-7B-v1-1).
        hidden_size: Its width C.
        vision_config: The encoder's configuration.

    Returns:
        The trained state in float32 by our names, and for each of them the name in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If tensors are missing or unexpected, or of another language model or encoder.
    """
    where = "read_original"
    path = path / ORIGINAL_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{where}: {path} does not exist; Video-ChatGPT's video_chatgpt-7B.bin or mm_projector.bin, or the "
            "folder with the latter, is accepted"
        )
    content = read_tensors(path, where)
    expected = set(_NAMES.values())
    missing, unexpected = sorted(expected - content.keys()), sorted(content.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{where}: {path} is no checkpoint of Video-ChatGPT: missing {missing}, unexpected {unexpected[:8]} "
            f"({len(unexpected)}); exactly {', '.join(sorted(expected))} are accepted"
        )
    shapes = {name: tuple(content[original].shape) for name, original in _NAMES.items()}
    check_projector_widths(where, shapes, vision_config.hidden_size, hidden_size)
    wanted = {
        "connector.weight": (hidden_size, vision_config.hidden_size),
        "connector.bias": (hidden_size,),
        "markers.weight": (vocab_size + _ADDED_TOKENS, hidden_size),
    }
    reshaped = [
        f"{_NAMES[name]} {shapes[name]} instead of {shape}" for name, shape in wanted.items() if shapes[name] != shape
    ]
    if reshaped:
        raise ValueError(
            f"{where}: {path} has {'; '.join(reshaped)}; the sizes of this encoder and language model are accepted, "
            f"with {_ADDED_TOKENS} rows of the embedding more than the base's {vocab_size}; pass the base it was "
            "trained on"
        )
    state = {name: content[original].float() for name, original in _NAMES.items()}
    state["markers.weight"] = state["markers.weight"][-2:].clone()
    return state, dict(_NAMES)


def write_original(model: VideoChatGpt, folder: Path) -> dict[str, str]:
    """Writes `mm_projector.bin` in float32, as the original's training does, whole or not at all.

    The row of <vid_patch>, which is never looked up, is the mean of all words.

    Returns:
        For each of our names the name in the file.
    """
    words = model.get_input_embeddings().weight.detach().float().cpu()
    state = {name: tensor.detach().float().cpu() for name, tensor in model.trained_state().items()}
    state["markers.weight"] = torch.cat([words, words.mean(0, keepdim=True), state["markers.weight"]])
    folder.mkdir(parents=True, exist_ok=True)
    content = {_NAMES[name]: tensor.contiguous() for name, tensor in state.items()}
    replace_atomically(folder / ORIGINAL_FILE, lambda path: torch.save(content, path))
    return dict(_NAMES)
