"""Stages with routes: samples with media and of text alone train different parts, in one run and in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mmfast.data import BatchPlan, EncodedDataset, JoinedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.models import open_model
from mmfast.train import StageConfig, TrainConfig, TrainingInterrupted, train
from mmfast.train.batches import training_windows
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_processor
from mmfast.train.step import accumulate_gradients, build_optimizer, check_gradients, clip_groups

FP32 = torch.float32
OPTIONS = {"version": "v2", "visual_width": 16, "visual_depth": 1, "visual_heads": 2, "prompt_length": 3}


@pytest.fixture
def config(backbones: dict[str, str], data: str, tmp_path: Path) -> TrainConfig:
    rates = {"connector": 1e-2, "visual_gates": 1e-1, "prompts": 1e-2, "gates": 1e-1, "norms": 1e-3, "bias_scale": 1e-3}
    stage = StageConfig("joint", lr=rates, batch_size=8, micro_batch_size=3, max_steps=4, template="vicuna_v1")
    options = {**OPTIONS, "visual_length": 2}
    return TrainConfig(
        system="llama_adapter", data=data, out=str(tmp_path / "run"), stages=[stage], options=options, **backbones
    )


def prepared(config: TrainConfig) -> tuple[Any, Any, EncodedDataset]:
    torch.manual_seed(0)
    model: Any = build_model(config)
    stage = resolve_stage(model, config.stages[0])
    enter_stage(model, stage, torch.device("cpu"))
    set_processor(model, stage, config.stages[0], config.max_length)
    with torch.no_grad():  # open, so that everything has a gradient
        for part in ("gates", "visual_gates"):
            for gate in model.part_parameters(part).values():
                gate.add_(0.5)
    samples, folder = open_samples(str(config.data))
    return model.train(), stage, EncodedDataset(samples, model.processor, folder)


def window(dataset: EncodedDataset, micro: int, split: bool = True) -> Any:
    return next(training_windows(dataset, BatchPlan(len(dataset), 10, 5), range(9), micro, split_kinds=split))


def gradients(model: Any, batches: Any, stage: Any = None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    accumulate_gradients(model, batches, Accelerator(cpu=True), FP32, stage)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [10, 3])
def test_each_part_has_the_gradient_of_its_own_samples_alone(config: TrainConfig, micro: int) -> None:
    model, stage, dataset = prepared(config)
    batches = window(dataset, micro)
    kinds = {kind: [batch for batch in batches if batch.kind == kind] for kind in ("media", "text")}
    assert all(kinds.values())
    assert sorted(i for b in batches for i in b.ids) == sorted(i for b in window(dataset, micro, False) for i in b.ids)
    mixed = gradients(model, batches, stage)
    found = set()
    for kind, own in kinds.items():
        alone = gradients(model, own)  # of everything that trains: without routes
        for part in stage.routes[kind]:
            for name in model.part_parameters(part):
                assert mixed[name].any(), name
                assert torch.equal(mixed[name], alone[name]), name
                found.add(name)
    assert found == mixed.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_step_of_one_kind_leaves_the_other_parts_as_they_are(config: TrainConfig) -> None:
    model, stage, dataset = prepared(config)
    optimizer = build_optimizer(model, stage, config.stages[0])
    for kind, other in (("media", "text"), ("text", "media")):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients(model, [batch for batch in window(dataset, 3) if batch.kind == kind], stage)
        optimizer.step()
        for name, parameter in model.named_parameters():
            part = next(part for part in model.parts if name in model.part_parameters(part))
            assert torch.equal(parameter, before[name]) == (part not in stage.routes[kind]), name
            assert parameter.requires_grad == (part in stage.train)
        assert set(stage.routes[other]).isdisjoint(stage.routes[kind])


def test_the_loss_is_over_all_samples_and_norms_are_clipped_by_kind(config: TrainConfig) -> None:
    model, stage, dataset = prepared(config)
    routed = accumulate_gradients(model, window(dataset, 3), Accelerator(cpu=True), FP32, stage)
    plain = accumulate_gradients(model, window(dataset, 10, False), Accelerator(cpu=True), FP32)
    assert routed.loss == pytest.approx(plain.loss, rel=1e-5)
    assert routed.supervised_tokens == plain.supervised_tokens
    assert routed.kinds == {"media", "text"} and plain.kinds == {"media"}
    groups = [{id(p) for p in group} for group in clip_groups(model, stage)]
    for kind, group in zip(("media", "text"), groups, strict=True):
        assert group == {id(p) for part in stage.routes[kind] for p in model.part_parameters(part).values()}


def test_what_is_behind_closed_gates_may_have_no_gradient_at_first(config: TrainConfig) -> None:
    model, stage, dataset = prepared(config)
    gates = [g for part in ("gates", "visual_gates") for g in model.part_parameters(part).values()]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    batches = window(dataset, 3)
    found = gradients(model, batches, stage)
    assert not any(found[name].any() for part in ("prompts", "connector") for name in model.part_parameters(part))
    check_gradients(model, stage, batches)
    gates[0].grad.zero_()
    with pytest.raises(RuntimeError, match="gates: 1 tensors have a gradient of zeros"):
        check_gradients(model, stage, batches)


def test_a_run_and_its_resume(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config)
    config.out = str(tmp_path / "cut")
    from mmfast.train import loop

    stopped = loop._stop_requested
    monkeypatch.setattr(loop, "_stop_requested", lambda run: "SIGTERM" if run.progress.step == 2 else stopped(run))
    with pytest.raises(TrainingInterrupted):
        train(config)
    monkeypatch.undo()
    again = train(config, resume=True)
    expected = whole.model.trained_state()
    assert all(torch.equal(expected[name], tensor) for name, tensor in again.model.trained_state().items())
    opened = open_model(tmp_path / "cut")
    assert opened.trained_parts == set(config.stages[0].lr)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["lr_by_part"].keys() == config.stages[0].lr.keys()


def test_several_sources_are_joined(config: TrainConfig, data: str, tmp_path: Path) -> None:
    records = [{"instruction": "say it", "input": "seven", "output": "seven"} for _ in range(5)]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    config.data = [data, str(tmp_path / "alpaca.json")]
    config.stages[0].max_steps, config.stages[0].epochs = None, 1.0
    assert train(config).steps == 4  # 25 samples, 8 in a step
    model, _, first = prepared(TrainConfig(**{**vars(config), "data": data}))
    samples, folder = open_samples(str(tmp_path / "alpaca.json"))
    joined = JoinedDataset([first, EncodedDataset(samples, model.processor, folder)])
    assert len(joined) == 25 and joined[20].id == "alpaca-0" and joined.processor is model.processor


def test_a_stage_that_never_sees_a_kind_says_so(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.json").write_text(json.dumps([{"instruction": "say it", "output": "it"}] * 4))
    config.data = str(tmp_path / "text.json")
    train(config)
    assert "had no step with samples of media and text: not all of its parts have trained" in capsys.readouterr().out
