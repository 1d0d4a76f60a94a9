"""Checkpoints: whole or absent, checked when read, the newest whole one is taken."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from disks import at_change, dies_at_change, read_only, small_files
from torch import Tensor

from mmfast.files import remove_leftovers
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


def is_whole(folder: Path, steps: tuple[int, ...]) -> bool:
    checkpoint = read_newest_checkpoint(folder)
    return checkpoint is not None and checkpoint.state["step"] in steps


def test_a_process_that_dies_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for number in range(100):
        folder = tmp_path / str(number)
        write(folder, 1, keep=1)
        if not dies_at_change(number, lambda folder=folder: write(folder, 2, keep=1)):  # type: ignore[misc]
            break
        assert is_whole(folder, (1, 2))
        remove_leftovers(folder)
        assert {path.name for path in folder.iterdir()} <= {"step-00000001", "step-00000002"}
        write(folder, 3, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert 15 < number < 99, "it died at every change"


def test_ctrl_c_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "tried", 1)
    with at_change(10**9, id) as changes:
        write(tmp_path / "tried", 2)
    for number in range(changes.index("rename") + 1):
        folder = tmp_path / str(number)
        write(folder, 1, keep=1)
        with at_change(number, interrupt), pytest.raises(KeyboardInterrupt):
            write(folder, 2, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000001"], "nothing half-written stays"
        assert is_whole(folder, (1,))


def interrupt() -> None:
    raise KeyboardInterrupt


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [1, 2, 4, 8, 11])
def test_a_full_disk_leaves_the_one_before(number: int, tmp_path: Path) -> None:
    """At different moments of a save."""
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    says = rf"step 2 is not saved: .*No space left on device; .*MB are free.*{tmp_path}/step-00000001 is whole"
    with at_change(number, full), pytest.raises(OSError, match=says) as info:
        write(tmp_path, 2)
    assert info.value.errno == errno.ENOSPC
    assert sorted(tmp_path.rglob("*")) == before
    assert is_whole(tmp_path, (1,))


@pytest.mark.parametrize("most", [0, 100, 1000])
def test_files_that_may_not_grow(most: int, tmp_path: Path) -> None:
    """The system's own refusal: of the first tensors, or of the random state, which is larger."""
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    with small_files(most), pytest.raises(OSError, match=r"2 is not saved: .*\.safetensors: .*File too large; .*free"):
        write(tmp_path, 2)
    assert sorted(tmp_path.rglob("*")) == before
    assert is_whole(tmp_path, (1,))


def test_a_read_only_folder(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    says = "2 is not saved: .*Permission denied; a folder that you may write in is accepted; .*step-00000001 is whole"
    with read_only(tmp_path), pytest.raises(PermissionError, match=says):
        write(tmp_path, 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_first_checkpoint_cannot_be_saved(tmp_path: Path) -> None:
    with small_files(0), pytest.raises(OSError, match=r"1 is not saved: .*; there is no earlier one"):
        write(tmp_path / "checkpoints", 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_state_is_checked(tmp_path: Path) -> None:
    path = write(tmp_path, 12) / "state.json"
    path.write_text(path.read_text().replace("12", "13"))
    with pytest.raises(ValueError, match=r"state\.json differs from what was written"):
        read_newest_checkpoint(tmp_path)


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
