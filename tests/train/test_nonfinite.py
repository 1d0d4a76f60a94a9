"""A loss that is not finite in one of two processes: both skip the step whole, and all of its samples are named."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_processes import finish, start

from mmfast.models import open_model
from mmfast.train import StageConfig, TrainConfig, save_config
from mmfast.train.batches import batches_in_order
from mmfast.train.held_out import HeldOut, held_out_loss

MakeConfig = Callable[..., TrainConfig]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_two_processes_skip_what_one_cannot_compute(make_config: MakeConfig, data: str, tmp_path: Path) -> None:
    stage = StageConfig("align", batch_size=4, micro_batch_size=1, max_steps=5, template="vicuna_v1")
    config = tmp_path / "two.yaml"
    out = tmp_path / "two"
    made = make_config(stages=[stage], out=str(out), max_nonfinite_steps=1, eval_data=data, eval_every=2)
    save_config(made, config)
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [
        start(config, poisoned="sample-7", environment={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    for process in processes:
        printed = finish(process, config)
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
