"""The quick start from end to end, with a few steps instead of hundreds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmfast.models import Llava
from mmfast.quickstart import quickstart


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_reports_saves_and_runs_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    report = quickstart(str(out), max_samples=12, max_steps=2)
    assert json.loads((out / "report.json").read_text()) == report
    assert [stage["name"] for stage in report["stages"]] == ["align", "instruct_lora"]
    for stage in report["stages"]:
        assert stage["steps"] == 2
        assert stage["trainable_parameters"] > 10_000
        assert stage["seconds"] > 0
        assert stage["peak_memory_mb"] > 50
        assert 0 <= stage["accuracy"] <= 1
    # The model that was loaded from the disk answers as the one that was trained.
    assert report["accuracy"] == report["stages"][-1]["accuracy"]
    assert report["test_images"] == 12
    assert 0 < report["chance_accuracy"] < 0.5
    assert report["encoder_ceiling"] > 0.8
    assert 0 <= report["text_only_accuracy"] <= 1
    assert Image.open(out / "digits.png").size == (32, 32)
    assert Image.open(out / "digits-large.png").size == (256, 256)
    assert len(report["answers"]) == 3
    printed = capsys.readouterr().out
    for answer in report["answers"]:
        assert answer["question"] in printed
    assert "after stage align" in printed
    assert Llava.from_pretrained(out).lora_spec is not None
    again = quickstart(str(out), max_samples=12, max_steps=2)
    timed = {"seconds", "peak_memory_mb"}
    for one, other in zip(report.pop("stages"), again.pop("stages"), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    assert again == report


def test_it_replaces_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that no quick start made"):
        quickstart(str(tmp_path))
    with pytest.raises(ValueError, match="max_steps is 0"):
        quickstart(str(tmp_path), max_steps=0)
    assert (tmp_path / "precious.txt").read_text() == "mine"
