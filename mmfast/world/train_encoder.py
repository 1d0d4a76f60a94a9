"""Trains the world's vision encoder: a CLIP vision tower of 0.8 M parameters that has seen digits and no text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mmfast.world.digits import CANVAS_SIZE, CELL_SIZE, enlarge, load_split
from mmfast.world.train_llm import warmup_then_cosine

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

PATCH_SIZE = 8
BATCH_SIZE = 128
STEPS = 3000
LEARNING_RATE = 1e-3
EMA_DECAY = 0.998
PIXEL_MEAN = PIXEL_STD = 0.5
_PATCHES = (CANVAS_SIZE // PATCH_SIZE) ** 2


def build_encoder() -> CLIPVisionModel:
    """The untrained tower: 4 layers, 4 heads, 128 wide, 16 patches of 8x8 pixels and a class token."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CANVAS_SIZE,
        patch_size=PATCH_SIZE,
    )
    return CLIPVisionModel(config)


class Heads(nn.Module):
    """Linear readers of the tower, needed in training only.

    Every patch must tell the digit of its cell and the place inside the cell, in the last layer and in the last but
    one (the layer that LLaVA reads); the class token must tell all four digits.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.digit = nn.ModuleList(nn.Linear(hidden_size, 10) for _ in range(2))
        self.place = nn.ModuleList(nn.Linear(hidden_size, _PATCHES) for _ in range(2))
        self.canvas = nn.Linear(hidden_size, 4 * 10)

    def forward(self, hidden_states: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The summed loss of all readers; `labels` [B, 4]."""
        targets = labels[:, cell_of_patch()]
        places = torch.arange(_PATCHES).expand_as(targets)
        loss = F.cross_entropy(self.canvas(hidden_states[-1][:, 0]).view(-1, 10), labels.flatten())
        for depth, digit, place in zip((-1, -2), self.digit, self.place, strict=True):
            patches = hidden_states[depth][:, 1:].flatten(0, 1)
            loss = loss + F.cross_entropy(digit(patches), targets.flatten(), label_smoothing=0.05)
            loss = loss + 0.1 * F.cross_entropy(place(patches), places.flatten())
        return loss


def cell_of_patch() -> Tensor:
    """[16] index of the digit that each patch shows a quarter of."""
    side = CANVAS_SIZE // PATCH_SIZE
    row, column = torch.arange(_PATCHES) // side, torch.arange(_PATCHES) % side
    return row // 2 * 2 + column // 2


def train_encoder(seed: int = 0, max_steps: int | None = None) -> CLIPVisionModel:
    """The trained tower in evaluation mode: a moving average of the weights; the heads are thrown away."""
    steps = STEPS if max_steps is None else min(STEPS, max_steps)
    torch.manual_seed(seed)
    model, digits = build_encoder().train(), load_split("train")
    heads = Heads(model.config.hidden_size)
    cells, labels = torch.from_numpy(enlarge(digits.pixels)), torch.from_numpy(digits.labels)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, steps))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    with tqdm(range(steps), desc="encoder", mininterval=10) as progress:
        for _ in progress:
            rows = torch.randint(len(cells), (BATCH_SIZE, 4))
            canvases = assemble(distort(cells[rows.flatten()]).view(-1, 4, CELL_SIZE, CELL_SIZE))
            hidden_states = model(pixel_values=normalize(canvases), output_hidden_states=True).hidden_states
            loss = heads(hidden_states, labels[rows])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            average.update_parameters(model)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.load_state_dict(average.module.state_dict())
    return model.eval()


def distort(cells: Tensor) -> Tensor:
    """Digits [N, 16, 16] in 0..1 as other hands might have written them.

    Turned, sheared, stretched, moved and bent at random, fainter or stronger, with noise.
    """
    count = len(cells)
    angle, shear = uniform(count, -0.26, 0.26), uniform(count, -0.25, 0.25)
    width, height = uniform(count, 0.85, 1.2), uniform(count, 0.85, 1.2)
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([width * cos, width * (shear * cos - sin), uniform(count, -0.25, 0.25)], -1)
    down = torch.stack([height * sin, height * (shear * sin + cos), uniform(count, -0.25, 0.25)], -1)
    where = F.affine_grid(torch.stack([across, down], 1), [count, 1, CELL_SIZE, CELL_SIZE], align_corners=False)
    bend = F.interpolate(0.06 * torch.randn(count, 2, 4, 4), size=CELL_SIZE, mode="bicubic", align_corners=True)
    bent = F.grid_sample(cells[:, None], where + bend.permute(0, 2, 3, 1), align_corners=False)[:, 0]
    strength, power = uniform(count, 0.7, 1.15)[:, None, None], uniform(count, 0.7, 1.4)[:, None, None]
    return (strength * bent.clamp(min=1e-4) ** power + 0.03 * torch.randn_like(bent)).clamp(0, 1)


def uniform(count: int, low: float, high: float) -> Tensor:
    """[count] numbers between `low` and `high`."""
    return torch.empty(count).uniform_(low, high)


def assemble(cells: Tensor) -> Tensor:
    """Four cells each [B, 4, 16, 16] as canvases [B, 32, 32]."""
    top, bottom = cells[:, 0:2], cells[:, 2:4]
    return torch.cat([torch.cat(row.unbind(1), dim=-1) for row in (top, bottom)], dim=-2)


def normalize(canvases: Tensor) -> Tensor:
    """Grey canvases [B, 32, 32] in 0..1 as `pixel_values` [B, 3, 32, 32]."""
    return ((canvases - PIXEL_MEAN) / PIXEL_STD)[:, None].expand(-1, 3, -1, -1)
