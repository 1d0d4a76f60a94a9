"""Training on packed rows: the steps of padded batches, bit for bit resumable."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.data import BatchPlan, EncodedDataset, JoinedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.train import TrainConfig, TrainingInterrupted, train
from mmfast.train.batches import MicroBatch, make_micro_batches, training_windows
from mmfast.train.log import StepLog
from mmfast.train.setup import build_model

MakeConfig = Callable[..., TrainConfig]


def trained(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model" / "trained.safetensors")


def lines(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def dataset_of(config: TrainConfig) -> EncodedDataset:
    samples, folder = open_samples(config.data)  # type: ignore[arg-type]
    return EncodedDataset(samples, build_model(config).processor, folder)  # type: ignore[arg-type]


def test_a_packed_run_is_the_padded_run(make_config: MakeConfig, tmp_path: Path) -> None:
    runs = [
        make_config(lora={"lora_dropout": 0.0}, packing=packing, out=str(tmp_path / f"{packing}"))
        for packing in (False, True)
    ]
    for config in runs:
        train(config)
    padded, packed = map(lines, runs)
    assert len(padded) == len(packed) == 10
    for line, expected in zip(packed, padded, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["supervised_tokens"] == expected["supervised_tokens"]
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_interrupted_it_continues_bit_for_bit(make_config: MakeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """With LoRA's dropout, accumulation, recomputation, bfloat16 and another number of workers."""
    fields = {"packing": True, "recompute": "full", "dtype": "bfloat16"}
    whole = make_config(out=str(tmp_path / "whole"), **fields)
    stopped = make_config(out=str(tmp_path / "stopped"), num_workers=1, **fields)
    train(whole)
    write = StepLog.write

    def interrupt(log: StepLog, line: dict[str, Any]) -> None:
        write(log, line)
        if line["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", interrupt)
        with pytest.raises(TrainingInterrupted):
            train(stopped)
    train(stopped, resume=True)
    assert [line["loss"] for line in lines(stopped)] == [line["loss"] for line in lines(whole)]
    state = trained(stopped)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained(whole).items())


def test_rows_of_one_kind(make_config: MakeConfig) -> None:
    dataset = dataset_of(make_config())
    plan = BatchPlan(len(dataset), 8, 5)
    split, whole = (
        next(training_windows(dataset, plan, range(9), 4, split_kinds=kinds, packing=True)) for kinds in (True, False)
    )
    assert {batch.kind for batch in split} == {"media", "text"}
    assert sum(batch.tokens for batch in split) == sum(batch.tokens for batch in whole)
    for batch in split:
        assert ("pixel_values" in batch.inputs) == (batch.kind == "media")
        assert batch.inputs["sample_lengths"].sum() == batch.tokens == batch.inputs["input_ids"].numel()
        assert len(batch.ids) == len(batch.inputs["sample_lengths"])
    (text,) = make_micro_batches(dataset, [0, 5], packing=True)
    assert text.kind == "text" and text.inputs["sample_lengths"].shape == (2,)


def test_a_system_whose_images_belong_to_rows_is_refused_before_it_is_loaded(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="samples of the system llama_adapter cannot share a row"):
        train(make_config(system="llama_adapter", llm="/nowhere", packing=True))
    with pytest.raises(ValueError, match="config: packing is 'yes'; true or false is accepted"):
        make_config(packing="yes")


def test_grouped_by_length_a_step_has_the_same_samples_and_less_padding(make_config: MakeConfig) -> None:
    dataset = dataset_of(make_config())
    plan = BatchPlan(len(dataset), 8, 5)  # 20 samples: 8, 8, 4

    def windows(grouped: bool, start: int = 0, **options: Any) -> list[list[MicroBatch]]:
        return list(training_windows(dataset, plan, range(start, 6), 2, group_by_length=grouped, **options))

    plain, grouped = windows(False), windows(True)
    for one, other in zip(plain, grouped, strict=True):
        assert sorted(name for batch in one for name in batch.ids) == sorted(n for batch in other for n in batch.ids)
        keys = [
            (int(name.rpartition("-")[2]) % 5 > 0, length)  # whether it has an image, see the fixture
            for batch in other
            for name, length in zip(batch.ids, batch.inputs["sample_lengths"].tolist(), strict=True)
        ]
        assert keys == sorted(keys)
        assert sum(batch.kind == "media" for batch in one) >= sum(batch.kind == "media" for batch in other)

    def padding(made: list[list[MicroBatch]]) -> int:
        return sum(batch.inputs["input_ids"].numel() - batch.tokens for window in made for batch in window)

    assert padding(grouped) < padding(plain)
    whole = BatchPlan(len(dataset), 20, 5)
    small, large = (
        padding(list(training_windows(dataset, whole, range(1), 2, group_by_length=grouped)))
        for grouped in (True, False)
    )
    assert small < 0.5 * large

    def ids(made: list[list[MicroBatch]]) -> list[list[list[str]]]:
        return [[batch.ids for batch in window] for window in made]

    assert ids(windows(True, num_workers=2)) == ids(grouped)
    assert ids(windows(True, start=3)) == ids(grouped)[3:]
    ranks = [windows(True, rank=rank, world_size=2) for rank in (0, 1)]
    for window, *shares in zip(grouped, *ranks, strict=True):
        assert sorted(n for batch in window for n in batch.ids) == sorted(
            n for share in shares for batch in share for n in batch.ids
        )


def test_a_grouped_run_is_the_plain_run(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for grouped in (False, True):
        config = make_config(lora={"lora_dropout": 0.0}, group_by_length=grouped, out=str(tmp_path / str(grouped)))
        train(config)
        losses.append([line["loss"] for line in lines(config)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_size_of_a_bad_sample_is_asked_in_peace(make_config: MakeConfig) -> None:
    dataset = dataset_of(make_config())
    joined = JoinedDataset([dataset, EncodedDataset([{}, {"messages": 3}], dataset.processor)])  # type: ignore[list-item, typeddict-item]
    assert [joined.rough_size(index) for index in (20, 21)] == [(False, 0)] * 2
    sizes = [joined.rough_size(index) for index in range(20)]
    assert sizes == [dataset.rough_size(index) for index in range(20)]
    assert [has_media for has_media, _ in sizes] == [index % 5 > 0 for index in range(20)]
