"""`mmfast data check` and `mmfast data preview`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.cli import main
from mmfast.data import BatchPlan
from mmfast.evaluate.samples import open_samples
from mmfast.train import load_recipe, save_config
from mmfast.train.setup import build_model, build_processor, resolve_stage, set_processor, stage_seed


@pytest.mark.parametrize(
    "recipe",
    ["llava-world", "llava-hd-world", "minigpt4-world", "lavin-world", "llama-adapter-v1-world", "video-chatgpt-world"],
)
def test_the_processor_is_that_of_the_training(recipe: str) -> None:
    config = load_recipe(recipe)
    model: Any = build_model(config)
    stage = config.stages[-1]
    set_processor(model, resolve_stage(model, stage), stage, config.max_length)
    ours = build_processor(config, stage)
    assert type(ours) is type(model.processor)
    assert ours.settings() == model.processor.settings()
    name = stage.data if isinstance(stage.data, str) else stage.data[0] if stage.data else "world:questions-train"
    samples, folder = open_samples(name)
    for index in range(3):
        one, other = (processor.encode(samples[index], media_folder=folder) for processor in (ours, model.processor))
        assert (one.input_ids, one.labels) == (other.input_ids, other.labels)
        first, second = ours.collate([one]), model.processor.collate([other])
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_no_weights_are_read(backbones: dict[str, str], data: str, tmp_path: Path) -> None:
    import shutil

    bare = {name: shutil.copytree(folder, tmp_path / name) for name, folder in backbones.items()}
    for folder in bare.values():
        (folder / "model.safetensors").unlink()
    assert main(["data", "check", data, "--llm", str(bare["llm"]), "--encoder", str(bare["encoder"])]) == 0


def test_check_reports_and_says_by_its_status(
    backbones: dict[str, str], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--llm", backbones["llm"], "--encoder", backbones["encoder"], "--num-workers", "1"]
    assert main(["data", "check", data, *options, "--json", str(tmp_path / "new" / "report.json")]) == 0
    assert "20 samples, 16 images" in capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (report["samples"], report["media"], report["max_length"]) == (20, {"image": 16}, 1024)
    records = json.loads(Path(data).read_text())
    records[1]["messages"][0]["content"][0]["image"] = "lost.png"
    (Path(data).parent / "bad.json").write_text(json.dumps(records))
    bad = str(Path(data).parent / "bad.json")
    assert main(["data", "check", bad, *options]) == 1
    printed = capsys.readouterr()
    assert "lost.png' does not exist" in printed.out
    assert f"mmfast data check: {bad}: 1 of 20 samples are bad, 0 may be" in printed.err
    assert main(["data", "check", bad, *options, "--max-bad", "5%"]) == 0


def test_a_run_folder_tells_how_it_reads(make_config: Any, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config({"template": "llama_2"}, {"template": "short"}, max_length=250)
    Path(config.out).mkdir()
    save_config(config, Path(config.out) / "config.yaml")
    assert main(["data", "check", data, "--run", config.out, "--num-workers", "0"]) == 0
    assert "template short, max_length 250" in capsys.readouterr().out
    assert main(["data", "check", data, "--run", config.out, "--stage", "align", "--num-workers", "0"]) == 1
    printed = capsys.readouterr()
    assert "template llama_2, max_length 250" in printed.out, "of the stage that was asked for"
    assert "20 of 20 samples are bad" in printed.out, "the system text alone fills it"
    assert main(["data", "check", data, "--run", config.out, "--stage", "none"]) == 1
    assert "stage is 'none'; the recipe has align, instruct_lora" in capsys.readouterr().err
    assert main(["data", "check", data, "--run", config.out, "--recipe", "llava-world"]) == 1
    assert "one of the two is accepted" in capsys.readouterr().err
    assert main(["data", "check", data, "--run", str(Path(config.out).parent)]) == 1
    assert "which has no config.yaml" in capsys.readouterr().err


def test_preview_shows_the_first_batch_of_the_training(
    make_config: Any, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    Path(config.out).mkdir()
    save_config(config, Path(config.out) / "config.yaml")
    words = ["data", "preview", data, "--run", config.out, "--out", str(tmp_path / "pictures"), "--num-samples", "6"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    order = BatchPlan(20, 6, stage_seed(config, 1)).batch(0)
    positions = [printed.index(f"\nsample-{index}: ") for index in order]
    assert positions == sorted(positions)
    assert "batch: input_ids [6, " in printed
    with_image = sum(index % 5 > 0 for index in order)
    assert f"pixel_values [{with_image}, 3, 8, 8]" in printed
    assert len(list((tmp_path / "pictures").glob("*.png"))) == with_image
