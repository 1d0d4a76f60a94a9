"""Training Video-ChatGPT: on files, with and without the cache of features, interrupted and resumed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmfast.evaluate import evaluate_run
from mmfast.generate import chat
from mmfast.train import StageConfig, TrainConfig, TrainingInterrupted, train
from mmfast.train.log import StepLog

MakeVideoConfig = Callable[..., TrainConfig]


@pytest.fixture
def make_config(backbones: dict[str, str], tmp_path: Path) -> MakeVideoConfig:
    """Ten questions about five animated pictures of one to five frames."""
    pytest.importorskip("av")
    for video in range(5):
        frames = [Image.new("RGB", (12, 8), (40 * video, 50 * index, 9)) for index in range(video + 1)]
        frames[0].save(tmp_path / f"v_{video}.gif", save_all=True, append_images=frames[1:])
    records = [{"q": f"say {index}", "a": str(index), "video_id": f"v_{index % 5}"} for index in range(10)]
    (tmp_path / "instruct.json").write_text(json.dumps(records))

    def make(name: str, **fields: Any) -> TrainConfig:
        stage = StageConfig("instruct", batch_size=4, max_steps=5, lr={"connector": 1e-2, "markers": 1e-2})
        values = {"system": "video_chatgpt", "data": str(tmp_path / "instruct.json"), "stages": [stage], **backbones}
        options = {"num_frames": 3}
        return TrainConfig(**{**values, "options": options, "out": str(tmp_path / name), "save_every": 2, **fields})

    return make


def trained(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model" / "trained.safetensors")


def test_interrupted_it_continues_bit_for_bit(make_config: MakeVideoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = make_config("whole"), make_config("stopped", num_workers=1)
    train(whole)
    write = StepLog.write

    def stop_after_three(log: StepLog, line: dict[str, Any]) -> None:
        write(log, line)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", stop_after_three)
        with pytest.raises(TrainingInterrupted, match="after step 3"):
            train(stopped)
    assert train(stopped, resume=True).steps == 5
    state = trained(stopped)
    assert state.keys() == {"connector.weight", "connector.bias", "markers.weight"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained(whole).items())


def test_the_cache_changes_nothing(make_config: MakeVideoConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cache = str(tmp_path / "cache")
    plain = make_config("plain")
    cached, again = (make_config(name, feature_cache=cache) for name in ("cached", "again"))
    for config in (plain, cached):
        train(config)
    assert f"feature cache {cache}: 5 media encoded" in capsys.readouterr().out
    train(again)
    assert f"feature cache {cache}: 0 media encoded" in capsys.readouterr().out
    for name, tensor in trained(plain).items():
        assert torch.allclose(trained(cached)[name], tensor, atol=1e-5)
        assert torch.equal(trained(again)[name], trained(cached)[name])


def test_evaluate_and_chat(make_config: MakeVideoConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = make_config("run")
    train(config)
    result = evaluate_run(config.out, data=config.data or "")
    assert result["with_images"]["n"] == 10
    capsys.readouterr()
    chat(config.out, video=str(tmp_path / "v_3.gif"), prompt="say 3", max_new_tokens=3)
    assert capsys.readouterr().out.strip()
