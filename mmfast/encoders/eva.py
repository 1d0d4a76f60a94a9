"""EVA-CLIP's ViT-g/14, frozen: the features of BLIP-2 and of all that stands on it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, Blip2VisionConfig, Blip2VisionModel

from mmfast.encoders.frozen import FrozenEncoder, check_loaded
from mmfast.files import read_tensors, write_json

__all__ = ["EvaEncoder"]

_NORM = "post_layernorm."
_POSITIONS = "embeddings.position_embedding"
_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": _POSITIONS,
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# CLIP's mean and deviation; a resize to a square that does not keep the proportions, and no crop.
_PREPROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


class EvaEncoder(FrozenEncoder):
    """features = output of the last block of EVA ViT-g/14, class token first; without gradients, always in eval mode.

    No norm follows the last block. BLIP-2's `ln_vision` is learned with the Q-Former and belongs to it
    (`mmfast.connectors.VisualQFormer`); transformers keeps it in the tower, as `post_layernorm` with an epsilon of
    1e-6 in place of 1e-5. It is taken out here, so that it is applied once.

    All weights have one dtype. The published code keeps norms, positions and the biases of attention in float32 and
    the rest in float16.

    Source: salesforce/LAVIS `lavis/models/eva_vit.py` (BSD-3-Clause); transformers `models/blip_2`.

    Args:
        tower: transformers' model of the same network; it loses its `post_layernorm`.
    """

    def __init__(self, tower: Blip2VisionModel) -> None:
        super().__init__(tower, keeps_class_token=True)
        self.tower.post_layernorm = nn.Identity()

    @classmethod
    def from_pretrained(
        cls, name: str | Path, dtype: torch.dtype = torch.float32, image_size: int | None = None
    ) -> EvaEncoder:
        """Loads the tower alone, from a folder of a BLIP-2 model of transformers, or of its vision model.

        Args:
            name: The folder.
            dtype: Of all weights.
            image_size: Side of the images, to which the positions are interpolated; None: the folder's.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If it holds no such tower, weights are missing, or the size is no multiple of a patch.
        """
        folder = cls.resolve(name)
        config: Any = AutoConfig.from_pretrained(folder)
        config = getattr(config, "vision_config", config)
        if config.model_type != "blip_2_vision_model":
            raise ValueError(
                f"EvaEncoder: {folder} holds a {config.model_type!r}; a BLIP-2 model of transformers, or its vision "
                "model, is accepted; use ClipEncoder for a CLIP model"
            )
        model: Any = Blip2VisionModel
        opened = model.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            key_mapping={r"^vision_model\.": ""},
            output_loading_info=True,
        )
        tower, report = opened
        check_loaded("EvaEncoder", folder, {key for key in report["missing_keys"] if not key.startswith(_NORM)})
        encoder = cls(tower)
        if image_size is not None:
            encoder._resize(image_size)
        return encoder

    @classmethod
    def from_config(cls, config: Blip2VisionConfig) -> EvaEncoder:
        """A tower with fresh random weights, for tests and, on the meta device, for counting."""
        return cls(Blip2VisionModel(config))

    @classmethod
    def from_original(
        cls,
        path: str | Path,
        image_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        config: Blip2VisionConfig | None = None,
    ) -> EvaEncoder:
        """Reads `eva_vit_g.pth`, the file that LAVIS and MiniGPT-4 load.

        Its 40th block and its norm are left out, as there; `save_pretrained` makes a folder of the rest.

        Args:
            path: The file.
            image_size: Side of the images, to which the positions are interpolated; None: the configuration's.
            dtype: Of all weights.
            config: Of another size than ViT-g.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If its tensors are not those of this network.
        """
        where = "EvaEncoder.from_original"
        config = Blip2VisionConfig() if config is None else config
        state = _from_original(read_tensors(Path(path).expanduser(), where), config.num_hidden_layers, where)
        with torch.device("meta"):
            encoder = cls.from_config(config)
        _check(where, encoder.tower.state_dict(), state)
        encoder.tower.load_state_dict({key: x.to(dtype) for key, x in state.items()}, assign=True)
        encoder.requires_grad_(False)
        if image_size is not None:
            encoder._resize(image_size)
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tower as transformers' `Blip2VisionModel`, and the image processor's configuration."""
        folder = Path(folder)
        self.tower.save_pretrained(folder)
        size = {"height": self.image_size, "width": self.image_size}
        write_json(folder / "preprocessor_config.json", {**_PREPROCESSOR, "size": size})

    def _resize(self, image_size: int) -> None:
        """Interpolates the positions of the patches for images of another size, as the published code does."""
        patch = self.config.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"EvaEncoder: image_size is {image_size}; a multiple of the patch's {patch} is accepted")
        if image_size == self.image_size:
            return
        weight: Tensor = self.tower.embeddings.position_embedding.data
        grid, new_grid = self.image_size // patch, image_size // patch
        patches = weight[:, 1:].float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
        patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(weight.dtype)
        resized = torch.cat([weight[:, :1], patches], 1)
        self.tower.embeddings.position_embedding = nn.Parameter(resized, requires_grad=False)
        self.config.image_size = image_size


def _from_original(original: dict[str, Tensor], depth: int, where: str) -> dict[str, Tensor]:
    """The file's tensors under transformers' names; queries, keys and values get one bias, zero for the keys."""
    state: dict[str, Tensor] = {}
    for name, tensor in original.items():
        match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
        block, part, kind = match.groups() if match else (None, name, None)
        if part in ("norm", "fc_norm", "head", "mask_token") or (block is not None and int(block) >= depth):
            continue
        layer = "" if block is None else f"encoder.layers.{block}."
        if part in ("attn.q_bias", "attn.v_bias"):
            zeros = torch.zeros_like(tensor)
            bias = state.get(f"{layer}self_attn.qkv.bias", zeros.repeat(3))
            own = [tensor, zeros, zeros] if part == "attn.q_bias" else [zeros, zeros, tensor]
            state[f"{layer}self_attn.qkv.bias"] = bias + torch.cat(own)
        elif part in _NAMES:
            state[f"{layer}{_NAMES[part]}{kind or ''}"] = tensor
        else:
            raise ValueError(f"{where}: {name!r} is no tensor of EVA's vision tower; eva_vit_g.pth is accepted")
    return state


def _check(where: str, expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Refuses names or shapes other than the expected ones."""

    def shapes(state: dict[str, Tensor]) -> Iterable[tuple[str, tuple[int, ...]]]:
        return ((name, tuple(tensor.shape)) for name, tensor in state.items())

    wrong = sorted(set(shapes(given)) ^ set(shapes(expected)))
    if wrong:
        raise ValueError(
            f"{where}: the file and the network differ in {len(wrong)} names or shapes: {wrong[:6]}; the tensors of "
            "eva_vit_g.pth are accepted, or those of the configuration that is given"
        )
