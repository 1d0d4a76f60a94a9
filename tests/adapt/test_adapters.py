"""add_lora, add_bias_scale, remove and merge on a tiny Llama, and against the peft package."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mmfast.adapt import (
    add_bias_scale,
    add_lora,
    dequantize,
    has_adapters,
    has_lora,
    lora_parameters,
    merge,
    merged_state_dict,
    quantize,
    remove,
)
from mmfast.nn import BiasLoRALinear, LoRALinear, QuantizedLinear

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9, 30, 7], [1, 4, 4, 2, 11]])


def tiny_llama(**options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": False, **options},
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def randomise(model: nn.Module) -> None:
    """Gives the adapters values of the size that training gives them."""
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model).values():
        parameter.data.normal_(0.0, 0.05, generator=generator)


def train_values(model: nn.Module) -> None:
    """The same for adapters of every kind."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "adapter_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_logits_at_the_start_are_the_frozen_models_bit_for_bit() -> None:
    model = tiny_llama()
    before = logits(model)
    names = add_lora(model, ALL, rank=4, alpha=8)
    assert len(names) == 2 * len(ALL)
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert all(isinstance(model.get_submodule(name), LoRALinear) for name in names)
    assert torch.equal(logits(model), before)


def test_only_the_adapters_get_a_gradient() -> None:
    model = tiny_llama().requires_grad_(False)
    add_lora(model, ["q_proj", "down_proj"], rank=4, alpha=8)
    randomise(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == set(lora_parameters(model))
    assert len(trained) == 2 * 2 * 2


def test_base_keys_do_not_change_and_old_checkpoints_load() -> None:
    model = tiny_llama()
    old = copy.deepcopy(model.state_dict())
    add_lora(model, ALL, rank=4, alpha=8)
    result = model.load_state_dict(old, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(lora_parameters(model))


def test_remove_restores_the_model_bit_for_bit() -> None:
    model = tiny_llama()
    before, weights, modules = logits(model), copy.deepcopy(model.state_dict()), repr(model)
    names = add_lora(model, ALL, rank=4, alpha=8)
    randomise(model)
    assert not torch.equal(logits(model), before)
    assert remove(model) == names
    assert not has_lora(model)
    assert repr(model) == modules
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert remove(model) == []


def test_merge_equals_the_unmerged_model() -> None:
    model = tiny_llama()
    add_lora(model, ALL, rank=4, alpha=8)
    randomise(model)
    unmerged, original = logits(model), copy.deepcopy(remove_copy(model).state_dict())
    layer = copy.deepcopy(model.model.layers[1].mlp.up_proj)
    report = merge(model)
    assert not has_lora(model)
    assert not any("lora" in key for key in model.state_dict())
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-5)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, original[key])}
    assert changed == {f"{name}.weight" for name in report}
    assert report["model.layers.1.mlp.up_proj"] == layer.merge()
    assert list(report) == [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][:-1]


def remove_copy(model: nn.Module) -> nn.Module:
    base = copy.deepcopy(model)
    remove(base)
    return base


def test_merge_of_bfloat16_rounds_the_exact_sum() -> None:
    model = tiny_llama().to(torch.bfloat16)
    add_lora(model, ["q_proj"], rank=4, alpha=8)
    randomise(model)
    layer = model.model.layers[0].self_attn.q_proj
    exact = layer.weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    report = merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))
    assert all(drift.unmerged > 0 for drift in report.values())


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_merge_makes_quantised_bases_dense_in_the_given_dtype(format: Any) -> None:
    model = tiny_llama().requires_grad_(False)
    quantize(model, format=format)
    add_lora(model, ["q_proj"], rank=4, alpha=8)
    add_bias_scale(model, ["up_proj"], "output")
    train_values(model)
    before = logits(model)
    state = merged_state_dict(model)
    assert set(merge(model, torch.float64)) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    merged = model.model.layers[0].mlp.up_proj
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == merged.bias.dtype == torch.float64
    assert type(model.model.layers[0].mlp.down_proj) is QuantizedLinear
    dequantize(model)
    assert (logits(model.float()) - before).norm() / before.norm() < 1e-5
    plain = tiny_llama()
    for layer in plain.model.layers:
        layer.mlp.up_proj.bias = nn.Parameter(torch.empty(48))
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in state.items() if "q_proj" in k or "up_proj" in k}})
    assert torch.equal(plain.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_dequantising_keeps_the_adapters() -> None:
    model = tiny_llama().requires_grad_(False)
    quantize(model, format="int8")
    add_lora(model, ["q_proj"], rank=4, alpha=8)
    randomise(model)
    before = logits(model)
    assert "model.layers.0.self_attn.q_proj" in dequantize(model)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight_format is None
    assert (logits(model) - before).norm() / before.norm() < 1e-5
    layer.merge()


def test_merged_state_dict_is_what_merge_gives_and_touches_nothing() -> None:
    model = tiny_llama()
    add_lora(model, ALL, rank=4, alpha=8)
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    state = merged_state_dict(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merge(model)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("scale_on", ["output", "input", "none"])
def test_bias_scale_starts_as_the_model_trains_alone_and_merges(scale_on: Any) -> None:
    model = tiny_llama().requires_grad_(False)
    before = logits(model)
    names = add_bias_scale(model, scale_on=scale_on)
    assert len(names) == 2 * len(ALL)
    assert torch.equal(logits(model), before)
    train_values(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    ends = ("adapter_bias",) if scale_on == "none" else ("adapter_bias", "adapter_scale")
    assert trained == {f"{name}.{end}" for name in names for end in ends}
    after, state = logits(model), merged_state_dict(model)
    assert (after - before).norm() / before.norm() > 1e-2
    merge(model)
    assert (logits(model) - after).norm() / after.norm() < 1e-5
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_lora_joins_trained_biases() -> None:
    model = tiny_llama().requires_grad_(False)
    plain, before = repr(model), logits(model)
    biases = add_bias_scale(model, ["q_proj", "down_proj"], "none")
    train_values(model)
    with_biases = logits(model)
    add_lora(model, ALL, rank=4, alpha=8)
    torch.testing.assert_close(logits(model), with_biases, rtol=1e-5, atol=1e-5)
    assert {type(layer) for name, layer in model.named_modules() if name in biases} == {BiasLoRALinear}
    randomise(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == set(lora_parameters(model)) | {f"{name}.adapter_bias" for name in biases}
    assert len(lora_parameters(model)) == 2 * 2 * len(ALL)
    after, state, other = logits(model), merged_state_dict(model), copy.deepcopy(model)
    assert (after - with_biases).norm() / after.norm() > 1e-2
    with pytest.raises(ValueError, match=r"q_proj has an adapter already, a BiasLoRALinear"):
        add_lora(model, ["q_proj"], rank=4, alpha=8)
    merge(model)
    assert (logits(model) - after).norm() / after.norm() < 1e-5
    assert state.keys() == model.state_dict().keys()
    remove(other)
    assert repr(other) == plain and torch.equal(logits(other), before)


def test_lora_and_bias_scale_are_removed_alike() -> None:
    model = tiny_llama()
    before, modules = logits(model), repr(model)
    add_lora(model, ["q_proj"], rank=4, alpha=8)
    add_bias_scale(model, ["v_proj", "1.mlp.up_proj"])
    train_values(model)
    assert has_adapters(model)
    assert len(remove(model)) == 2 + 2 + 1
    assert not has_adapters(model)
    assert repr(model) == modules
    assert torch.equal(logits(model), before)


def test_layers_merged_in_place_are_kept_and_cannot_be_removed() -> None:
    model = tiny_llama()
    add_lora(model, ["q_proj", "k_proj"], rank=4, alpha=8)
    randomise(model)
    before, layer = logits(model), model.model.layers[0].self_attn.q_proj
    layer.merge()
    weight = layer.weight
    with pytest.raises(ValueError, match=r"remove: model.layers.0.self_attn.q_proj and 0 more layers are merged"):
        remove(model)
    assert merged_state_dict(model).keys() == tiny_llama().state_dict().keys()
    assert "model.layers.0.self_attn.q_proj" not in merge(model)
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    assert (logits(model) - before).norm() / before.norm() < 1e-6


def test_default_targets_are_all_linear_layers_but_the_head() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    assert len(add_lora(model, rank=2, alpha=2)) == 2 * len(ALL)
    assert type(model.lm_head) is nn.Linear
    outer = nn.ModuleDict({"llm": tiny_llama(), "connector": nn.Linear(3, 32)})
    assert "connector" in add_lora(outer, rank=2, alpha=2)
    assert type(outer["llm"].lm_head) is nn.Linear


def test_merged_state_dict_without_lora_is_the_state_dict() -> None:
    model = tiny_llama()
    assert merged_state_dict(model).keys() == model.state_dict().keys()


def test_equals_peft_with_the_same_adapters() -> None:
    model = tiny_llama()
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=ALL, lora_dropout=0.0, bias="none")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    add_lora(model, ALL, rank=4, alpha=16)
    randomise(model)
    for name, parameter in lora_parameters(model).items():
        layer, _, which = name.rpartition(".")
        letter = {"lora_a": "lora_A", "lora_b": "lora_B"}[which]
        other = theirs.get_parameter(f"base_model.model.{layer}.{letter}.default.weight")
        assert other.shape == parameter.shape
        other.data.copy_(parameter.data)
    ours_out, theirs_out = logits(model), logits(theirs)
    assert (ours_out - theirs_out).norm() / theirs_out.norm() < 1e-6
    model(input_ids=IDS, labels=IDS).loss.backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    gradient = model.model.layers[0].self_attn.v_proj.lora_a.grad
    expected = theirs.get_parameter("base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight").grad
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    merge(model)
    merged = logits(theirs.merge_and_unload())
    assert (logits(model) - merged).norm() / merged.norm() < 1e-6


def test_a_layer_used_twice_is_replaced_in_both_places() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": nn.ModuleDict({"proj": shared}), "second": nn.ModuleDict({"proj": shared})})
    assert add_lora(model, ["proj"], rank=2, alpha=2) == ["first.proj", "second.proj"]
    assert model["first"]["proj"] is model["second"]["proj"]
    assert len(lora_parameters(model)) == 2
    remove(model)
    add_lora(model, ["second.proj"], rank=2, alpha=2)
    assert model["first"]["proj"] is model["second"]["proj"]
    merge(model)
    assert model["first"]["proj"] is model["second"]["proj"]


def test_nothing_changes_when_one_layer_is_refused() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="weight of lm_head is tied to model"):
        add_lora(model, ["q_proj", "lm_head"], rank=2, alpha=2)
    assert not has_lora(model)


def test_wrong_targets_are_named() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"no layer is named \['query'\].*'q_proj'"):
        add_lora(model, ["q_proj", "query"], rank=2, alpha=2)
    with pytest.raises(ValueError, match=r"no layer is named \[\]"):
        add_lora(model, [], rank=2, alpha=2)
    with pytest.raises(TypeError, match="the string 'q_proj'"):
        add_lora(model, "q_proj", rank=2, alpha=2)
    with pytest.raises(TypeError, match="mlp is a LlamaMLP"):
        add_lora(model, ["mlp"], rank=2, alpha=2)
    assert not has_lora(model)


def test_a_second_adapter_on_a_layer_and_a_merge_without_one_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match="merge: the module has no adapters"):
        merge(model)
    add_lora(model, ["q_proj"], rank=2, alpha=2)
    with pytest.raises(ValueError, match=r"add_bias_scale: .*0\.self_attn.q_proj has an adapter already, a LoRALinear"):
        add_bias_scale(model, ["v_proj", "q_proj"])
    add_lora(model, ["v_proj"], rank=3, alpha=2)
    for function in (remove, merge):
        with pytest.raises(ValueError, match="the module itself is the LoRALinear"):
            function(model.model.layers[0].self_attn.q_proj)
