"""Training with cached features of the frozen parts: the same losses, in one process and two, interrupted and not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfast.models.base import MultimodalModel
from mmfast.train import StageConfig, TrainConfig, train
from mmfast.train.setup import build_model

MakeConfig = Callable[..., TrainConfig]


def losses(config: TrainConfig) -> list[tuple[float, float]]:
    lines = map(json.loads, (Path(config.out) / "log.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_losses_are_the_same(
    make_config: MakeConfig, tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # One sample at a time: a CPU's products may depend, in their last bits, on how many rows there are.
    one: dict[str, Any] = {"micro_batch_size": 1}
    plain, cached = (
        make_config(one, one, out=str(tmp_path / name), dtype=dtype, feature_cache=folder)
        for name, folder in (("plain", None), ("cached", str(tmp_path / "cache")))
    )
    train(plain)
    train(cached)
    assert losses(cached) == losses(plain)
    written = capsys.readouterr().out
    assert f"feature cache {tmp_path / 'cache'}: 13 media encoded" in written
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 16


def test_the_embedded_world_is_cached_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageConfig("align", batch_size=2, micro_batch_size=1, max_steps=2)
    fields: dict[str, Any] = {"llm": "world", "encoder": "world", "data": "world:captions-train", "stages": [stage]}
    plain = TrainConfig(out=str(tmp_path / "plain"), **fields)
    cached, again = (
        TrainConfig(out=str(tmp_path / name), feature_cache=str(tmp_path / "cache"), num_workers=workers, **fields)
        for name, workers in (("cached", 1), ("again", 0))
    )
    train(plain)
    train(cached)
    monkeypatch.setattr(MultimodalModel, "frozen_features", None)
    train(again)
    assert losses(again) == losses(cached) == losses(plain)


def test_a_signal_ends_the_filling_at_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(feature_cache="cache")

    def interrupt(*_: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(MultimodalModel, "fill_feature_cache", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def test_a_system_without_one_says_why(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="feature_cache is set, but the system lavin has none, since adapters train"):
        build_model(make_config(system="lavin", feature_cache="cache"))
