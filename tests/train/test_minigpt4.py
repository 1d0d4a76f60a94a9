"""MiniGPT-4 in the training loop: two stages, the published course of the learning rate, and any step resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.models import open_model
from mmfast.train import StageConfig, TrainConfig, train
from mmfast.train.schedule import warmup_unshifted_cosine

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 20, "dropout": 0.2}


def make_config(backbones: dict[str, str], data: str, out: Path, **fields: Any) -> TrainConfig:
    """A Q-Former that learns with dropout, then the linear map alone; the texts of both are whole conversations."""
    course: dict[str, Any] = {"schedule": "unshifted_cosine", "start_factor": 0.1, "end_factor": 0.5}
    stages = [
        StageConfig("q_former", template="minigpt4", batch_size=4, max_steps=3),
        StageConfig("finetune", batch_size=4, micro_batch_size=2, max_steps=4, warmup_ratio=0.5, **course),
    ]
    options = {"num_queries": 3, "q_former_sizes": SIZES}
    values = {"system": "minigpt4", "data": data, "out": str(out), "stages": stages, "options": options}
    return TrainConfig(**{**values, **backbones, **fields})


def deterministic(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def test_two_stages_train_what_they_should(backbones: dict[str, str], data: str, tmp_path: Path) -> None:
    result = train(make_config(backbones, data, tmp_path / "run"))
    model = result.model
    queries = sum(p.numel() for p in model.part_parameters("q_former").values())
    linear = 16 * 32 + 32
    assert [stage.trainable_parameters for stage in result.stages] == [queries + linear, linear]
    log = deterministic(result.out)
    assert log[0]["lr_by_part"].keys() == {"q_former", "connector"}
    for step in range(4):
        factor = warmup_unshifted_cosine(step, 4, 0.5, 0.1, 0.5)
        assert log[3 + step]["lr_by_part"] == {"connector": pytest.approx(3e-5 * factor)}
    first = load_file(result.out / "checkpoints" / "step-00000003" / "trained.safetensors")
    last = load_file(result.out / "model" / "trained.safetensors")
    changed = {name for name, tensor in last.items() if not torch.equal(tensor, first[name])}
    assert changed == {"connector.weight", "connector.bias"}
    opened = open_model(result.out)
    assert all(torch.equal(x, last[name]) for name, x in opened.trained_state().items())
    assert opened.processor is not None and opened.processor.template.name == "minigpt4"
    # A later run starts with both, and trains the linear map on.
    later = make_config(backbones, data, tmp_path / "later", start_from=str(result.out))
    later.stages = later.stages[1:]
    continued = train(later).model.trained_state()
    assert torch.equal(continued["q_former.query_tokens"], last["q_former.query_tokens"])
    assert not torch.equal(continued["connector.weight"], last["connector.weight"])


@pytest.mark.parametrize("done", [2, 3, 5])
def test_a_run_continues_from_any_step(
    done: int,
    backbones: dict[str, str],
    data: str,
    tmp_path: Path,
    train_until_crash: Callable[[TrainConfig, int], None],
) -> None:
    """As after a crash in step `done` + 1; 3 is where the first stage ends."""
    whole = train(make_config(backbones, data, tmp_path / "whole"))
    config = make_config(backbones, data, tmp_path / "broken", save_every=1)
    train_until_crash(config, done)
    torch.rand(7)
    result = train(config, resume=True)
    assert deterministic(result.out) == deterministic(whole.out)
    saved = [load_file(run / "model" / "trained.safetensors") for run in (whole.out, result.out)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
