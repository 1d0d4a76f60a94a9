"""Stages: what they freeze, what receives a gradient, and the published numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mmfast.models import Llava, LlavaConfig, LoraSpec, Stage

SMALL = LoraSpec(rank=2, alpha=4)


def with_small_lora(stage: Stage) -> Stage:
    return replace(stage, lora=SMALL) if stage.lora else stage


@pytest.mark.parametrize("name", ["align", "instruct", "instruct_lora"])
@pytest.mark.parametrize("tied", [False, True])
def test_set_stage_trains_what_it_says(tiny: Any, name: str, tied: bool) -> None:
    model = tiny.llava(tied=tied).train()
    stage = with_small_lora(model.stages()[name])
    model.set_stage(stage)
    model(**tiny.batch()).loss.backward()
    trained = {key for part in stage.train for key in model.part_parameters(part)}
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (key in trained), key
        if key not in trained:
            assert parameter.grad is None, key
            continue
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # B starts at zero, so A's first gradient is zero. Softmax does not see the bias of the keys.
        if not key.endswith(("lora_a", "k_proj.bias")):
            assert parameter.grad.any(), key


def test_set_stage_moves_every_trained_tensor_and_no_other(tiny: Any) -> None:
    model = tiny.llava().train()
    stage = with_small_lora(model.stages()["instruct_lora"])
    model.set_stage(stage)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameter_groups(stage))
    for _ in range(2):
        optimizer.zero_grad()
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) != parameter.requires_grad, key


def test_lora_leaves_the_first_logits_unchanged(tiny: Any) -> None:
    model, inputs = tiny.llava(), tiny.batch()
    before = model(**{**inputs, "labels": None}).logits
    model.set_stage(with_small_lora(model.stages()["instruct_lora"]))
    assert torch.equal(model(**{**inputs, "labels": None}).logits, before)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_groups_hold_each_trained_tensor_once(tiny: Any, tied: bool) -> None:
    model = tiny.llava(tied=tied)
    stage = model.stages()["instruct"]
    model.set_stage(stage)
    groups = model.parameter_groups(stage)
    assert [(group["name"], group["lr"]) for group in groups] == [("connector", 2e-5), ("language_model", 2e-5)]
    params = [id(p) for group in groups for p in group["params"]]
    assert len(params) == len(set(params))
    assert set(params) == {id(p) for p in model.parameters() if p.requires_grad}


def test_stages_are_the_published_ones(tiny: Any) -> None:
    stages = tiny.llava().stages()
    assert {name: dict(stage.train) for name, stage in stages.items()} == {
        "align": {"connector": 1e-3},
        "instruct": {"connector": 2e-5, "language_model": 2e-5},
        "instruct_lora": {"connector": 2e-5, "lora": 2e-4},
    }
    lora = stages["instruct_lora"].lora
    assert (lora.rank, lora.alpha, lora.dropout) == (128, 256, 0.05)
    assert [stage.template for stage in stages.values()] == ["plain", "vicuna_v1", "vicuna_v1"]
    assert tiny.llava(connector="linear").stages()["align"].train == {"connector": 2e-3}


@pytest.mark.parametrize(
    ("hidden", "layers", "inner", "heads", "connector", "lora"),
    [
        (4096, 32, 11008, 32, 20_979_712, 319_815_680),
        (5120, 40, 13824, 40, 31_467_520, 500_695_040),
    ],
)
def test_parameter_table_has_the_published_counts(
    hidden: int, layers: int, inner: int, heads: int, connector: int, lora: int
) -> None:
    text = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = Llava(LlavaConfig(text_config=text, vision_config=vision))
    assert model.encoder.num_patches == 576
    assert sum(tensor.numel() for tensor in model.encoder.complete_state_dict().values()) == 303_507_456
    model.set_stage(model.stages()["instruct_lora"])
    rows = {row.split()[0]: row.split()[1:] for row in model.parameter_table().splitlines()}
    assert rows["connector"] == [f"{connector:,}"] * 2
    assert rows["lora"] == [f"{lora:,}"] * 2
    assert rows["all"][0] == f"{connector + lora:,}"
    assert rows["encoder"][0] == rows["language_model"][0] == "0"


def test_set_stage_refusals(tiny: Any) -> None:
    model = tiny.llava()
    with pytest.raises(ValueError, match="'x' trains encoder; accepted are connector"):
        model.set_stage(Stage("x", "plain", {"encoder": 1e-5}))
    with pytest.raises(ValueError, match="'x' trains conector; accepted are connector"):
        model.set_stage(Stage("x", "plain", {"conector": 1e-5}))
    with pytest.raises(ValueError, match="trains lora but neither it nor the model has one"):
        model.set_stage(Stage("x", "plain", {"lora": 1e-5}))
    model.add_lora(SMALL)
    with pytest.raises(ValueError, match=r"rank=4.* but the model has .*rank=2"):
        model.set_stage(Stage("x", "plain", {"lora": 1e-5}, LoraSpec(4, 4)))
    with pytest.raises(ValueError, match="trains the language model under its LoRA"):
        model.set_stage(model.stages()["instruct"])


def test_merge_lora_keeps_the_logits_and_the_saved_parts(tiny: Any) -> None:
    model, inputs = tiny.llava(), tiny.batch()
    model.set_stage(with_small_lora(model.stages()["instruct_lora"]))
    with torch.no_grad():
        for parameter in model.part_parameters("lora").values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    before = model(**{**inputs, "labels": None}).logits
    model.merge_lora()
    torch.testing.assert_close(model(**{**inputs, "labels": None}).logits, before, rtol=1e-4, atol=1e-4)
    assert model.trained_parts == {"connector", "language_model"}
    model.set_stage(model.stages()["instruct"])
