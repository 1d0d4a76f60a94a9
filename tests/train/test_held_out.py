"""The loss on held-out samples: what it is, that measuring it changes nothing, and which model it keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from mmfast.benchmarks.harness import peak_extra_bytes
from mmfast.evaluate.samples import open_samples
from mmfast.models import Llava, open_model
from mmfast.train import TrainConfig, loop, train
from mmfast.train.batches import batches_in_order
from mmfast.train.held_out import HeldOut, HeldOutResult, held_out_loss

MakeConfig = Callable[..., TrainConfig]


def lines(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the steps without their speed, and of the evaluations."""
    read = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in read if "loss" in line]
    return steps, [line for line in read if "eval_loss" in line]


def test_it_is_measured_and_the_best_is_kept_and_nothing_else_changes(
    make_config: MakeConfig, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(make_config(out=str(tmp_path / "plain")))
    found = iter([3.0, 2.0, 4.0, 2.5, float("nan"), 2.75])  # in the first stage once before its end; in the second
    states = []

    def told(model: Llava, *args: Any) -> HeldOutResult:
        held_out_loss(model, *args)
        states.append({name: tensor.clone() for name, tensor in model.trained_state().items()})
        return HeldOutResult(next(found), 0.5, 7)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", told)
        result = train(make_config(out=str(tmp_path / "run"), eval_data=data, eval_every=2))
    steps, measured = lines(result.out)
    assert steps == lines(plain.out)[0], "dropout and order are those of a run that measures nothing"
    assert [line["step"] for line in measured] == [2, 4, 6, 8, 10]
    assert [line["eval_loss"] for line in measured] == [3.0, 2.0, 4.0, 2.5, None]
    assert [line["best"] for line in measured] == [True, True, True, True, False], "a stage begins anew"
    assert [stage.best_step for stage in result.stages] == [4, 8]
    assert [stage.best_eval_loss for stage in result.stages] == [2.0, 2.5]
    assert [stage.eval_loss for stage in result.stages] == [2.0, None]
    best = open_model(result.out / "best")
    assert best.trained_state().keys() == states[3].keys()
    for name, tensor in best.trained_state().items():
        assert torch.equal(tensor, states[3][name]), name
    assert json.loads((result.out / "best" / "evaluation.json").read_text()) == {"step": 8, "eval_loss": 2.5}
    # Beside the last two checkpoints, which are later.
    names = sorted(path.name for path in (result.out / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000010"]


def test_it_can_be_measured_without_keeping_the_best(make_config: MakeConfig, data: str) -> None:
    result = train(make_config(eval_data=[data, data], keep_best=False))
    assert not (result.out / "best").exists()
    assert [line["step"] for line in lines(result.out)[1]] == [4, 10], "at the end of each stage"
    assert result.stages[1].eval_loss is not None
    assert result.stages[1].eval_loss < result.stages[0].eval_loss  # type: ignore[operator]


@pytest.mark.parametrize("micro_batch_size", [1, 7, 20])
def test_it_is_the_mean_over_all_supervised_tokens(micro_batch_size: int, make_config: MakeConfig, data: str) -> None:
    """Whatever the micro-batches; against the cross-entropy of the logits in float64."""
    config = make_config(eval_data=data)
    model = train(make_config(stages=config.stages[:1])).model.train()
    dataset = HeldOut(config).dataset(model.processor)  # type: ignore[arg-type]
    assert dataset is not None
    before = torch.get_rng_state()
    batches = batches_in_order(dataset, micro_batch_size)
    result = held_out_loss(model, batches, Accelerator(cpu=True), torch.float32)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    total, correct, count = 0.0, 0, 0
    model.eval()
    for batch in batches_in_order(dataset, 1):
        targets = batch.inputs["labels"][0, 1:]
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        correct += int((logits.argmax(-1) == targets).sum())
        count += int((targets != -100).sum())
    assert math.isclose(result.loss, total / count, rel_tol=1e-5)
    assert (result.token_accuracy, result.supervised_tokens) == (correct / count, count)


def test_memory_does_not_grow_with_the_samples(make_config: MakeConfig, data: str) -> None:
    model = train(make_config(stages=make_config().stages[:1])).model
    batches = list(batches_in_order(HeldOut(make_config(eval_data=data)).dataset(model.processor), 2))  # type: ignore[arg-type]
    accelerator = Accelerator(cpu=True)
    once, often = (
        peak_extra_bytes(lambda times=times: held_out_loss(model, batches * times, accelerator, torch.float32))  # type: ignore[misc]
        for times in (1, 4)
    )
    assert often == once


def test_a_bad_held_out_sample_is_named_before_anything_trains(
    make_config: MakeConfig, data: str, tmp_path: Path
) -> None:
    samples, _ = open_samples(data)
    broken = tmp_path / "held-out.json"
    records = [dict(sample) for sample in samples]
    broken.write_text(json.dumps(records[:6]))
    for path in Path(data).parent.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.png").write_bytes(b"no image")
    config = make_config(eval_data=str(broken))
    with pytest.raises(ValueError, match="sample-3"):
        train(config)
    assert (Path(config.out) / "log.jsonl").read_text() == ""


def test_the_best_stays_whole_on_a_full_disk(
    make_config: MakeConfig, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from disks import small_files

    config = make_config(eval_data=data, eval_every=1)
    losses = iter(range(20, 0, -1))
    save = Llava.save_trained
    saved: list[Path] = []

    def filling(model: Llava, folder: Path, state: Any) -> None:
        saved.append(folder)
        with small_files(10**9 if len(saved) < 3 else 100):
            save(model, folder, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "held_out_loss", lambda *args: HeldOutResult(next(losses), 0.5, 7))
        patch.setattr(Llava, "save_trained", filling)
        with pytest.raises(OSError, match=r"trained\.safetensors: it cannot be written: File too large"):
            train(config)
    best = Path(config.out) / "best"
    assert json.loads((best / "evaluation.json").read_text())["step"] == 2
    assert load_file(best / "trained.safetensors").keys() == open_model(best).trained_state().keys()
    assert not list(Path(config.out).rglob(".tmp*"))
