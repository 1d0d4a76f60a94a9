"""Processes that are really killed: SIGKILL twice, then bit for bit the run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_files
from safetensors.torch import load_file
from training_processes import finish, start, wait_for_lines

from mmfast.train import TrainConfig, TrainingInterrupted, checkpoint, load_config, loop, save_config, train
from mmfast.train.log import StepLog

MakeConfig = Callable[..., TrainConfig]


def deterministic(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def write_config(make_config: MakeConfig, out: Path, **fields: Any) -> Path:
    path = out.with_suffix(".yaml")
    save_config(make_config({"max_steps": 10}, {"max_steps": 30}, out=str(out), save_every=4, **fields), path)
    return path


def test_killed_twice_it_continues_bit_for_bit(make_config: MakeConfig, data: str, tmp_path: Path) -> None:
    """At random steps; with accumulation, dropout, held-out samples, and other numbers of workers in each process."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    held_out: dict[str, Any] = {"eval_data": data, "eval_every": 5}
    train(load_config(write_config(make_config, whole, **held_out)))
    total = len(deterministic(whole))
    assert total == 40 + 8
    # In the first stage, after its checkpoint of step 4; then in the second, beyond its first checkpoint.
    kills = random.randint(5, 11), random.randint(24, 36)
    for index, (lines, workers) in enumerate(zip(kills, (2, 1), strict=True)):
        config = write_config(make_config, killed, num_workers=workers, **held_out)
        process = start(config, resume=index > 0)
        wait_for_lines(process, config, killed / "log.jsonl", lines)
        process.kill()
        finish(process, config, -signal.SIGKILL)
        assert not (killed / "model").exists()
        assert lines <= len(deterministic(killed)) < total, f"it was killed in the midst, after {kills}"
    config = write_config(make_config, killed, num_workers=3, **held_out)
    assert "continuing after step" in finish(start(config, resume=True), config)
    assert deterministic(killed) == deterministic(whole), f"killed after {kills}"
    for place in ("model", "best"):
        one, other = (load_file(run / place / "trained.safetensors") for run in (whole, killed))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), f"{place}: {name}, killed after {kills}"
    assert not list(killed.rglob(".tmp*")), "nothing half-written stays"


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


def test_a_signal_in_the_midst_of_a_save_ends_the_run_with_that_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(save_every=2)
    write = checkpoint.write_json

    def interrupted(path: Path, value: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", interrupted)
        with pytest.raises(TrainingInterrupted, match=r"stopped by SIGTERM after step 2; saved .*step-00000002"):
            train(config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000002"]
    assert train(config, resume=True).steps == 10


def test_two_ctrl_c_in_the_midst_of_a_save_leave_the_checkpoint_before(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one acts at once."""
    config = make_config(save_every=1)
    whole = train(make_config(out=config.out + "-whole"))
    write = checkpoint.write_json

    def interrupted(path: Path, value: Any) -> None:
        if value["state"]["progress"]["total_steps"] == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    folder = Path(config.out) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    train(config, resume=True)
    assert deterministic(Path(config.out)) == deterministic(whole.out)


def test_a_signal_while_the_longest_samples_are_tried_saves_after_the_first_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    make = loop.make_micro_batches

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_micro_batches", interrupted)
        with pytest.raises(TrainingInterrupted, match="stopped by SIGTERM after step 1; saved"):
            train(config)
    assert train(config, resume=True).steps == 10


@pytest.mark.parametrize("saves", [0, 1, 3])
def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_space(
    saves: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the first, the second and the fourth checkpoint do not find."""
    config = make_config(save_every=2)
    whole = train(make_config(out=config.out + "-whole"))
    write, seen = loop.write_checkpoint, []

    def filling(*args: Any) -> Path:
        seen.append(1)
        with small_files(2000 if len(seen) > saves else 10**9):
            return write(*args)

    says = r"checkpoint: step \d is not saved: .*safetensors: it cannot be written: File too large; .*MB are free"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_checkpoint", filling)
        with pytest.raises(OSError, match=says):
            train(config)
    out = Path(config.out)
    assert not list(out.rglob(".tmp*"))
    if saves:
        train(config, resume=True)
    else:
        with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
            train(config, resume=True)
        shutil.rmtree(out)
        train(config)
    assert deterministic(out) == deterministic(whole.out)


def test_a_log_on_a_full_disk_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(save_every=2)
    whole = train(make_config(out=config.out + "-whole"))
    write = StepLog.write

    def filling(log: StepLog, record: dict[str, Any]) -> None:
        size = (Path(config.out) / "log.jsonl").stat().st_size
        with small_files(size + 20 if record["step"] == 5 else 10**9):
            write(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "write", filling)
        with pytest.raises(OSError, match=r"log\.jsonl: it cannot be written: File too large"):
            train(config)
    assert not (Path(config.out) / "log.jsonl").read_bytes().endswith(b"\n"), "the line is cut off"
    train(config, resume=True)
    assert deterministic(Path(config.out)) == deterministic(whole.out)
