"""A language model that is quantised while it is read: in every system, saved, opened again, merged and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmfast.adapt import quantize_checkpoint
from mmfast.models import Llava, LoraSpec, Stage, get_system, open_model
from mmfast.models.export import export
from mmfast.nn import QuantizedLinear

SYSTEMS: dict[str, dict[str, Any]] = {
    "llava": {},
    "minigpt4": {"connector": "four_patches"},
    "video_chatgpt": {"num_frames": 3},
    "llama_adapter": {"version": "v2", "prompt_layers": 1, "visual_width": 32, "visual_heads": 2, "visual_depth": 1},
    "lavin": {},
}
TEXT = torch.tensor([[1, 40, 41, 42, 43]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TEXT).logits


def quantised(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_is_the_model_on_a_quantised_folder(
    system: str, format: Any, llm: Path, encoder: Path, tmp_path: Path
) -> None:
    quantize_checkpoint(llm, tmp_path / "llm", format)
    kind, settings = get_system(system), SYSTEMS[system]
    models = []
    for folder, base_dtype in ((llm, format), (tmp_path / "llm", None), (tmp_path / "llm", format)):
        torch.manual_seed(0)
        models.append(kind.from_parts(folder, encoder, dtype=torch.bfloat16, base_dtype=base_dtype, **settings))
    streamed, *stored = models
    assert streamed.base_dtype == streamed.describe()["base_dtype"] == format
    assert all(torch.equal(logits(model), logits(streamed)) for model in stored)
    assert streamed.get_output_embeddings().weight.dtype == torch.bfloat16
    assert not quantised(streamed.encoder)
    assert all(model.describe()["base_dtype"] == format for model in stored)
    # Saved and opened again, on the dense folder and on the quantised one.
    streamed.save_trained(tmp_path / "run")
    for base in (None, tmp_path / "llm"):
        opened = open_model(tmp_path / "run", llm=base)
        assert torch.equal(logits(opened), logits(streamed))
        assert opened.base_dtype == format


def test_only_the_same_kind_is_opened(llm: Path, encoder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llm, tmp_path / "llm", "int8")
    for base_dtype in ("nf4", "float32"):
        with pytest.raises(ValueError, match=rf"base_dtype is '{base_dtype}', but .* is quantised already \(int8\)"):
            Llava.from_parts(tmp_path / "llm", encoder, base_dtype=base_dtype)


def test_no_stage_trains_a_quantised_language_model(llm: Path, encoder: Path) -> None:
    model = Llava.from_parts(llm, encoder, base_dtype="int8")
    stage = Stage("instruct", "vicuna_v1", {"connector": 1e-3, "language_model": 1e-3})
    with pytest.raises(ValueError, match="trains the language model, whose linear layers are in int8"):
        model.set_stage(stage)


@pytest.mark.parametrize("folder", ["dense", "quantised"])
def test_merged_lora_makes_all_of_it_dense(folder: str, llm: Path, encoder: Path, tmp_path: Path) -> None:
    base = llm
    if folder == "quantised":
        base = tmp_path / "llm"
        quantize_checkpoint(llm, base)
    model = Llava.from_parts(base, encoder, base_dtype="nf4")
    model.add_lora(LoraSpec(rank=2, alpha=8, targets=("q_proj",)))
    for name, parameter in model.part_parameters("lora").items():
        nn.init.normal_(parameter, std=0.1 if name.endswith("lora_b") else 0.3)
    before = logits(model)
    model.merge_lora()
    assert model.base_dtype is None
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.save_trained(tmp_path / "run")
    assert torch.equal(logits(open_model(tmp_path / "run")), logits(model))


@pytest.mark.parametrize("to", ["hf", "original"])
def test_an_export_holds_the_quantised_values_dense(llm: Path, encoder: Path, tmp_path: Path, to: Any) -> None:
    model = Llava.from_parts(llm, encoder, base_dtype="nf4")
    model.save_trained(tmp_path / "run")
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to) < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
