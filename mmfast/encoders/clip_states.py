"""What a frozen CLIP vision tower knows of a whole image: class tokens of several layers, or all tokens of the last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from mmfast.encoders.frozen import FrozenEncoder, check_loaded

__all__ = ["ClipScales", "ClipTokens", "ProjectedClipTokens"]


class _FrozenClip(FrozenEncoder):
    """A frozen tower, as one of `kind` of transformers."""

    kind: type[Any] = CLIPVisionModel

    def __init__(self, tower: Any) -> None:
        super().__init__(tower, keeps_class_token=True)

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, dtype: torch.dtype = torch.float32) -> Self:
        """Loads the tower of `name`: a folder with a CLIP (vision) model, or "world" for the shipped one.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If weights of the tower are missing in the folder.
        """
        folder = cls.resolve(name)
        opened: Any = cls.kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        tower, report = opened
        check_loaded(cls.__name__, folder, report["missing_keys"])
        return cls(tower, *args)

    @classmethod
    def from_config(cls, config: CLIPVisionConfig, *args: Any) -> Self:
        """A tower with fresh random weights, for tests and, on the meta device, for counting."""
        return cls(cls.kind(config), *args)

    def _run(self, pixel_values: Tensor, **options: Any) -> Any:
        weight = next(self.tower.parameters())
        return self.tower(pixel_values=pixel_values.to(weight.device, weight.dtype), **options)


class ClipScales(_FrozenClip):
    """Global features at several scales: the class tokens of some layers, joined.

    Args:
        tower: The vision tower.
        layers: Indices into its `hidden_states` (0 is the embedding, the number of layers the last one's output).

    Raises:
        ValueError: If a layer does not exist.
    """

    def __init__(self, tower: CLIPVisionModel, layers: Sequence[int]) -> None:
        super().__init__(tower)
        depth = tower.config.num_hidden_layers
        unknown = [layer for layer in layers if not 0 <= layer <= depth]
        if unknown or not layers:
            raise ValueError(
                f"ClipScales: layers is {list(layers)}; a tower of {depth} layers has hidden states 0..{depth}, at "
                "least one of which is accepted"
            )
        self.layers = tuple(layers)

    @property
    def hidden_size(self) -> int:
        """Width M · D of the joined class tokens."""
        return len(self.layers) * int(self.config.hidden_size)

    @property
    def num_patches(self) -> int:
        """1: the class tokens are joined to one feature."""
        return 1

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels [n, 3, S, S] to [n, 1, M · D], the class tokens of the M layers, before any last norm."""
        states = self._run(pixel_values, output_hidden_states=True).hidden_states
        return torch.cat([states[layer][:, :1] for layer in self.layers], -1)

    def extra_repr(self) -> str:
        """The layers."""
        return f"layers={self.layers}"


class ClipTokens(_FrozenClip):
    """All tokens of the last layer, the class token first, after CLIP's last norm.

    Args:
        tower: The vision tower.
    """

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels [n, 3, S, S] to [n, 1 + P, hidden_size]."""
        # Where the norm is depends on the release of transformers.
        norm = next(module for name, module in self.tower.named_modules() if name.endswith("post_layernorm"))
        normed: Tensor = norm(self._run(pixel_values).last_hidden_state)
        return normed


class ProjectedClipTokens(ClipTokens):
    """`ClipTokens`, each through CLIP's projection to `projection_dim`, which CLIP applies to the class token alone.

    Source: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/llama_adapter.py (`clip_encode_image`).

    Args:
        tower: The vision tower with its projection.
    """

    kind = CLIPVisionModelWithProjection

    @property
    def hidden_size(self) -> int:
        """CLIP's `projection_dim`."""
        return int(self.config.projection_dim)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels [n, 3, S, S] to [n, 1 + P, projection_dim]."""
        projected: Tensor = self.tower.visual_projection(super().forward(pixel_values))
        return projected
