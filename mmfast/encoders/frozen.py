"""What all frozen encoders share: a vision tower of transformers that never trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenEncoder", "check_loaded"]


class FrozenEncoder(nn.Module):
    """features = last hidden state of a vision tower, without gradients and always in eval mode.

    Args:
        tower: A vision model of transformers whose first token is the class token; its dtype is the dtype the
            encoder computes in.
        keeps_class_token: Whether the class token is one of the features.
    """

    tower: Any

    def __init__(self, tower: nn.Module, keeps_class_token: bool) -> None:
        super().__init__()
        self.tower = tower
        self.keeps_class_token = keeps_class_token
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def resolve(cls, name: str | Path) -> Path:
        """The folder that `name` stands for: "world" is the encoder shipped with the package.

        Raises:
            FileNotFoundError: If the folder does not exist.
        """
        if name == "world":
            from mmfast import world

            return world.weights("encoder")
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{cls.__name__}: the folder {folder} does not exist; a local folder with a vision tower or "
                '"world" is accepted; nothing is downloaded, so fetch the encoder first'
            )
        return folder

    @property
    def config(self) -> Any:
        """The tower's configuration."""
        return self.tower.config

    @property
    def hidden_size(self) -> int:
        """Width D of a feature."""
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side S of the square input, in pixels."""
        return self.config.image_size

    @property
    def num_patches(self) -> int:
        """Features P that one image becomes, the class token included where it is kept."""
        grid = self.image_size // self.config.patch_size
        return grid * grid + self.keeps_class_token

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps pixels [n, 3, S, S] of any float dtype to features [n, P, D] in the tower's dtype."""
        weight = next(self.tower.parameters())
        with torch.no_grad():
            features = self.tower(pixel_values=pixel_values.to(weight.device, weight.dtype)).last_hidden_state
        return features if self.keeps_class_token else features[:, 1:]

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Keeps eval mode whatever `mode` is: the encoder is frozen."""
        return super().train(False)


def check_loaded(where: str, folder: Path, missing: set[str]) -> None:
    """Refuses a tower of whose weights some were not in `folder`.

    Raises:
        ValueError: If `missing`, the names of the weights that were not there, is not empty.
    """
    if missing:
        raise ValueError(
            f"{where}: {folder} lacks the weights {sorted(missing)[:8]}; a folder with its kind of vision tower is "
            "accepted; was another kind of encoder meant?"
        )
