"""Checkpoints: whole or absent, checked when read, the newest whole one is taken."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmfast.train import checkpoint as module
from mmfast.train.checkpoint import read_newest_checkpoint, write_checkpoint
from mmfast.train.rng import rng_state, seed_everything, set_rng_state

FILES = ["trained.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


def write(folder: Path, step: int, keep: int = 2) -> Path:
    value = torch.full((3, 2), float(step))
    # Tensors that share memory, and one that is not dense, as model parameters may be.
    tensors: dict[str, dict[str, Tensor]] = {
        "trained": {"a": value, "b": value, "c": value.T},
        "optimizer": {},
        "rng": {"0/torch": torch.get_rng_state()},
    }
    return write_checkpoint(folder, step, {"step": step, "loss": 0.1 + 0.2}, tensors, keep)


def test_round_trip(tmp_path: Path) -> None:
    write(tmp_path / "checkpoints", 7)
    checkpoint = read_newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.path.name == "step-00000007"
    assert checkpoint.state == {"step": 7, "loss": 0.1 + 0.2}
    assert checkpoint.trained.keys() == {"a", "b", "c"}
    assert checkpoint.trained["c"].shape == (2, 3)
    assert torch.equal(checkpoint.rng["0/torch"], torch.get_rng_state())
    assert sorted(path.name for path in checkpoint.path.iterdir()) == sorted(FILES)


def test_keeps_the_last_ones_in_order_of_steps(tmp_path: Path) -> None:
    for step in (2, 99_999_999, 100_000_000):  # names of different lengths
        write(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["step"] == 100_000_000


def test_nothing_there(tmp_path: Path) -> None:
    assert read_newest_checkpoint(tmp_path / "missing") is None
    (tmp_path / ".tmp-step-00000003").mkdir()
    assert read_newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(file: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "altered":
        content[-9 if file != "state.json" else 0] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.warns(UserWarning, match=rf"step-00000002: .*{file}.*going back to step-00000001"):
        checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["step"] == 1
    # The damaged one does not count any longer, and a new one takes its place.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]
    write(tmp_path, 2)
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["step"] == 2


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        (write(tmp_path, step) / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"step-00000002: trained\.safetensors has 1 bytes.*step-00000001"):
        read_newest_checkpoint(tmp_path)
    assert (tmp_path / "step-00000002").is_dir()


@pytest.mark.parametrize("failing", ["save_file", "write_json", "fsync_folder"])
def test_a_crash_while_writing_leaves_the_one_before(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, keep=1)

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, crash)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2, keep=1)
    checkpoint = read_newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["step"] == 1
    write(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_rng_state_continues_every_generator() -> None:
    def draw() -> list[object]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(3).tolist(),
        ]

    seed_everything(3)
    draw()  # the Gaussian generators keep the second of a pair
    state = rng_state(torch.device("cpu"))
    expected = [draw(), draw()]
    seed_everything(4)
    draw()
    set_rng_state(state, torch.device("cpu"))
    assert [draw(), draw()] == expected
