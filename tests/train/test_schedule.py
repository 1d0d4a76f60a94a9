"""The learning rate's course and the number of steps."""

from __future__ import annotations

import pytest
import torch

from mmfast.train import load_recipe
from mmfast.train.schedule import steps_in_stage, warmup_cosine, warmup_unshifted_cosine


@pytest.mark.parametrize(("total", "ratio"), [(40, 0.03), (7, 0.5), (5, 0.0), (1, 0.03), (3, 1.0)])
def test_warmup_cosine_is_that_of_transformers(total: int, ratio: float) -> None:
    import math

    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, math.ceil(total * ratio), total)
    for step in range(total):
        assert warmup_cosine(step, total, ratio) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("recipe", "step", "expected"),
    [
        ("minigpt4-7b-pretrain", 0, 1e-6),
        ("minigpt4-7b-pretrain", 4999, 9.99802e-5),
        ("minigpt4-7b-pretrain", 5000, 9.70711e-5),
        ("minigpt4-7b-pretrain", 19999, 8e-5),
        ("minigpt4-7b-finetune", 199, 2.9855e-5),
        ("minigpt4-7b-finetune", 200, 2.80902e-5),
        ("minigpt4-7b-finetune", 999, 1e-5),
        ("minigpt-v2-7b", 1000, 9.99112e-6),
    ],
)
def test_warmup_unshifted_cosine_is_that_of_minigpt4(recipe: str, step: int, expected: float) -> None:
    stage = load_recipe(recipe).stages[0]
    factor = warmup_unshifted_cosine(
        step, stage.max_steps or 0, stage.warmup_ratio, stage.start_factor, stage.end_factor
    )
    assert stage.lr["connector"] * factor == pytest.approx(expected, rel=1e-5)


def test_warmup_unshifted_cosine_without_a_warm_up() -> None:
    assert warmup_unshifted_cosine(0, 10, 0.0, 0.1, 0.5) == 1
    assert warmup_unshifted_cosine(5, 10, 0.0, 0.1, 0.5) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "max_steps", "expected"),
    [
        (558_128, 256, 1, None, 2181),  # LLaVA-1.5's two stages
        (665_298, 128, 1, None, 5198),
        (10, 4, 3, None, 9),
        (10, 4, 0.5, None, 2),
        (1, 4, 0.1, None, 1),
        (10, 4, 1, 77, 77),
    ],
)
def test_steps_in_stage(samples: int, batch: int, epochs: float, max_steps: int | None, expected: int) -> None:
    assert steps_in_stage(samples, batch, epochs, max_steps) == expected
