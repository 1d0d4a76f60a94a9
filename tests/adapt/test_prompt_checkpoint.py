"""load_prompts: files of LLaMA-Adapter and of PEFT, whose logits are those of the real package."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from optimized_models import make, tokens
from torch import Tensor, nn

from mmfast.adapt import load_prompts
from mmfast.nn import ZeroInitAttention

LAYERS, HEADS, HIDDEN = 3, 4, 32


def tiny(name: str = "llama") -> Any:
    options = {"sliding_window": None} if name == "mistral" else {}
    return make(name, num_hidden_layers=LAYERS, **options).eval()


def official(layers: int = 2, prompts: int = 10) -> dict[str, Tensor]:
    """A file of LLaMA-Adapter: prompts of the last layers, gates of all."""
    state = {"adapter_query.weight": torch.randn(layers * prompts, HIDDEN)}
    for index in range(LAYERS):
        gate = torch.randn(1, HEADS, 1, 1) * (index >= LAYERS - layers)
        state[f"layers.{index}.attention.gate"] = gate
    return state


def zero_init(model: nn.Module) -> list[ZeroInitAttention]:
    return [module for module in model.modules() if isinstance(module, ZeroInitAttention)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_official(activation: Any) -> None:
    model, state = tiny(), official(prompts=5)
    names = load_prompts(model, state, prompt_length=5, gate_activation=activation)
    assert names == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    for index, module in enumerate(zero_init(model)):
        assert torch.equal(module.prompt, state["adapter_query.weight"][5 * index : 5 * index + 5])
        assert torch.equal(module.gate, state[f"layers.{index + 1}.attention.gate"].flatten())
        assert module.gate_activation == activation
    assert not torch.allclose(logits(model), logits(tiny()))
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"prompt", "gate"}


def test_ten_prompts_and_tanh_are_the_default() -> None:
    model = tiny()
    load_prompts(model, official(layers=3))
    assert [(module.prompt_length, module.gate_activation) for module in zero_init(model)] == [(10, "tanh")] * 3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_logits_of_peft(name: str) -> None:
    config = peft.AdaptionPromptConfig(adapter_len=6, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny(name), config)
    for key, parameter in theirs.named_parameters():
        if key.endswith("adaption_gate"):
            parameter.data.normal_()
    state = peft.get_peft_model_state_dict(theirs)
    ours = tiny(name)
    assert load_prompts(ours, state) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    theirs.eval()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(ours) - logits(tiny(name))).abs().max() > 0.1


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name != key}


PEFT = {
    "base_model.model.model.layers.2.self_attn.adaption_prompt": torch.zeros(1, 6, HIDDEN),
    "base_model.model.model.layers.2.self_attn.adaption_gate": torch.zeros(1),
}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "it is empty"),
        ({"lm_head.weight": torch.zeros(1)}, "unexpected: lm_head.weight"),
        (official() | {"layers.0.attention.wq.weight": torch.zeros(1)}, "unexpected: layers.0.attention.wq.weight"),
        (official(prompts=7), r"has 14 rows, not 10 \(prompt_length\) for each of up to 3 layers"),
        (without(official(), "layers.2.attention.gate"), "layer 2 has no gate"),
        (official() | {"layers.3.attention.gate": torch.zeros(1, HEADS, 1, 1)}, "layer 3 has no prompt"),
        (official() | {"layers.2.attention.gate": torch.zeros(1, 2, 1, 1)}, r"gate of layer 2 is \[1, 2, 1, 1\], not"),
        (official() | {"adapter_query.weight": torch.zeros(20, 8)}, r"prompt of layer 1 is \[10, 8\], not \[10, 32\]"),
        (PEFT | {"model.layers.2.self_attn.adaption_gate": torch.zeros(1)}, "unexpected: model.layers.2.self_attn.ad"),
        ({key.replace(".2.", ".7."): tensor for key, tensor in PEFT.items()}, "layer 7 is unknown: the model has 3"),
        (dict(list(PEFT.items())[1:]), "layer 2 has no prompt"),
        ({key: tensor[..., :1] for key, tensor in PEFT.items()}, r"prompt of layer 2 is \[1, 6, 1\], not \[6, 32\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(state: dict[str, Tensor], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=f"load_prompts: the checkpoint does not fit .*{message}"):
        load_prompts(model, state)
    assert not zero_init(model) and all(p.requires_grad for p in model.parameters())


def test_a_model_with_prompts_is_refused() -> None:
    model = tiny()
    load_prompts(model, official())
    with pytest.raises(ValueError, match=r"layers \[1, 2\] have prompts already"):
        load_prompts(model, official())
