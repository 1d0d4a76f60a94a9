"""LLaMA-Adapter V2's multimodal 7B with LoRA in the training loop: two phases, any step resumed, and its own layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stand_ins import write_clip

from mmfast.models import LoraSpec, open_model
from mmfast.models.convert import convert
from mmfast.models.export import export
from mmfast.models.llama_adapter_original import read_checkpoint
from mmfast.train import StageConfig, TrainConfig, train

OPTIONS = {"version": "v2_multimodal_7b", "prompt_length": 3, "visual_width": 16, "visual_depth": 1}
# Where that is the code's own, so that its layout can hold the model.
OPTIONS |= {"channel_order": "bgr", "blank_image": True}
SECOND = ("norms", "bias_scale", "lora")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tower with its projection."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("projected")
    write_clip(folder)
    return folder


def make_config(backbones: dict[str, str], encoder: Path, data: str, out: Path, **fields: Any) -> TrainConfig:
    stages = [
        StageConfig("pretrain", batch_size=4, max_steps=3, lr=dict.fromkeys(("connector", "prompts", "gates"), 1e-2)),
        StageConfig("finetune_lora", batch_size=4, max_steps=4, lr=dict.fromkeys(SECOND, 1e-2), lora_rank=2),
    ]
    stages[1].lora_alpha = 2
    values: dict[str, Any] = {"system": "llama_adapter", "data": data, "out": str(out), "stages": stages}
    return TrainConfig(**{**values, "llm": backbones["llm"], "encoder": str(encoder), "options": OPTIONS, **fields})


def test_two_phases_and_the_published_layout(
    backbones: dict[str, str], encoder: Path, data: str, tmp_path: Path
) -> None:
    result = train(make_config(backbones, encoder, data, tmp_path / "run"))
    first = load_file(result.out / "checkpoints" / "step-00000003" / "trained.safetensors")
    last = load_file(result.out / "model" / "trained.safetensors")
    second = {name for part in SECOND for name in result.model.part_parameters(part)}
    # Before LoRA is there, its gates have no factor, and the second phase leaves that where it starts.
    factors = {name for name in last if name.endswith(".gate_scale")}
    assert last.keys() - first.keys() == second | factors and len(factors) == 1
    assert all(torch.equal(last[name], torch.ones(1)) for name in factors)
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    assert all(last[name].any() for name in second)
    opened = open_model(result.out)
    assert opened.lora_spec == LoraSpec(2, 2) and opened.trained_state().keys() == last.keys()

    assert export(str(result.out), str(tmp_path / "original"), to="original") == 0.0
    written = read_checkpoint(tmp_path / "original")
    assert sum(".lora_w" in name for name in written) == 2 * 2 * 7
    bases = {"llm": backbones["llm"], "encoder": str(encoder)}
    convert(str(tmp_path / "original"), str(tmp_path / "again"), **bases, system="llama_adapter")
    again = open_model(tmp_path / "again").trained_state()
    assert all(torch.equal(again[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize("done", [2, 3, 5])
def test_a_run_continues_from_any_step(
    done: int,
    backbones: dict[str, str],
    encoder: Path,
    data: str,
    tmp_path: Path,
    train_until_crash: Callable[[TrainConfig, int], None],
) -> None:
    """As after a crash in step `done` + 1; 3 is where the first phase ends."""
    whole = train(make_config(backbones, encoder, data, tmp_path / "whole"))
    config = make_config(backbones, encoder, data, tmp_path / "broken", save_every=1)
    train_until_crash(config, done)
    torch.rand(7)
    result = train(config, resume=True)
    losses = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (whole.out, result.out)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    saved = [load_file(run / "model" / "trained.safetensors") for run in (whole.out, result.out)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(tensor, saved[1][name]) for name, tensor in saved[0].items())
