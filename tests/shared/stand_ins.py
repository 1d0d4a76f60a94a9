"""Small random files in place of pretrained and published ones, in their layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Blip2VisionConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mmfast.connectors import VisualQFormer, write_q_former
from mmfast.encoders import EvaEncoder

EVA_WIDTH = 24
Q_FORMER = {"hidden_size": 16, "num_layers": 2, "num_heads": 1, "intermediate_size": 20}


def write_clip(folder: Path, image_size: int = 8, patch_size: int = 4, num_layers: int = 1) -> None:
    """A CLIP tower with its projection, and its image processor."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=12,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    crop = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(folder)


def write_eva(folder: Path, image_size: int = 16, patch_size: int = 4) -> None:
    """BLIP-2's image encoder in transformers' layout, and its image processor."""
    config = Blip2VisionConfig(
        hidden_size=EVA_WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        initializer_range=0.1,
    )
    EvaEncoder.from_config(config).save_pretrained(folder)


def write_blip2(path: Path, num_queries: int = 3) -> None:
    """The Q-Former that fits, as the file `blip2_pretrained_flant5xxl.pth` has it."""
    write_q_former(VisualQFormer(EVA_WIDTH, num_queries, **Q_FORMER).state_dict(), path)


def minigpt4_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """What a MiniGPT-4 for a language model of this width has trained."""
    return {"llama_proj.weight": (width, Q_FORMER["hidden_size"]), "llama_proj.bias": (width,)}


def write_minigpt4(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A file as MiniGPT-4 writes it: the tensors, which are returned, beside the state of its optimizer and more."""
    torch.manual_seed(3)
    model = {name: torch.randn(shape) for name, shape in shapes.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999)}]}
    config = {"run": {"max_epoch": 5, "output_dir": "out"}}
    torch.save({"model": model, "optimizer": optimizer, "config": config, "scaler": {"scale": 2.0}, "epoch": 4}, path)
    return model
