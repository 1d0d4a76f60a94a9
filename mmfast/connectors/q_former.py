"""From an image's features to fewer tokens: BLIP-2's queries, or four patches as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.files import read_tensors, replace_atomically
from mmfast.nn import QFormer

__all__ = ["MERGED_PATCHES", "VisualQFormer", "merge_patches", "read_q_former", "write_q_former"]

MERGED_PATCHES = 4
NORM_EPS = 1e-5
QUERY_DEVIATION = 0.02
# LAVIS's names of the attention and of the first norm; the others are the same.
_LAVIS_PREFIX = "Qformer.bert."
_LAVIS_PARTS = {
    "attention.self.": "attention.attention.",
    "embeddings.LayerNorm.": "layernorm.",
}
_OUTSIDE = ("query_tokens", "ln_vision.weight", "ln_vision.bias")
# What a file of BLIP-2 holds beside: weights for text, and the parts of its other stages.
_TEXT = r"encoder\.layer\.\d+\.(intermediate|output)\..+"
_UNUSED = re.compile(
    rf"Qformer\.bert\.({_TEXT}|embeddings\.(word_embeddings|position_embeddings)\.weight|embeddings\.position_ids)"
    r"|(Qformer\.cls|vision_proj|text_proj|itm_head|opt_proj|t5_proj|llm_proj)\..+|temp"
    r"|(visual_encoder|opt_model|t5_model|llm_model)\..+"
)


class VisualQFormer(nn.Module):
    """tokens = QFormer(queries, ln_vision(features)): learned queries read an image.

    `ln_vision`, of the encoder's features, is computed in float32 with an epsilon of 1e-5 and given back in the
    features' dtype. BLIP-2 trains the three parts together, and together they are frozen afterwards.

    Source: Li et al., "BLIP-2" (arXiv 2301.12597), section 3.1; salesforce/LAVIS `lavis/models/blip2_models/blip2.py`
    (BSD-3-Clause), which draws the queries from a normal distribution of deviation 0.02.

    Args:
        encoder_hidden_size: Width C of the encoder's features.
        num_queries: Tokens that one image becomes.
        **sizes: Further sizes of `mmfast.nn.QFormer`, without a vocabulary; by default those of BLIP-2.

    Raises:
        ValueError: If a size is wrong.
    """

    def __init__(self, encoder_hidden_size: int, num_queries: int = 32, **sizes: Any) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"VisualQFormer: num_queries is {num_queries}; 1 or more is accepted")
        self.q_former = QFormer(encoder_hidden_size=encoder_hidden_size, **sizes)
        self.ln_vision = nn.LayerNorm(encoder_hidden_size, NORM_EPS)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, self.hidden_size))
        nn.init.normal_(self.query_tokens, std=QUERY_DEVIATION)

    @property
    def hidden_size(self) -> int:
        """Width D of a token."""
        return self.q_former.hidden_size

    @property
    def num_queries(self) -> int:
        """Tokens that one image becomes."""
        return self.query_tokens.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        """Maps features [n, P, C] to tokens [n, num_queries, D] in the dtype of the Q-Former's weights."""
        norm = self.ln_vision
        states = F.layer_norm(features.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        tokens: Tensor = self.q_former(self.query_tokens, states.to(features.dtype))
        return tokens


def merge_patches(features: Tensor) -> Tensor:
    """Joins each four neighbours of a row of patches, after a norm without weights, into one token.

    This is MiniGPT-v2's way, and that of MiniGPT-4 on LLaMA-2. There the norm is BLIP-2's `ln_vision` as it starts:
    no file is loaded into it and it never trains. The class token is dropped.

    Args:
        features: [n, 1 + P, D], class token first, then the patches row by row, rows of a multiple of four.

    Returns:
        [n, P / 4, 4 · D].

    Raises:
        ValueError: If a row of the square of patches is no multiple of four.

    Source: Vision-CAIR/MiniGPT-4 `minigpt4/models/minigpt_v2.py` (BSD-3-Clause).
    """
    patches = features.shape[1] - 1
    row = round(patches**0.5)
    if row * row != patches or row % MERGED_PATCHES:
        raise ValueError(
            f"merge_patches: features is {list(features.shape)}, so a square of {patches} patches; rows of a multiple "
            f"of {MERGED_PATCHES} are accepted, with the class token before them; choose another image_size"
        )
    normed = F.layer_norm(features[:, 1:].float(), features.shape[-1:], eps=NORM_EPS).to(features.dtype)
    return normed.unflatten(1, (-1, MERGED_PATCHES)).flatten(2)


def read_q_former(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the Q-Former of a BLIP-2 model; nothing else in it is loaded where the file allows.

    Args:
        path: A file in LAVIS's layout, such as `blip2_pretrained_flant5xxl.pth`, or a folder of a BLIP-2 model of
            transformers.

    Returns:
        The state of `VisualQFormer`, and the name at `path` of each of its keys.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If there is something that belongs to no BLIP-2, or no Q-Former in it.
    """
    path = Path(path).expanduser()
    state, names = _read_folder(path) if path.is_dir() else _read_file(path)
    if not {*_OUTSIDE, "q_former.layernorm.weight"} <= state.keys():
        raise ValueError(
            f"read_q_former: {path} holds {len(names)} tensors of a Q-Former "
            f"({', '.join(sorted(names.values())[:4])}); "
            "query_tokens, ln_vision and a whole Q-Former are accepted: a file of BLIP-2 in LAVIS's layout, or a "
            "folder of transformers' BLIP-2"
        )
    return state, names


def write_q_former(state: Mapping[str, Tensor], path: str | Path) -> dict[str, str]:
    """Writes a state of `VisualQFormer` in LAVIS's layout, as `{"model": tensors}`, whole or not at all.

    Returns:
        The name in the file of each key.
    """
    names = {key: to_lavis(key) for key in state}
    content = {"model": {name: state[key].detach().cpu().contiguous() for key, name in names.items()}}
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda temporary: torch.save(content, temporary))
    return names


def from_lavis(name: str) -> str:
    """The key in `VisualQFormer` of a name of LAVIS's, or "" if there is none."""
    if not name.startswith(_LAVIS_PREFIX):
        return name if name in _OUTSIDE else ""
    key = name.removeprefix(_LAVIS_PREFIX)
    for theirs, ours in _LAVIS_PARTS.items():
        key = key.replace(theirs, ours)
    return f"q_former.{key}"


def to_lavis(key: str) -> str:
    """LAVIS's name of a key in `VisualQFormer`."""
    if key in _OUTSIDE:
        return key
    name = key.removeprefix("q_former.")
    for theirs, ours in _LAVIS_PARTS.items():
        name = name.replace(ours, theirs)
    return _LAVIS_PREFIX + name


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    original = read_tensors(path, "read_q_former", None if path.suffix == ".safetensors" else "model")
    names = {from_lavis(name): name for name in original if not _UNUSED.fullmatch(name)}
    if "" in names:
        raise ValueError(
            f"read_q_former: {path} holds {names['']!r}, which is of no BLIP-2; LAVIS's names are accepted"
        )
    return {key: original[name] for key, name in names.items()}, names


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    state: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                key = name.replace("vision_model.post_layernorm.", "ln_vision.").replace("qformer.", "q_former.", 1)
                is_text = re.fullmatch(rf"q_former\.{_TEXT}", key)
                if key in _OUTSIDE or (key.startswith("q_former.") and not is_text):
                    state[key], names[key] = file.get_tensor(name), name
    return state, names
