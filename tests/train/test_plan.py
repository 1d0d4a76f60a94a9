"""What a run is planned to take is what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.adapt import quantize_checkpoint
from mmfast.benchmarks.bench_plan import prepared, step_peak
from mmfast.train import TrainConfig, load_config, load_recipe, train
from mmfast.train import loop as loop_module
from mmfast.train.batches import MicroBatch, micro_batch
from mmfast.train.estimate import estimate
from mmfast.train.plan import PlanError, fit, parse_bytes, plan_stage
from mmfast.train.step import accumulate_gradients

GB = 10**9


def measured(config: TrainConfig, index: int, size: int, length: int, windows: int) -> int:
    """The peak of a step beyond weights and inputs."""
    model, stage = prepared(config, index)
    batches = [micro_batch(["a"] * size, model.example_inputs(size, length))] * windows
    return step_peak(config, model, stage, batches)


@pytest.mark.parametrize(
    ("recipe", "index", "changes"),
    [
        ("llava-world", 0, {}),
        ("llava-world", 1, {"recompute": "mlp"}),
        ("llava-world", 1, {"recompute": "full*2,none*2", "dtype": "bfloat16"}),
        ("llava-hd-world", 1, {"recompute": "product"}),
        ("minigpt4-world", 0, {}),
        ("minigpt-v2-world", 1, {"recompute": "full"}),
        ("video-chatgpt-world", 0, {"recompute": "full"}),
        ("llama-adapter-v1-world", 0, {"recompute": "full"}),
        ("llama-adapter-v2-world", 0, {}),
        ("lavin-world", 0, {"dtype": "bfloat16"}),
    ],
)
def test_peak_of_every_system(recipe: str, index: int, changes: dict[str, Any]) -> None:
    config = load_recipe(recipe)
    for name, value in changes.items():
        setattr(config, name, value)
    size, length, windows = 6, 90, 1 + index
    config.stages[index].batch_size = size * windows
    plan = plan_stage(config, index, micro_batch_size=size, length=length)
    batch = micro_batch([], prepared(config, index)[0].example_inputs(size, length))
    inputs = sum(tensor.nbytes for tensor in batch.inputs.values())
    # What an op allocates and frees inside is not seen: a matrix or two of one layer, which in a small model is much.
    assert plan.step.peak - inputs == pytest.approx(measured(config, index, size, length, windows), rel=0.05)


def test_weights_gradients_and_optimizer() -> None:
    config = load_recipe("llava-world")
    plan = plan_stage(config, 1)
    model, _ = prepared(config, 1)
    for part, held in plan.parts.items():
        parameters = list(model.part_parameters(part).values())
        buffers = list(model.language_model.buffers()) if part == "language_model" else []
        assert held["weights"] == sum(tensor.nbytes for tensor in (*parameters, *buffers))
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        assert (held["gradients"], held["optimizer"]) == (4 * trained, 8 * trained)


def test_a_fit_is_what_it_says_and_trains(make_config: Any, tmp_path: Path) -> None:
    config = make_config(max_length=200)
    roomy = [plan_stage(config, index) for index in range(2)]
    budget = int(0.7 * max(plan.total for plan in roomy))
    fitted, plans = fit(config, budget)
    assert all(plan.total <= budget for plan in plans)
    assert fitted.stages[0].batch_size == config.stages[0].batch_size
    assert [stage.recompute for stage in fitted.stages] == [plan.recompute for plan in plans]
    assert plan_stage(fitted, 1).total == plans[1].total
    train(fitted)


def test_a_fit_changes_nothing_where_all_fits(make_config: Any) -> None:
    config = make_config(max_length=200)
    fitted, plans = fit(config, GB)
    assert [plan.recompute for plan in plans] == ["none", "none"]
    assert [stage.micro_batch_size for stage in fitted.stages] == [4, 2]


def test_nothing_fits(make_config: Any) -> None:
    with pytest.raises(PlanError, match=r"nothing fits into 0.1 MB: stage .* takes .* at the least"):
        fit(make_config(max_length=200), 10**5)


def test_a_large_model_is_planned_without_memory() -> None:
    plan = plan_stage(load_recipe("llava-1.5-lora"), 0, micro_batch_size=1, length=700)
    assert plan.parts["language_model"]["weights"] == pytest.approx(13.48 * GB, rel=0.001)
    assert plan.parts["lora"]["optimizer"] == 8 * 319_815_680
    with pytest.raises(ValueError, match="a sample of 100 tokens has no room for a medium of 576"):
        plan_stage(load_recipe("llava-1.5-lora"), 0, length=100)


def test_a_quantised_base(make_config: Any, tmp_path: Path) -> None:
    config = make_config(max_length=200, base_dtype="int8")
    plan = plan_stage(config, 1)
    model, _ = prepared(config, 1)
    tensors = [*model.part_parameters("language_model").values(), *model.language_model.buffers()]
    assert plan.parts["language_model"]["weights"] == sum(tensor.nbytes for tensor in tensors)
    folder = tmp_path / "int8"
    quantize_checkpoint(config.llm, folder, format="int8")
    assert plan_stage(make_config(max_length=200, llm=str(folder)), 1).parts == plan.parts


def test_sizes_of_memories() -> None:
    assert (parse_bytes("24GB"), parse_bytes(" 1.5 gib "), parse_bytes("512MB")) == (24 * GB, 3 * 2**29, 512 * 10**6)
    for wrong in ("24GX", "GB", "-3GB", "0GB"):
        with pytest.raises(ValueError, match="is no size of a memory"):
            parse_bytes(wrong)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fitted.yaml"
    result = estimate("llava-world", gpu="200MB", fit=True, length=96, out=str(out))
    printed = capsys.readouterr().out
    assert "of 0.20 GB: it fits" in printed
    assert str(out) in printed
    assert result["memory"]["fits"]
    stages = load_config(out).stages
    assert [stage.micro_batch_size for stage in stages] == [s["micro_batch_size"] for s in result["memory"]["stages"]]
    estimate("llava-world", json=True, gpu="1MB", length=96, micro_batch_size=2)
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert not memory["fits"]
    assert memory["stages"][0]["micro_batch_size"] == 2
    with pytest.raises(ValueError, match="give its size: --gpu 24GB"):
        estimate("llava-world", fit=True)
    with pytest.raises(ValueError, match="add --fit"):
        estimate("llava-world", gpu="1GB", out=str(out))


# ---- memory in the loop


def test_the_longest_samples_come_first(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def note(model: Any, window: list[MicroBatch], *args: Any) -> Any:
        seen.append(max(batch.inputs["input_ids"].shape[1] for batch in window))
        return accumulate_gradients(model, window, *args)

    monkeypatch.setattr(loop_module, "accumulate_gradients", note)
    train(make_config(align={"max_steps": 5}))
    assert seen[0] == max(seen)
    assert len(seen) == 1 + 5 + 1 + 6


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_explained(make_config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(loop_module, "accumulate_gradients", fail)
    with pytest.raises(RuntimeError, match="out of memory in stage align") as raised:
        train(make_config(max_length=200))
    message = str(raised.value)
    assert "memory of stage align: micro_batch_size 4, 200 tokens a sample" in message
    assert message.count("more work") == 3


def test_other_errors_stay_what_they_are(make_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(loop_module, "accumulate_gradients", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train(make_config())


@pytest.mark.parametrize("value", ["half", "full*3", "full*x", 3])
def test_wrong_recompute(make_config: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="recompute"):
        train(make_config(recompute=value))
