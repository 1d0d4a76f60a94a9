"""A loss that is not finite in one of two processes: both skip the step whole, and all of its samples are named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_processes import finish_two, poison, start_two

from mmfast.models import open_model
from mmfast.train import StageConfig, TrainConfig, save_config
from mmfast.train.batches import batches_in_order
from mmfast.train.held_out import HeldOut, held_out_loss

MakeConfig = Callable[..., TrainConfig]


def test_two_processes_skip_what_one_cannot_compute(make_config: MakeConfig, data: str, tmp_path: Path) -> None:
    stage = StageConfig("align", batch_size=4, micro_batch_size=1, max_steps=5, template="vicuna_v1")
    config = tmp_path / "two.yaml"
    out = tmp_path / "two"
    made = make_config(stages=[stage], out=str(out), max_nonfinite_steps=1, eval_data=data, eval_every=2)
    save_config(made, config)
    processes = start_two(config, prepare=partial(poison, "sample-7"))
    printed, _ = finish_two(processes, config)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (skipped,) = (line for line in lines if line.get("skipped"))
    found = re.search(r"the loss was not finite in step (\d), samples (.*); the step was skipped \(1 of 1\)", printed)
    assert found is not None
    assert int(found[1]) == skipped["step"]
    assert len(found[2].split(", ")) == 4, "those of both processes"
    assert "sample-7" in found[2].split(", ")
    for tensor in load_file(out / "model" / "trained.safetensors").values():
        assert torch.isfinite(tensor).all()
    # And the held-out loss is that of all samples, of which each process had a half.
    model = open_model(out / "best")
    dataset = HeldOut(made).dataset(cast(Any, model.processor))
    assert dataset is not None
    alone = held_out_loss(model, batches_in_order(dataset, 4), Accelerator(cpu=True), torch.float32)
    measured = min((line for line in lines if "eval_loss" in line), key=lambda line: line["eval_loss"])
    assert math.isclose(measured["eval_loss"], alone.loss, rel_tol=1e-5)
    assert measured["eval_supervised_tokens"] == alone.supervised_tokens
