"""Processes that are really killed: SIGKILL twice, then bit for bit the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.train import TrainConfig, TrainingInterrupted, load_config, save_config, train
from mmfast.train.log import StepLog

MakeConfig = Callable[..., TrainConfig]
PROGRAM = """
import sys
from mmfast.train import load_config, train
train(load_config(sys.argv[1]), resume="--resume" in sys.argv)
"""


def start(config: Path, resume: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(config), *(["--resume"] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_lines(process: subprocess.Popen[str], log: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    return output


def deterministic(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def write_config(make_config: MakeConfig, out: Path, **fields: Any) -> Path:
    path = out.with_suffix(".yaml")
    save_config(make_config({"max_steps": 10}, {"max_steps": 30}, out=str(out), save_every=4, **fields), path)
    return path


def test_killed_twice_it_continues_bit_for_bit(make_config: MakeConfig, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_config(write_config(make_config, whole)))
    config = write_config(make_config, killed, num_workers=1)
    # In the first stage, after its checkpoint of step 4 or 8; then in the second, beyond its first checkpoint.
    for index, lines in enumerate((6, 23)):
        process = start(config, resume=index > 0)
        wait_for_lines(process, killed / "log.jsonl", lines)
        process.send_signal(signal.SIGKILL)
        finish(process, -signal.SIGKILL)
        assert not (killed / "model").exists()
    steps = [line["step"] for line in deterministic(killed)]
    assert 23 <= len(steps) < 40, "it was killed in the midst of the second stage"
    assert "continuing after step" in finish(start(config, resume=True))
    assert len(deterministic(whole)) == 40
    assert deterministic(killed) == deterministic(whole)
    one, other = (load_file(run / "model" / "trained.safetensors") for run in (whole, killed))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("done", [2, 4])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(
    number: signal.Signals, done: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of the first stage and in its last step."""
    config = make_config()
    handler = signal.getsignal(number)
    write_line = StepLog.write

    def interrupt(log: StepLog, record: dict[str, Any]) -> None:
        if record["step"] == done:
            os.kill(os.getpid(), number)
        write_line(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", interrupt)
        with pytest.raises(TrainingInterrupted) as stopped:
            train(config)
    # What an uncaught SystemExit prints; its status is then 1.
    message = str(stopped.value.code)
    assert f"stopped by {number.name} after step {done}; saved" in message
    assert f"mmfast train --config {Path(config.out) / 'config.yaml'} --resume" in message
    assert (Path(config.out) / "checkpoints" / f"step-{done:08d}" / "state.json").is_file()
    assert signal.getsignal(number) is handler
    assert len(deterministic(Path(config.out))) == done
    assert train(config, resume=True).steps == 10
