"""LaVIN in a run: images and text mixed, stopped and continued, in both precisions."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.models import Lavin, open_model
from mmfast.train import StageConfig, TrainConfig, TrainingInterrupted, load_recipe, train
from mmfast.train.log import StepLog
from mmfast.train.setup import resolve_stage
from mmfast.train.step import build_optimizer


@pytest.fixture
def make(backbones: dict[str, str], data: str, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(name: str, **fields: Any) -> TrainConfig:
        stage = StageConfig("instruct", batch_size=6, micro_batch_size=2, max_steps=6, weight_decay=0.02)
        values = {"system": "lavin", "data": data, "out": str(tmp_path / name), "stages": [stage], **backbones}
        return TrainConfig(**{**values, **fields})

    return make


def test_a_stopped_run_continues_bit_for_bit(make: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = make("whole"), make("stopped")
    result = train(whole)
    write_line = StepLog.write

    def interrupt(log: StepLog, record: dict[str, Any]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        write_line(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", interrupt)
        with pytest.raises(TrainingInterrupted):
            train(stopped)
    assert train(stopped, resume=True).steps == 6
    one, other = (load_file(Path(config.out) / "model" / "trained.safetensors") for config in (whole, stopped))
    fresh = Lavin.from_parts(whole.llm, whole.encoder).trained_state()
    assert one.keys() == other.keys() == fresh.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        # All has moved; dropout and the routers' first gradients of zero notwithstanding.
        assert not torch.equal(tensor, fresh[name]), name
    opened = open_model(whole.out)
    assert all(torch.equal(t, one[name]) for name, t in opened.trained_state().items())
    assert not result.model.training


def test_bfloat16_with_checkpointing(make: Callable[..., TrainConfig]) -> None:
    result = train(make("run", dtype="bfloat16", recompute="full"))
    model = result.model
    assert {p.dtype for p in model.part_parameters("language_model").values()} == {torch.bfloat16}
    assert {p.dtype for name in model.trained_parts for p in model.part_parameters(name).values()} == {torch.float32}
    assert result.nonfinite_steps == 0


def test_biases_do_not_decay(backbones: dict[str, str]) -> None:
    config = load_recipe("lavin-7b").stages[0]
    model = Lavin.from_parts(**backbones)
    stage = resolve_stage(model, config)
    model.set_stage(stage)
    assert set(stage.train.values()) == {1.125e-3}
    names = {id(p): name for name, p in model.named_parameters()}
    decays = {
        names[id(p)].rpartition(".")[2]: group["weight_decay"]
        for group in build_optimizer(model, stage, config).param_groups
        for p in group["params"]
    }
    assert decays == {
        "down_weight": 0.02,
        "down_bias": 0.0,
        "up_weight": 0.02,
        "up_bias": 0.0,
        "router_weight": 0.02,
        "router_bias": 0.0,
        "weight": 0.02,
        "bias": 0.0,
    }
