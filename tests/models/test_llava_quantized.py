"""LLaVA on a language model in 4 bits: opened, trained, saved, opened again and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmfast.adapt import quantize_checkpoint
from mmfast.models import Llava, LoraSpec
from mmfast.models.export import export
from mmfast.nn import QuantizedLinear


@pytest.fixture
def model(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> Llava:
    quantize_checkpoint(tiny_llm, tmp_path / "llm")
    return Llava.from_parts(tmp_path / "llm", tiny_clip, template="short").eval()


def inputs(model: Llava) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[model.config.image_token_id] * 4, 40, 41, 42]])
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**inputs(model)).logits


def test_only_the_language_model_is_quantised_and_the_connector_trains(model: Llava) -> None:
    names = [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(names) == 2 * 7
    assert all(name.startswith("language_model.model.layers.") for name in names)
    model.connector.requires_grad_(True)
    labels = inputs(model)["input_ids"].clone()
    labels[:, :5] = -100
    model(**inputs(model), labels=labels).loss.backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name for name, _ in model.named_parameters() if name.startswith("connector.")} <= gradients
    assert all(parameter.grad.abs().max() > 0 for parameter in model.connector.parameters())


def test_a_saved_run_opens_with_the_same_logits(model: Llava, tmp_path: Path) -> None:
    before = logits(model)
    model.save_trained(tmp_path / "run")
    files = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert files < 2 * sum(parameter.nbytes for parameter in model.connector.parameters())
    assert torch.equal(logits(Llava.from_pretrained(tmp_path / "run")), before)


@pytest.mark.parametrize("to", ["hf", "original"])
def test_an_export_is_dense(model: Llava, tmp_path: Path, to: Any) -> None:
    model.save_trained(tmp_path / "run")
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to) < 1e-3
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    if to == "hf":
        reopened = Llava.from_pretrained(tmp_path / "out")
        assert not any(isinstance(layer, QuantizedLinear) for layer in reopened.modules())
        layer = reopened.get_submodule("language_model.model.layers.0.mlp.up_proj")
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("to", ["hf", "original"])
def test_lora_on_a_quantised_language_model_is_exported_merged(model: Llava, tmp_path: Path, to: Any) -> None:
    frozen = logits(model)
    model.add_lora(LoraSpec(rank=2, alpha=8))
    for name, parameter in model.part_parameters("lora").items():
        nn.init.normal_(parameter, std=0.1 if name.endswith("lora_b") else 0.3)
    assert (logits(model) - frozen).norm() / frozen.norm() > 1e-2
    model.save_trained(tmp_path / "run")
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to) < 1e-3
