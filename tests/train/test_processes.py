"""Two processes train what one trains: batches are shared out, gradients and counts are summed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from mmfast.train import TrainConfig, save_config, train

MakeConfig = Callable[..., TrainConfig]
PROGRAM = """
import sys
from mmfast.train import load_config, train
train(load_config(sys.argv[1]))
"""


def launch(tmp_path: Path, config: Path) -> str:
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "program.py"), str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_two_processes_are_one(make_config: MakeConfig, data: str, tmp_path: Path) -> None:
    # Batches of 3 leave the two processes unequal shares; the epoch's last batch of 2 has 20 % 3 samples.
    options = {"align": {"batch_size": 3, "max_steps": 7}, "lora": {"lora_dropout": 0.0, "batch_size": 5}}
    # Two samples are bad, whichever of the processes meets them.
    records = json.loads(Path(data).read_text())
    for index in (1, 8):
        records[index]["messages"][0]["content"][0]["image"] = f"lost-{index}.png"
    (Path(data).parent / "lost.json").write_text(json.dumps(records))
    options |= {"data": str(Path(data).parent / "lost.json"), "max_bad": 2}
    single = train(make_config(**options, out=str(tmp_path / "single")))
    config = tmp_path / "double.yaml"
    save_config(make_config(**options, out=str(tmp_path / "double"), save_every=3), config)
    output = launch(tmp_path, config)
    assert output.count("stage align: 7 steps") == 1, "only the first process speaks"
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("single", "double")
    )
    assert len(one) == len(two) == 13
    for line, other in zip(one, two, strict=True):
        assert abs(line["loss"] - other["loss"]) < 1e-4 * line["loss"]
        assert line["supervised_tokens"] == other["supervised_tokens"]
        assert line["lr"] == other["lr"]
        assert line["bad_samples"] == other["bad_samples"]
    assert one[6]["bad_samples"] == 2
    expected = single.model.trained_state()
    found = load_file(tmp_path / "double" / "model" / "trained.safetensors")
    for name, tensor in found.items():
        # Adam turns rounding into steps where a gradient is near zero, so weights agree less well than losses.
        assert (tensor - expected[name]).norm() <= 1e-3 * expected[name].norm(), name
    states = load_file(tmp_path / "double" / "checkpoints" / "step-00000013" / "rng.safetensors")
    assert {name.partition("/")[0] for name in states} == {"0", "1"}, "each process has its own random state"
