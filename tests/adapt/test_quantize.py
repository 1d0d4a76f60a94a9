"""Quantising a model in place: which layers, what is refused, what stays."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmfast.adapt import add_lora, dequantize, quantize
from mmfast.nn import QuantizedLinear
from mmfast.nn.quantized_state import Format

PER_LAYER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 7, 9, 11, 2]])


def llama_config(**options: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**sizes | options)


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**options)).eval().requires_grad_(False)


def llava() -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = LlavaConfig(text_config=llama_config(), vision_config=vision, image_token_index=63)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def quantised_names(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]


def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


@pytest.mark.parametrize(("format", "double_quant"), [("nf4", True), ("nf4", False), ("int8", False)])
def test_the_language_models_linears_and_nothing_else(format: Format, double_quant: bool) -> None:
    model = llama()
    before = logits(model)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = quantize(model, format=format, double_quant=double_quant)
    assert report.layers == quantised_names(model)
    assert {name.rpartition(".")[2] for name in report.layers} == set(PER_LAYER)
    assert len(report.layers) == 2 * len(PER_LAYER)
    elements = sum(dense[f"{name}.weight"].numel() for name in report.layers)
    assert report.bytes_before == 4 * elements
    # Small layers: the table of double quantisation takes 1 KB in each.
    tables = 1024 * len(report.layers) * double_quant
    assert 0.5 * elements < report.bytes_after - tables < (0.57 if format == "nf4" else 1.1) * elements
    for name, tensor in model.state_dict().items():
        if name.rpartition(".weight")[0] not in report.layers and name in dense:
            assert torch.equal(tensor, dense[name])
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < (0.5 if format == "nf4" else 0.05)


def test_a_multimodal_models_encoder_and_projector_stay() -> None:
    model = llava()
    names = quantize(model).layers
    assert names
    assert all(name.startswith("model.language_model.layers.") for name in names)
    pixels = torch.randn(1, 3, 28, 28)
    ids = torch.tensor([[1, 63, 63, 63, 63, 5]])
    assert logits(model, ids, pixel_values=pixels).isfinite().all()
    # A part that is passed itself is quantised.
    tower = CLIPVisionModel(model.config.vision_config).requires_grad_(False)
    assert len(quantize(tower).layers) == 2 * 6


def test_targets_and_skip_choose_by_the_last_component() -> None:
    model = llama()
    assert [name[-6:] for name in quantize(model, ["q_proj", "v_proj"]).layers] == ["q_proj", "v_proj"] * 2
    model = llama()
    assert not {"q_proj", "down_proj"} & {
        n.rpartition(".")[2] for n in quantize(model, skip=["q_proj", "down_proj"])[0]
    }
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    assert quantize(plain, format="int8").layers == ["0", "2"]


def test_each_dense_weight_is_freed_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    alive = [
        weakref.ref(layer.weight.untyped_storage())
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    ]
    seen = []
    original = QuantizedLinear.from_linear

    def counting(*args: Any) -> QuantizedLinear:
        seen.append(sum(reference() is not None for reference in alive))
        return original(*args)

    monkeypatch.setattr(QuantizedLinear, "from_linear", counting)
    gc.disable()
    try:
        quantize(model)
    finally:
        gc.enable()
    # The first call, and the one before the last layer is replaced, hold what is left.
    assert seen == list(range(len(alive), 0, -1))


def test_gradients_go_through_to_the_input_and_biases() -> None:
    model = llama(attention_bias=True)
    quantize(model)
    model.model.layers[0].self_attn.q_proj.bias.requires_grad_()
    embeds = torch.randn(1, 6, 64, requires_grad=True)
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().max() > 0
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == ["model.layers.0.self_attn.q_proj.bias"]


def test_generation_and_gradient_checkpointing() -> None:
    model = llama()
    quantize(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    again = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
    assert torch.equal(out, again)

    def grad() -> Tensor:
        embeds = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()
        assert embeds.grad is not None
        return embeds.grad

    plain = grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert torch.equal(grad(), plain)


def test_dequantize_gives_plain_layers_back() -> None:
    model = llama().to(torch.bfloat16)
    quantize(model)
    before = logits(model)
    layers = quantised_names(model)
    assert dequantize(model) == layers
    assert not quantised_names(model)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in layers)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    error = (logits(model) - before).float().norm() / before.float().norm()
    assert error < 2e-2
    model = llama()
    quantize(model, format="int8")
    dequantize(model, torch.float16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    assert dequantize(model) == []


def test_a_layer_used_twice_is_replaced_in_both_places() -> None:
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}).requires_grad_(False)
    quantize(model)
    assert isinstance(model["a"], QuantizedLinear)
    assert cast(nn.Sequential, model["b"])[0] is model["a"]
    dequantize(model)
    assert cast(nn.Sequential, model["b"])[0] is model["a"]
    assert type(model["a"]) is nn.Linear


def trained() -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_()
    return model


def infinite() -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = float("inf")
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8)}).requires_grad_(False)
    model["out"].weight = cast(nn.Embedding, model["embed"]).weight  # type: ignore[assignment]
    return model


def adapted() -> nn.Module:
    model = llama()
    add_lora(model, ["up_proj"], rank=2, alpha=4)
    return model


def already() -> nn.Module:
    model = llama()
    quantize(model, ["up_proj"])
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (trained, {}, ValueError, r"layers\.1\.mlp\.up_proj is trained.*requires_grad_\(False\)"),
        (infinite, {}, ValueError, r"layers\.1\.mlp\.up_proj holds an infinity or NaN"),
        (tied, {}, ValueError, r"the weight of out is tied to embed\.weight"),
        (adapted, {}, TypeError, r"layers\.0\.mlp\.up_proj is a LoRALinear; a torch\.nn\.Linear is accepted"),
        (already, {}, TypeError, r"layers\.0\.mlp\.up_proj is a QuantizedLinear"),
        (lambda: llama().to("meta"), {}, ValueError, r"q_proj is on the meta device"),
        (lambda: llama().double(), {}, TypeError, r"q_proj is torch\.float64; expected float32"),
        (lambda: nn.Sequential(nn.Linear(3, 4)).requires_grad_(False), {}, ValueError, r"of 0 is \[4, 3\]; NF4 takes"),
        (llama, {"targets": ["w1"]}, ValueError, r"no linear layer is named \['w1'\].*'down_proj', 'gate_proj'"),
        (llama, {"targets": ["lm_head"]}, ValueError, r"no linear layer is named \['lm_head'\]"),
        (llama, {"targets": "q_proj"}, TypeError, r"targets is the string 'q_proj'; a list"),
        (llama, {"skip": "q_proj"}, TypeError, r"skip is the string 'q_proj'; a list"),
        (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, "no linear layer is named anything"),
        (llama, {"format": "fp4"}, ValueError, "format is 'fp4'"),
    ],
)
def test_what_cannot_be_quantised_is_refused_by_name_and_nothing_changes(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = model()
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        quantize(model, **options)
    assert dict(model.named_modules()) == before


def test_dequantize_refuses_the_layer_itself() -> None:
    with pytest.raises(ValueError, match="itself is the QuantizedLinear"):
        dequantize(QuantizedLinear(4, 4))
