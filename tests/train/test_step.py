"""The gradient of a window: the same however it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mmfast.data import BatchPlan, EncodedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.train import TrainConfig
from mmfast.train.batches import training_windows
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_processor
from mmfast.train.step import accumulate_gradients, build_optimizer, check_gradients, clip_gradients

MakeConfig = Callable[..., TrainConfig]
FP32 = torch.float32


def prepared(config: TrainConfig, stage_index: int = 1) -> tuple[Any, Any, EncodedDataset]:
    torch.manual_seed(0)
    model = build_model(config)
    stages = [resolve_stage(model, stage) for stage in config.stages]
    enter_stage(model, stages[stage_index], torch.device("cpu"))
    set_processor(model, stages[stage_index], config.stages[stage_index], config.max_length)
    samples, folder = open_samples(config.data or "")
    assert model.processor is not None
    return model.train(), stages[stage_index], EncodedDataset(samples, model.processor, folder)


def window(dataset: EncodedDataset, batch_size: int, micro_batch_size: int) -> Any:
    return next(training_windows(dataset, BatchPlan(len(dataset), batch_size, 5), range(9), micro_batch_size))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulation_does_not_change_the_step(micro: int, make_config: MakeConfig) -> None:
    results = []
    for size in (8, micro):
        config = make_config(lora={"lora_dropout": 0.0})
        model, stage, dataset = prepared(config)
        for parameter in model.part_parameters("lora").values():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        micro_batches = window(dataset, 8, size)
        counts = [int((batch.inputs["labels"][:, 1:] != -100).sum()) for batch in micro_batches]
        optimizer = build_optimizer(model, stage, config.stages[1])
        result = accumulate_gradients(model, micro_batches, Accelerator(cpu=True), FP32)
        grads = gradients(model)
        optimizer.step()
        results.append((counts, result, grads, {n: p.detach() for n, p in model.named_parameters()}))
    (_, whole, whole_grads, whole_parameters), (counts, parts, part_grads, part_parameters) = results
    assert max(counts) > 2 * min(counts), "the samples must differ in length for this test to say something"
    assert parts.supervised_tokens == whole.supervised_tokens == sum(counts)
    assert parts.correct_tokens == whole.correct_tokens
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert whole_grads.keys() == part_grads.keys()
    for name, expected in whole_grads.items():
        assert (part_grads[name] - expected).norm() <= 1e-5 * expected.norm(), name
    for name, expected in whole_parameters.items():
        assert (part_parameters[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_the_loss_is_the_mean_over_supervised_tokens(make_config: MakeConfig) -> None:
    model, _, dataset = prepared(make_config(lora={"lora_dropout": 0.0}))
    micro_batches = window(dataset, 6, 2)
    result = accumulate_gradients(model, micro_batches, Accelerator(cpu=True), FP32)
    losses, correct = [], 0
    for batch in micro_batches:
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.inputs.items() if k != "labels"}).logits[:, :-1]
        labels = batch.inputs["labels"][:, 1:]
        kept = labels != -100
        losses.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none"))
        correct += int((logits[kept].argmax(-1) == labels[kept]).sum())
    assert result.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert result.correct_tokens == correct
    assert result.media == sum(len(batch.inputs.get("pixel_values", [])) for batch in micro_batches)


def test_weight_decay_acts_on_matrices_only(make_config: MakeConfig) -> None:
    config = make_config(lora={"weight_decay": 0.1})
    model, stage, _ = prepared(config)
    optimizer = build_optimizer(model, stage, config.stages[1])
    trained = [p for p in model.parameters() if p.requires_grad]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in trained}
    assert len(grouped) == len(trained)
    for group in optimizer.param_groups:
        assert group["lr"] == stage.train[group["name"]]
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("max_norm", [0.0, 1e-3, 1e6])
def test_clip_gradients_returns_the_norm_before(max_norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full((4,), 3.0)
    before = 3.0 * 8**0.5
    assert clip_gradients(parameters, max_norm).item() == pytest.approx(before)
    after = torch.cat([p.grad for p in parameters if p.grad is not None]).norm().item()
    assert after == pytest.approx(min(before, max_norm) if max_norm else before, rel=1e-3)


def test_check_gradients_excepts_lora_a_alone(make_config: MakeConfig) -> None:
    model, stage, dataset = prepared(make_config())
    batches = window(dataset, 8, 8)
    accumulate_gradients(model, batches, Accelerator(cpu=True), FP32)
    lora = model.part_parameters("lora")
    assert all(not p.grad.any() for name, p in lora.items() if name.endswith("lora_a"))
    check_gradients(model, stage, batches)
    name = next(name for name in lora if name.endswith("lora_b"))
    lora[name].grad.zero_()
    with pytest.raises(RuntimeError, match=rf"lora: 1 tensors have a gradient of zeros \({name}\)"):
        check_gradients(model, stage, batches)
    for parameter in model.part_parameters("connector").values():
        parameter.grad = None
    with pytest.raises(RuntimeError, match=r"connector: 4 tensors have no gradient \(connector\..*sample-"):
        check_gradients(model, stage, batches)


def test_windows_do_not_depend_on_workers_or_where_they_start(make_config: MakeConfig) -> None:
    _, _, dataset = prepared(make_config())
    plan = BatchPlan(len(dataset), 8, 5)  # 20 samples: 8, 8, 4

    def windows(start: int, workers: int = 0, **process: int) -> list[list[list[str]]]:
        made = training_windows(dataset, plan, range(start, 7), 3, workers, **process)
        return [[batch.ids for batch in window] for window in made]

    state = torch.get_rng_state()
    expected = windows(0)
    assert torch.equal(torch.get_rng_state(), state), "dropout's generator must not be touched"
    assert [[len(ids) for ids in window] for window in expected[:3]] == [[3, 3, 2], [3, 3, 2], [3, 1]]
    assert windows(0, workers=2) == expected
    assert windows(4) == expected[4:]
    shares = [windows(0, rank=rank, world_size=3) for rank in range(3)]
    for step, window_ids in enumerate(expected):
        together = [sample for share in shares for ids in share[step] for sample in ids]
        assert sorted(together) == sorted(sample for ids in window_ids for sample in ids)
