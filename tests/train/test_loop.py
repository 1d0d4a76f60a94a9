"""Whole runs of a tiny model: what they write, what they refuse, what stops them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.models import Llava
from mmfast.train import StageConfig, TrainConfig, load_config, train
from mmfast.train.log import StepLog

MakeConfig = Callable[..., TrainConfig]


def lines(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def deterministic(out: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines(out)]


def test_a_run_writes_its_folder(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    seen = []
    result = train(config, after_stage=lambda model, stage: seen.append((model.training, stage.name)))
    assert seen == [(False, "align"), (False, "instruct_lora")]
    assert (result.steps, result.nonfinite_steps) == (10, 0)
    assert load_config(result.out / "config.yaml") == config
    log = lines(result.out)
    assert [line["step"] for line in log] == list(range(1, 11))
    assert [line["stage_step"] for line in log] == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log] == [0] * 8 + [1, 1]  # 20 samples in steps of 6: 4 to an epoch
    assert log[0]["lr_by_part"].keys() == {"connector"}
    assert log[5]["lr_by_part"] == {"connector": 1e-3, "lora": 1e-2}
    assert log[5]["lr"] == 1e-2
    for line in log:
        assert line["loss"] > 0
        assert line["supervised_tokens"] > 0
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
        assert 0 <= line["token_accuracy"] <= 1
    for stage in result.stages:
        assert stage.seconds > 0
        assert stage.peak_memory_mb > 50
    assert result.stages[-1].loss == log[-1]["loss"] < log[4]["loss"]
    printed = capsys.readouterr().out
    assert result.model.parameter_table() in printed
    assert "instruct_lora: step 6/6, loss" in printed  # no terminal here: a plain line instead of a bar
    loaded = Llava.from_pretrained(result.out)
    expected = result.model.trained_state()
    assert loaded.trained_state().keys() == expected.keys()
    for name, tensor in loaded.trained_state().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.processor is not None
    assert loaded.processor.template.name == "vicuna_v1"


def test_the_same_seed_gives_the_same_run(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = {name: str(tmp_path / name) for name in ("a", "workers", "other")}
    train(make_config(out=runs["a"]))
    torch.rand(5)
    train(make_config(out=runs["workers"], num_workers=2, save_every=3))
    train(make_config(out=runs["other"], seed=1))
    assert deterministic(runs["a"]) == deterministic(runs["workers"])
    assert deterministic(runs["a"]) != deterministic(runs["other"])


@pytest.mark.parametrize("done", [1, 3, 4, 7])
def test_a_run_continues_from_any_step(
    done: int, make_config: MakeConfig, tmp_path: Path, train_until_crash: Callable[[TrainConfig, int], None]
) -> None:
    """As after a crash in step `done` + 1, before its line was written; 4 is where the first stage ends."""
    whole = train(make_config(out=str(tmp_path / "whole")))
    config = make_config(out=str(tmp_path / "broken"), save_every=1)
    train_until_crash(config, done)
    assert len(lines(config.out)) == done
    torch.rand(7)
    result = train(config, resume=True)
    assert deterministic(config.out) == deterministic(whole.out)
    saved = [load_file(run / "model" / "trained.safetensors") for run in (whole.out, result.out)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][name]), name
    assert [stage.name for stage in result.stages] == ["align", "instruct_lora"]


def test_a_finished_run_resumes_to_the_same_model(make_config: MakeConfig) -> None:
    config = make_config()
    first = train(config)
    before = (first.out / "log.jsonl").read_text()
    again = train(config, resume=True)
    assert (again.out / "log.jsonl").read_text() == before
    assert again.steps == first.steps
    for name, tensor in again.model.trained_state().items():
        assert torch.equal(tensor, first.model.trained_state()[name])


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    with StepLog(path, done=2) as log:
        log.write({"step": 3, "new": True})
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "new": True}]


def test_refusals(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    with pytest.raises(FileNotFoundError, match=r"no run to resume.*without --resume"):
        train(config, resume=True)
    train(config)
    with pytest.raises(FileExistsError, match=r"holds a run already .*--resume, or choose another --out"):
        train(config)
    with pytest.raises(ValueError, match=r"seed is 5, but the run in .*config\.yaml was started with 0"):
        train(make_config(seed=5), resume=True)
    for checkpoint in (Path(config.out) / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        train(config, resume=True)
    out = str(tmp_path / "other")
    for bad, message in [
        (make_config(out=out, stages=[StageConfig("warp")]), r"'warp'; the model has align"),
        (make_config(out=out, align={"lr": {"lora": 1.0}}), r"'lora', which does not train in stage align"),
        (make_config(out=out, align={"lora_rank": 2}), r"lora_rank is set, but stage align has no LoRA"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(bad)
    assert not Path(out).exists()


def test_a_mistake_in_the_data_does_not_block_the_folder(make_config: MakeConfig) -> None:
    with pytest.raises(FileNotFoundError):
        train(make_config(data="missing.json"))
    train(make_config())


def test_a_stage_starts_from_another_runs_connector(make_config: MakeConfig, tmp_path: Path) -> None:
    stages = make_config().stages
    first = train(make_config(stages=stages[:1], out=str(tmp_path / "first")))
    config = make_config(stages=stages[1:], out=str(tmp_path / "second"), start_from=str(first.out))
    config.stages[0].lr["connector"] = 0.0
    second = train(config)
    for name, tensor in first.model.trained_state().items():
        assert torch.equal(second.model.trained_state()[name], tensor)
    third = make_config(stages=stages[:1], out=str(tmp_path / "third"), start_from=str(second.out))
    with pytest.raises(ValueError, match=r"also trained lora; a run that left the language model as it was"):
        train(third)


def test_a_nonfinite_step_is_skipped_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = Llava.forward
    calls = []

    def poisoned(model: Llava, **inputs: Any) -> Any:
        output = forward(model, **inputs)
        calls.append(1)
        # The longest samples come first. Steps have 3, 3, 3, 1 (the epoch's end), 3 and 3 micro-batches: this is the
        # second one of the fifth step.
        if len(calls) == 13:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(Llava, "forward", poisoned)
    stages = make_config().stages[1:]
    stepped_after = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (stepped_after.append(len(calls)), step(self))[1])
    result = train(make_config(stages=stages))
    assert result.nonfinite_steps == 1
    assert stepped_after == [4, 7, 10, 11, 17], "the optimiser steps after every window but the poisoned one"
    log = lines(result.out)
    assert [line["skipped"] for line in log] == [False, False, False, False, True, False]
    assert log[4]["loss"] is None
    printed = capsys.readouterr().out
    assert "the loss was not finite in step 5, samples sample-" in printed
    assert printed.count("look at these samples or lower the learning rate") == 1, "the first one advises"
    assert "train: every tensor that trains has a gradient (connector 4, lora 28)" in printed
    for name, tensor in result.model.trained_state().items():
        assert torch.isfinite(tensor).all(), name


def test_too_many_nonfinite_steps_stop_with_the_sample_ids(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Llava.forward

    def poisoned(model: Llava, **inputs: Any) -> Any:
        output = forward(model, **inputs)
        output.loss = output.loss * float("inf")
        return output

    monkeypatch.setattr(Llava, "forward", poisoned)
    with pytest.raises(RuntimeError, match=r"step 3, samples sample-\d+.*max_nonfinite_steps = 2"):
        train(make_config(max_nonfinite_steps=2))
    config = make_config(max_nonfinite_steps=0, dtype="bfloat16", out=make_config().out + "-bfloat16")
    with pytest.raises(
        RuntimeError, match=r"step 1, .*dtype float32 in place of bfloat16 tells whether it is the prec"
    ):
        train(config)


def test_a_part_without_gradient_stops_the_first_step(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Llava.media_features
    monkeypatch.setattr(Llava, "media_features", lambda model, **media: features(model, **media).detach())
    with pytest.raises(RuntimeError, match=r"stage instruct_lora.*connector: 4 tensors have no gradient"):
        train(make_config(stages=make_config().stages[1:]))


def test_text_alone_trains_what_it_can(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"id": str(index), "messages": turns} for index in range(4)]))
    result = train(make_config(data=str(data)))
    assert "stage align had no step with samples of media: not all of its parts have trained" in capsys.readouterr().out
    assert result.stages[1].loss is not None
    assert result.nonfinite_steps == 0


def test_a_sample_without_supervised_tokens_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "long " * 40}, {"role": "assistant", "content": "cut off"}]
    data = tmp_path / "long.json"
    data.write_text(json.dumps([{"id": "too-long", "messages": turns}]))
    with pytest.raises(ValueError, match=r"1 of 1 samples \('too-long'\): each has no supervised token"):
        train(make_config(data=str(data), max_length=100))


def test_bfloat16_keeps_what_trains_in_float32(make_config: MakeConfig) -> None:
    result = train(make_config(dtype="bfloat16", recompute="full"))
    model = result.model
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.trained_state().values()} == {torch.float32}
    log = lines(result.out)
    assert log[-1]["loss"] < log[4]["loss"]


def test_the_language_model_trains_whole(make_config: MakeConfig, tmp_path: Path) -> None:
    stage = StageConfig("instruct", batch_size=5, max_steps=3, lr={"connector": 1e-3, "language_model": 1e-3})
    config = make_config(stages=[stage], save_every=1)
    before = train(config)
    assert any(name.startswith("language_model.") for name in before.model.trained_state())
    again = train(config, resume=True)
    for name, tensor in again.model.trained_state().items():
        assert torch.equal(tensor, before.model.trained_state()[name])
