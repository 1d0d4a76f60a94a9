"""The command line: what it reads, what it refuses, and how it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmfast.generate
import mmfast.train
from mmfast import __version__
from mmfast.cli import COMMANDS, Command, main
from mmfast.ops import crossovers
from mmfast.train import TrainConfig, load_recipe


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, bool]]:
    """The calls of `train`, which does nothing."""
    calls: list[tuple[TrainConfig, bool]] = []
    monkeypatch.setattr(mmfast.train, "train", lambda config, resume: calls.append((config, resume)))
    return calls


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmfast {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    assert f"usage: mmfast {name}" in capsys.readouterr().out


def test_a_group_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data"], ["data", "--help"]):
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert "  data check " in printed and "  data preview " in printed and "  train " not in printed
    assert main(["data", "chekc", "x.json"]) == 2
    assert "there is no command 'data chekc'" in capsys.readouterr().err


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; use one of quickstart, train" in capsys.readouterr().err


def test_a_recipe_with_options(trained: list[tuple[TrainConfig, bool]]) -> None:
    assert main(["train", "llava-world", "--out", "runs/x", "--save-every=7", "--max_length", "99"]) == 0
    recipe = load_recipe("llava-world")
    [(config, resume)] = trained
    assert (config.out, config.save_every, config.max_length, resume) == ("runs/x", 7, 99, False)
    assert config.stages == recipe.stages


def test_a_printed_config_is_read_back(
    trained: list[tuple[TrainConfig, bool]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "llava-1.5-lora", "--print_config"])
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["stages"][0]["lora_rank"] == 128
    assert main(["train", "--config", str(file), "--resume"]) == 0
    assert trained == [(load_recipe("llava-1.5-lora"), True)]


def test_an_unknown_option_is_refused(trained: list[tuple[TrainConfig, bool]]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "llava-world", "--batch", "3"])
    assert stopped.value.code == 2
    assert not trained


def test_base_models_are_options_and_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "mm_projector.bin", "out"])
    assert stopped.value.code == 2
    assert "llm, encoder" in capsys.readouterr().err


def test_an_option_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def chat(run: str, image: list[str] | str = (), prompt: list[str] | str = ()) -> None:  # type: ignore[assignment]
        seen.update(run=run, image=image, prompt=prompt)

    monkeypatch.setattr(mmfast.generate, "chat", chat)
    assert main(["chat", "runs/a", "--image", "a.jpg", "--image", "b.jpg", "--prompt", "what is it?"]) == 0
    assert seen == {"run": "runs/a", "image": ["a.jpg", "b.jpg"], "prompt": ["what is it?"]}


def test_an_error_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = str(tmp_path / "nothing")
    assert main(["eval", missing]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mmfast eval: ")
    assert missing in error
    assert "Traceback" not in error
    monkeypatch.setenv("MMFAST_TRACEBACK", "1")
    with pytest.raises((OSError, ValueError)):
        main(["eval", missing])


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfast.environment.show", stop)
    assert main(["env"]) == 130
    assert capsys.readouterr().err == "mmfast: stopped\n"


def test_env_says_why_a_backend_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--as-json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["mmfast"] == __version__
    pool = found["ops"]["cpu"]["spatio_temporal_pool"]
    assert pool["reference"] is None
    assert pool["cuda"] == "the tensors are on cpu"


def test_env_says_which_crossovers_are_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    assert f"crossovers on cpu: {crossovers.CPU.source}\n" in capsys.readouterr().out


def test_a_group_may_be_a_command_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COMMANDS, "data", Command("", "mmfast.environment:show"))
    assert main(["data", "--as-json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["mmfast"] == __version__
    assert main(["data", "check", "missing.json"]) == 1
    assert "mmfast data check: " in capsys.readouterr().err


def test_a_bad_table_of_crossovers_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text("{")
    env = {**os.environ, "MMFAST_CROSSOVERS": str(table)}
    run = subprocess.run([sys.executable, "-m", "mmfast", "env"], env=env, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"mmfast env: crossovers: {table}: it cannot be read as JSON")
    assert "Traceback" not in run.stderr
