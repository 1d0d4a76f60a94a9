"""The comparison of systems from end to end, with a few steps instead of hundreds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.cli import main
from mmfast.compare import CLIPS, ENTRIES, IMAGES, WIDE, Entry, compare
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
        compare(str(out), ["llava"], budget=4, max_samples=6)


def row(name: str, data: str = IMAGES, accuracy: float = 0.5) -> dict[str, Any]:
    numbers = {"steps": 1, "trainable_parameters": 1, "seconds": 1.0, "peak_memory_mb": 1.0, "accuracy": accuracy}
    shares = {"chance_accuracy": 0.1, "text_only_accuracy": 0.1, "text_accuracy": 1.0}
    return {"name": name, "data": data, "per_kind": {"time": {"accuracy": 0.5, "n": 6}}, **numbers, **shares}


def test_rows_of_other_systems_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(entry: Entry, *_: Any) -> dict[str, Any]:
        found = row("", entry.data, 0.75)
        return {key: value for key, value in found.items() if key != "name"}

    monkeypatch.setattr("mmfast.compare._measure", measured)
    monkeypatch.setattr("mmfast.compare._text_only", lambda datasets, _: [row("text-only", x, 0.25) for x in datasets])
    path = tmp_path / "compare.json"
    earlier = [row("text-only"), row("text-only", CLIPS), row("video-chatgpt", CLIPS), row("fine-tune")]
    path.write_text(json.dumps({"seed": 0, "budget": 2, "systems": earlier}))  # of a release without max_samples
    with pytest.raises(FileExistsError, match=r"holds runs already \(fine-tune\)"):
        compare(str(tmp_path), "llava,fine-tune", budget=2)
    wrong: list[dict[str, Any]] = [{"budget": 3}, {"seed": 1}, {"max_samples": 4}]
    for settings in wrong:
        with pytest.raises(ValueError, match="rows of the same settings stand in one table"):
            compare(str(tmp_path), "llava", **{"budget": 2, **settings})
    assert json.loads(path.read_text())["systems"] == earlier

    result = compare(str(tmp_path), "llava-hd,llava", budget=2)
    assert json.loads(path.read_text()) == result
    assert [(x["name"], x["data"], x["accuracy"]) for x in result["systems"]] == [
        ("text-only", IMAGES, 0.25),
        ("text-only", CLIPS, 0.5),
        ("text-only", WIDE, 0.25),
        ("llava", IMAGES, 0.75),
        ("video-chatgpt", CLIPS, 0.5),
        ("llava-hd", WIDE, 0.75),
        ("fine-tune", IMAGES, 0.5),
    ]
    # When every row is measured again, it may be with other settings.
    result = compare(str(tmp_path), "llava,llava-hd,video-chatgpt,fine-tune", budget=3, overwrite=True)
    assert (result["budget"], {x["accuracy"] for x in result["systems"]}) == (3, {0.25, 0.75})


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
