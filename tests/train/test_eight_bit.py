"""Moments in 8 bits: near AdamW, small in memory and on the disk, and resumed bit for bit."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmfast.train import StageConfig, TrainConfig, TrainingInterrupted, train
from mmfast.train.checkpoint import load_optimizer_state, optimizer_state
from mmfast.train.log import StepLog
from mmfast.train.loop import check_optimizer

pytest.importorskip("bitsandbytes", minversion="0.50")

MakeConfig = Callable[..., TrainConfig]
BLOCKWISE = {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}


def make(optimizer: str, seed: int = 0) -> tuple[Any, dict[nn.Parameter, str]]:
    from mmfast.train.eight_bit import AdamW8bit

    torch.manual_seed(seed)
    parameters = {"large": nn.Parameter(torch.randn(64, 96)), "small": nn.Parameter(torch.randn(10))}
    groups = [
        {"params": [parameters["large"]], "weight_decay": 0.1},
        {"params": [parameters["small"]], "weight_decay": 0.0},
    ]
    kind: Any = AdamW8bit if optimizer == "adamw_8bit" else torch.optim.AdamW
    options = {} if optimizer == "adamw_8bit" else {"fused": True}
    return kind(groups, lr=1e-2, betas=(0.9, 0.95), **options), {p: name for name, p in parameters.items()}


def step(optimizer: Any, names: dict[nn.Parameter, str], steps: range) -> dict[str, torch.Tensor]:
    for index in steps:
        generator = torch.Generator().manual_seed(index)
        for parameter in names:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach().clone() for parameter, name in names.items()}


def test_it_is_near_adamw_in_a_third_of_the_memory() -> None:
    (reduced, names), (exact, exact_names) = make("adamw_8bit"), make("adamw")
    start = step(*make("adamw"), range(0))
    found, expected = step(reduced, names, range(20)), step(exact, exact_names, range(20))
    assert torch.equal(found["small"], expected["small"])
    moved = (expected["large"] - start["large"]).norm()
    assert 0 < (found["large"] - expected["large"]).norm() < 0.02 * moved
    large = next(parameter for parameter, name in names.items() if name == "large")
    assert reduced.state[large].keys() == BLOCKWISE
    kept = sum(value.nbytes for value in reduced.state[large].values() if isinstance(value, torch.Tensor))
    assert kept < 8 * large.numel() / 2.5


def test_its_state_is_kept_and_put_back_bit_for_bit() -> None:
    optimizer, names = make("adamw_8bit")
    halfway = step(optimizer, names, range(4))
    state = {name: value.clone() for name, value in optimizer_state(optimizer, names).items()}
    expected = step(optimizer, names, range(4, 9))
    again, new_names = make("adamw_8bit", seed=1)
    for parameter, name in new_names.items():
        parameter.data.copy_(halfway[name])
    load_optimizer_state(again, new_names, state)
    found = step(again, new_names, range(4, 9))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    ends = optimizer_state(optimizer, names), optimizer_state(again, new_names)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_an_interrupted_run_continues_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of this rank each matrix of LoRA has 4096 elements and more; the connector's have fewer.
    whole, stopped = (
        make_config(None, {"lora_rank": 128}, out=str(tmp_path / name), optimizer="adamw_8bit")
        for name in ("whole", "stopped")
    )
    train(whole)
    write = StepLog.write

    def stop_after_seven(log: StepLog, line: dict[str, Any]) -> None:
        write(log, line)
        if line["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", stop_after_seven)
        with pytest.raises(TrainingInterrupted, match="after step 7"):
            train(stopped)
    (checkpoint,) = (tmp_path / "stopped" / "checkpoints").glob("step-*7")
    saved = load_file(checkpoint / "optimizer.safetensors")
    assert {name.partition("/")[0] for name in saved if name.endswith("q_proj.lora_a")} == BLOCKWISE
    assert {name.partition("/")[0] for name in saved if "connector" in name} == {"step", "exp_avg", "exp_avg_sq"}
    train(stopped, resume=True)
    one, other = (load_file(tmp_path / run / "model" / "trained.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_it_needs_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer("adamw_8bit")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.49.1")
    check_optimizer("adamw")
    with pytest.raises(ImportError, match=r"bitsandbytes 0.50 or newer is accepted, but it is 0.49.1; pip install"):
        train(
            TrainConfig(llm="none", encoder="none", data="none", optimizer="adamw_8bit", stages=[StageConfig("align")])
        )
    with pytest.raises(ValueError, match="optimizer is 'sgd'; adamw or adamw_8bit is accepted"):
        TrainConfig(optimizer="sgd")  # type: ignore[arg-type]
