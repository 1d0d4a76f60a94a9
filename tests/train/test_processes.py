"""Two processes train what one trains, each with the whole model or with a share of it, and go on from each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from training_processes import compile_quickly, finish_two, start_two, stop_second

from mmfast.train import StageConfig, TrainConfig, save_config, train

MakeConfig = Callable[..., TrainConfig]


def launch(
    config: TrainConfig, resume: bool = False, status: int = 0, prepare: Callable[[], None] | None = None
) -> tuple[str, str]:
    """The run in two processes, its configuration beside its folder: what each has printed."""
    file = Path(config.out).with_suffix(".yaml")
    save_config(config, file)
    return finish_two(start_two(file, resume, prepare), file, status)


def run_in_two(program: Path, *arguments: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(program), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def read_log(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def read_model(config: TrainConfig) -> dict[str, Tensor]:
    return load_file(Path(config.out) / "model" / "trained.safetensors")


def assert_same_losses(config: TrainConfig, other: TrainConfig) -> None:
    one, two = read_log(config), read_log(other)
    assert len(one) == len(two) == 13
    for line, found in zip(one, two, strict=True):
        assert abs(line["loss"] - found["loss"]) < 1e-5 * line["loss"]
        assert line["supervised_tokens"] == found["supervised_tokens"]
        assert line["lr"] == found["lr"]
        assert line["bad_samples"] == found["bad_samples"]
    assert one[6]["bad_samples"] == 2
    expected = read_model(config)
    for name, tensor in read_model(other).items():
        # Adam turns rounding into steps where a gradient is near zero, so weights agree less well than losses.
        assert (tensor - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


def back_to(config: TrainConfig, step: int, out: Path) -> TrainConfig:
    """The same run in another folder, as it was after `step` steps."""
    shutil.copytree(config.out, out)
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return replace(config, out=str(out))


@pytest.fixture
def single(make_config: MakeConfig, data: str, tmp_path: Path) -> TrainConfig:
    """A run of one process. Batches of 3 leave two processes unequal shares; the epoch's last has 20 % 3 samples."""
    # Two samples are bad, whichever of the processes meets them.
    records = json.loads(Path(data).read_text())
    for index in (1, 8):
        records[index]["messages"][0]["content"][0]["image"] = f"lost-{index}.png"
    (Path(data).parent / "lost.json").write_text(json.dumps(records))
    config = make_config(
        {"batch_size": 3, "micro_batch_size": 1, "max_steps": 7},
        {"batch_size": 5, "lora_dropout": 0.0},
        out=str(tmp_path / "single"),
        save_every=3,
        keep_checkpoints=9,
        data=str(Path(data).parent / "lost.json"),
        max_bad=2,
    )
    train(config)
    return config


def test_two_processes_are_one(single: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, of which one is told to stop in the second stage; a single one goes on."""
    double = replace(single, out=str(tmp_path / "double"))
    output, other = launch(double, status=1, prepare=partial(stop_second, 10))
    assert output.count("stage align: 7 steps") == 1
    assert "stage align" not in other, "only the first process speaks"
    assert "after step 10; saved" in output
    states = load_file(tmp_path / "double" / "checkpoints" / "step-00000010" / "rng.safetensors")
    assert {name.partition("/")[0] for name in states} == {"0", "1"}, "each process has its own random state"
    capsys.readouterr()
    train(double, resume=True)
    assert "the checkpoint is of 2 processes, this run has 1" in capsys.readouterr().out
    assert_same_losses(single, double)


def test_sharded_processes_are_one(single: TrainConfig, tmp_path: Path) -> None:
    """From one process to two that share the model, in the midst of a stage, over to the next one, and back."""
    sharded = replace(back_to(single, 3, tmp_path / "sharded"), sharding="fsdp")
    output, _ = launch(sharded, resume=True)
    assert "the checkpoint is of 1 processes, this run has 2" in output
    assert "continuing after step 3" in output
    assert_same_losses(single, sharded)
    for name in ("trained", "optimizer"):
        file = Path("checkpoints", "step-00000009", f"{name}.safetensors")
        expected, found = load_file(Path(single.out) / file), load_file(Path(sharded.out) / file)
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}
    alone = replace(back_to(sharded, 9, tmp_path / "alone"), sharding="none")
    train(alone, resume=True)
    assert_same_losses(single, alone)


def test_two_processes_with_compiled_layers_are_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """Unequal shares of batches; what they leave in memory and on the disk is that of layers as they are."""
    config = make_config(lora={"lora_dropout": 0.0, "batch_size": 3, "micro_batch_size": 1, "max_steps": 5})
    config = replace(config, stages=config.stages[1:], out=str(tmp_path / "single"))
    train(config)
    compiled = replace(config, out=str(tmp_path / "compiled"), compile=True)
    graphs = [re.findall(r"graphs: (\d+)", output) for output in launch(compiled, prepare=compile_quickly)]
    assert all(len(counts) == 1 and 0 < int(counts[0]) <= 4 for counts in graphs)
    losses = [[line["loss"] for line in read_log(run)] for run in (config, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert read_model(compiled).keys() == read_model(config).keys()


def test_a_sharded_step_is_that_of_the_whole_model(make_config: MakeConfig, backbones: Any, tmp_path: Path) -> None:
    """LoRA, the language model in bfloat16, and routes; with layers computed again, and processes that run idle."""
    lora = make_config(lora={"lora_dropout": 0.0}, recompute="mlp")
    full = replace(lora, stages=[StageConfig("instruct", template="vicuna_v1")], recompute="full", dtype="bfloat16")
    options = {"version": "v2", "visual_width": 16, "visual_depth": 1, "visual_heads": 2, "prompt_length": 3}
    stages = [StageConfig("joint", template="vicuna_v1")]
    joint = replace(lora, system="llama_adapter", stages=stages, options={**options, "visual_length": 2})
    files = [tmp_path / f"{index}.yaml" for index in range(3)]
    for config, file in zip((lora, full, joint), files, strict=True):
        save_config(config, file)
    run_in_two(Path(__file__).with_name("sharded_gradients.py"), str(tmp_path / "out"), *map(str, files))
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    # What trains in bfloat16 is rounded before the products here, and in them there.
    for result, error in zip(results, (1e-5, 2e-2, 1e-5), strict=True):
        whole, sharded = result["whole"], result["sharded"]
        assert sharded["loss"] == pytest.approx(whole["loss"], rel=error)
        assert sharded["norms"] == pytest.approx(whole["norms"], rel=error)
        assert sharded["tokens"] == whole["tokens"]
        assert result["error"] < error
        assert sharded["held"] < 0.7 * whole["held"]


def test_what_cannot_be_sharded_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="the system lavin cannot be divided among processes, since the routers"):
        train(make_config(system="lavin", sharding="fsdp"))
    with pytest.raises(ValueError, match="sharding is 'zero'; none or fsdp is accepted"):
        make_config(sharding="zero")
    with pytest.raises(ValueError, match="the optimizer adamw_8bit cannot divide its state"):
        train(make_config(sharding="fsdp", optimizer="adamw_8bit"))
