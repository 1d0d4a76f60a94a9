"""A CLIP vision tower, frozen: hidden states of one layer, with or without the class token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmfast.encoders.frozen import FrozenEncoder, check_loaded

__all__ = ["ClipEncoder"]

_KEEPS_CLASS_TOKEN = {"default": False, "patch": False, "full": True, "cls_patch": True}


class ClipEncoder(FrozenEncoder):
    """features = hidden_states[layer] of a CLIP vision tower, without gradients and always in eval mode.

    The layers above `layer` never run. They are kept, outside the registered modules, so that
    `complete_state_dict` can write the whole tower: they stay where they were loaded (the CPU) when the
    encoder moves to another device.

    Source: liuhaotian/LLaVA `llava/model/multimodal_encoder/clip_encoder.py` (the tap at -2 and its selection).

    Args:
        tower: The vision tower with all its layers; its dtype is the dtype the encoder computes in.
        layer: Index into the tower's `hidden_states` (0 is the embedding, -1 the last layer's output).
        select: "default" or "patch" drops the class token, "full" or "cls_patch" keeps it.

    Raises:
        ValueError: If the layer or the selection does not exist.
    """

    def __init__(self, tower: CLIPVisionModel, layer: int = -2, select: str = "default") -> None:
        depth = tower.config.num_hidden_layers
        if not isinstance(layer, int) or not -(depth + 1) <= layer <= depth:
            raise ValueError(
                f"ClipEncoder: layer is {layer!r}; a tower of {depth} layers has hidden states "
                f"{-(depth + 1)}..{depth}, one of which is accepted"
            )
        if select not in _KEEPS_CLASS_TOKEN:
            raise ValueError(
                f"ClipEncoder: select is {select!r}; accepted are {', '.join(map(repr, _KEEPS_CLASS_TOKEN))}"
            )
        # The tower ends at the tapped layer, and CLIP's last hidden state is taken before its last norm.
        unused = _split_layers(tower, layer % (depth + 1))
        super().__init__(tower, _KEEPS_CLASS_TOKEN[select])
        self.layer = layer
        self.select = select
        self._unused_layers = unused

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        layer: int = -2,
        select: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> ClipEncoder:
        """Loads the tower of `name`: a folder with a CLIP (vision) model, or "world" for the shipped one.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If weights of the tower are missing in the folder.
        """
        folder = cls.resolve(name)
        opened: Any = CLIPVisionModel.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        tower, report = opened
        check_loaded("ClipEncoder", folder, set(report["missing_keys"]))
        return cls(tower, layer, select)

    @classmethod
    def from_config(cls, config: CLIPVisionConfig, layer: int = -2, select: str = "default") -> ClipEncoder:
        """A tower with fresh random weights, for tests and, on the meta device, for counting."""
        return cls(CLIPVisionModel(config), layer, select)

    @property
    def layers(self) -> nn.ModuleList:
        """The tower's layers that run."""
        return _find_layers(self.tower)[1]

    def complete_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the whole `CLIPVisionModel`, the layers that never run included."""
        name, layers = _find_layers(self.tower)
        state: dict[str, Tensor] = dict(self.tower.state_dict())
        for index, layer in enumerate(self._unused_layers, start=len(layers)):
            state |= {f"{name}.{index}.{key}": value for key, value in layer.state_dict().items()}
        return state

    def extra_repr(self) -> str:
        """The tap and the selection."""
        return f"layer={self.layer}, select={self.select!r}"


def _find_layers(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """The tower's list of layers and its name, which depends on the release of transformers."""
    found: list[Any] = [(n, m) for n, m in tower.named_modules() if isinstance(m, nn.ModuleList)]
    if len(found) != 1:
        raise ValueError(
            f"ClipEncoder: {type(tower).__name__} has {len(found)} lists of layers; a tower with one is accepted"
        )
    return found[0]


def _split_layers(tower: nn.Module, count: int) -> tuple[nn.Module, ...]:
    """Leaves the first `count` layers in the tower and returns the rest."""
    _, layers = _find_layers(tower)
    unused = tuple(layers[count:])
    del layers[count:]
    return unused
