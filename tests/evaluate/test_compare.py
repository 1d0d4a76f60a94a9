"""The comparison of systems from end to end, with a few steps instead of hundreds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmfast.cli import main
from mmfast.compare import ENTRIES, compare
from mmfast.train import load_config, load_recipe


def test_compare_measures_and_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "compare"
    result = compare(str(out), "llava,fine_tune", budget=4, max_samples=6)
    assert json.loads((out / "compare.json").read_text()) == result
    rows = {row["name"]: row for row in result["systems"]}
    assert list(rows) == ["text-only", "llava", "fine-tune"]
    assert rows["text-only"]["trainable_parameters"] == 0
    assert rows["llava"]["trainable_parameters"] == 189_184
    assert rows["fine-tune"]["trainable_parameters"] > 900_000
    for name in ("llava", "fine-tune"):
        assert 2 <= rows[name]["steps"] <= 4
        assert rows[name]["seconds"] > 0
        assert sum(kind["n"] for kind in rows[name]["per_kind"].values()) == 6
        assert 0 <= rows[name]["accuracy"] <= 1
    assert rows["text-only"]["text_accuracy"] == 1.0
    assert [stage.name for stage in load_config(out / "fine-tune" / "config.yaml").stages] == ["align", "instruct"]
    table = (out / "compare.md").read_text()
    assert table in capsys.readouterr().out
    assert "| fine-tune |" in table
    assert Image.open(out / "compare.png").width > 300
    with pytest.raises(FileExistsError, match=r"holds runs already \(llava\)"):
        compare(str(out), ["llava"], budget=4)


def test_every_row_has_its_recipe() -> None:
    for entry in ENTRIES.values():
        config = load_recipe(entry.recipe)
        assert all(stage.max_steps for stage in config.stages)
        assert config.llm == config.encoder == "world"


def test_compare_refuses_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--out", str(tmp_path / "x"), "--systems", "llava,gpt"]) == 1
    assert "systems has gpt; accepted are llava" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path / "x"), "--budget", "1"]) == 1
    assert "budget is 1; 2 or more" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
