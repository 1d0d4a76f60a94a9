"""load_bias_scale: the layout of LLaMA-Adapter V2's 65B chat model on tiny Llamas of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimized_models import make, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mmfast.adapt import add_bias_scale, bias_scale_state, has_adapters, load_bias_scale

LINEARS = {"attention": ("wq", "wk", "wv", "wo"), "feed_forward": ("w1", "w2", "w3")}


def chat_65b(layers: int, hidden: int, kv: int, ffn: int) -> dict[str, Tensor]:
    """Biases as long as the output, scales as the input."""
    sizes = {"wq": (hidden, hidden), "wk": (kv, hidden), "wv": (kv, hidden), "wo": (hidden, hidden)}
    sizes |= {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}
    shapes = {"norm.weight": hidden}
    for i in range(layers):
        for block, names in LINEARS.items():
            for name in names:
                shapes[f"layers.{i}.{block}.{name}_bias"], shapes[f"layers.{i}.{block}.{name}_scale"] = sizes[name]
        shapes |= {f"layers.{i}.{name}.weight": hidden for name in ("attention_norm", "ffn_norm")}
    generator = torch.Generator().manual_seed(0)
    return {name: 1 + 0.3 * torch.randn(size, generator=generator) for name, size in shapes.items()}


def state_of(model: Any) -> dict[str, Tensor]:
    config = model.config
    kv = config.num_key_value_heads * model.model.layers[0].self_attn.head_dim
    return chat_65b(config.num_hidden_layers, config.hidden_size, kv, config.intermediate_size)


def test_comes_back_bit_for_bit() -> None:
    model = make("llama")
    state = state_of(model)
    names = load_bias_scale(model, state)
    assert len(names) == 7 * model.config.num_hidden_layers
    found = bias_scale_state(model)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@torch.no_grad()
def test_is_the_model_with_these_weights_in_metas_order() -> None:
    """y = W (s ⊙ x) + b: folded into a plain Llama's weights, and q and k brought from Meta's order of channels."""
    model, plain = make("llama").eval(), make("llama").double().eval()
    state = state_of(model)
    head = model.model.layers[0].self_attn.head_dim
    order = torch.cat([torch.arange(0, head, 2), torch.arange(1, head, 2)])
    for i, layer in enumerate(plain.model.layers):
        linears = dict(zip(("wq", "wk", "wv", "wo"), ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True))
        found = {theirs: ("attention", layer.self_attn.get_submodule(ours)) for theirs, ours in linears.items()}
        found |= {
            theirs: ("feed_forward", layer.mlp.get_submodule(ours))
            for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
        }
        for theirs, (block, linear) in found.items():
            scale, bias = (state[f"layers.{i}.{block}.{theirs}_{end}"].double() for end in ("scale", "bias"))
            linear.weight.mul_(scale)
            if theirs in ("wq", "wk"):
                bias = bias.unflatten(0, (-1, head))[:, order].flatten()
            linear.bias = nn.Parameter(bias)
        layer.input_layernorm.weight.copy_(state[f"layers.{i}.attention_norm.weight"])
        layer.post_attention_layernorm.weight.copy_(state[f"layers.{i}.ffn_norm.weight"])
    plain.model.norm.weight.copy_(state["norm.weight"])
    load_bias_scale(model, state)
    expected = plain(tokens()).logits
    found_logits = model(tokens()).logits.double()
    assert (found_logits - expected).norm() < 1e-4 * expected.norm()


def test_the_counts_of_the_65b() -> None:
    config = LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    add_bias_scale(model, scale_on="input")
    counts = {"bias": 0, "scale": 0, "norm": 0}
    for name, parameter in model.named_parameters():
        for kind in counts:
            if name.endswith(f"adapter_{kind}") or (kind == "norm" and "norm" in name):
                counts[kind] += parameter.numel()
    assert counts == {"bias": 6_799_360, "scale": 5_693_440, "norm": 1_310_720 + 8_192}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.0.attention.wq_bias"), r"1 missing: layers\.0\.attention\.wq_bias"),
        (lambda s: s.update({"adapter_query.weight": torch.zeros(3)}), "1 unexpected: adapter_query.weight"),
        (lambda s: s.update({"layers.1.feed_forward.w2_scale": torch.ones(3)}), r"1 of another shape: layers\.1\.feed"),
    ],
)
def test_what_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    model = make("llama")
    state = state_of(model)
    change(state)
    with pytest.raises(ValueError, match=message):
        load_bias_scale(model, state)
    assert not has_adapters(model)


def test_norms_may_be_absent_and_other_forms_have_no_place() -> None:
    model = make("llama")
    before = model.model.norm.weight.detach().clone()
    load_bias_scale(model, {name: x for name, x in state_of(model).items() if not name.endswith("norm.weight")})
    assert torch.equal(model.model.norm.weight, before)
    other = make("llama")
    add_bias_scale(other)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj is .*scale on the input"):
        bias_scale_state(other)
