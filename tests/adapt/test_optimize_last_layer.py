"""The last decoder layer at labelled positions alone computes the loss and the gradients of all positions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimized_models import CONFIGS, SIZES, assert_same, labelled, make, step, tokens, watch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, LlamaForCausalLM, Phi3Config

import mmfast
from mmfast.adapt.optimize.last_layer import labelled_rows, refusal

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Of the 33 positions of `labelled()`, those whose next token has a label: 7 in two rows, 4 in the padded one.
LABELLED = 18


def padded(side: str) -> dict[str, Tensor]:
    batch = labelled()
    if side == "left":
        mask = batch["attention_mask"]
        batch = {name: value.flip(1) for name, value in batch.items()}
        batch["attention_mask"] = mask.flip(1)
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return batch


# In float64 transformers' eager attention gives NaN for padding on the left.
@pytest.mark.parametrize(("attention", "side"), [("sdpa", "left"), ("sdpa", "right"), ("eager", "right")])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_exact(name: str, attention: str, side: str) -> None:
    model, batch = make(name, torch.float64, attn_implementation=attention), padded(side)
    # The loss of transformers is float32.
    labels = batch.pop("labels")
    loss = F.cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), labels[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    mmfast.optimize(model, ops=["loss"])
    shapes = watch(model.model.layers[-1].mlp.down_proj)
    output, found = step(model, {**batch, "labels": labels})
    assert shapes == [(int((labels[:, 1:] != -100).sum()), 48)]
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=0)
    assert_same(found, gradients, 1e-12)


@pytest.mark.parametrize("ops", [["loss"], None])
def test_only_labelled_positions_are_computed(ops: list[str] | None) -> None:
    model, batch = make(), labelled()
    layers = [{name: watch(child) for name, child in named_projections(layer)} for layer in model.model.layers]
    assert mmfast.optimize(model, ops=ops).left == []
    step(model, batch)
    for name in PROJECTIONS:
        assert layers[0][name] == [(3, 11, 48 if name == "down_proj" else 32)]
    assert {layers[1][name][0] for name in ("q_proj", "k_proj", "v_proj")} == {(3, 11, 32)}
    assert {layers[1][name][0] for name in ("o_proj", "gate_proj", "up_proj")} == {(LABELLED, 32)}
    assert layers[1]["down_proj"] == [(LABELLED, 48)]
    # Evaluation, too; and nothing of it stays.
    with torch.no_grad():
        model.eval()(**batch)
    model(**batch, output_logits=True)
    model(batch["input_ids"])
    assert [shape[0] for shape in layers[1]["gate_proj"]] == [LABELLED, LABELLED, 3, 3]


def named_projections(layer: Any) -> list[tuple[str, nn.Module]]:
    return [(name.split(".")[-1], child) for name, child in layer.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = make(), labelled()
    model.enable_input_require_grads()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    shapes = watch(model.model.layers[-1].mlp.gate_proj)
    _, found = step(model, {**batch, "use_cache": True})  # type: ignore[dict-item]
    assert shapes == [(LABELLED, 32)] * 2, "the layer must run again in backward, at the same positions"
    assert_same(found, gradients, 1e-5)


def test_autocast() -> None:
    model, batch = make(), labelled()
    full = copy.deepcopy(model)
    mmfast.optimize(model)
    mmfast.optimize(full)
    with torch.autocast("cpu", torch.bfloat16):
        output, found = step(model, batch)
        expected, gradients = step(full, batch, output_logits=True)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-2, atol=1e-2)
    assert_same(found, gradients, 3e-2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False)
    model, batch = get_peft_model(make(dtype=torch.float64), config), labelled()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    shapes = watch(model.get_base_model().model.layers[-1].mlp.down_proj)
    _, found = step(model, batch)
    assert shapes == [(LABELLED, 48)] * (1 + checkpointing)
    assert len(found) == 28
    assert_same(found, gradients, 1e-6)


def test_dropout_of_lora_is_that_of_the_labelled_positions() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["down_proj"], lora_dropout=0.5, init_lora_weights=False)
    model, batch = get_peft_model(make(), config), labelled()
    exact = model.eval()(**batch).loss
    mmfast.optimize(model)
    with torch.no_grad():
        losses = torch.stack([model.train()(**batch).loss for _ in range(64)])
    assert losses.std() > 0
    assert abs(losses.mean() - exact) < 0.1 * exact
    _, gradients = step(model, batch)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("weight_format", ["int8", "nf4"])
def test_quantised_projections(weight_format: Any) -> None:
    model, batch = make(hidden_size=64, intermediate_size=128, head_dim=16), labelled()
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    mmfast.adapt.quantize(model, format=weight_format)
    mmfast.optimize(model)
    expected, gradients = step(model, batch, output_logits=True)
    shapes = watch(model.model.layers[-1].self_attn.o_proj)
    output, found = step(model, batch)
    assert shapes == [(LABELLED, 64)]
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(found, gradients, 1e-5)


def test_the_cache_holds_all_positions() -> None:
    model, batch = make(), labelled()
    expected = model(**batch, use_cache=True).past_key_values
    mmfast.optimize(model)
    found = model(**batch, use_cache=True).past_key_values
    for layer, reference in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer.keys, reference.keys)
        torch.testing.assert_close(layer.values, reference.values)


def test_shift_labels_and_another_ignored_index() -> None:
    model, batch = make(), labelled()
    shifted = batch["labels"].roll(-1, 1)
    shifted[:, -1] = 0
    shifted = shifted.masked_fill(shifted == -100, 0)
    arguments = {**batch, "shift_labels": shifted, "ignore_index": 0, "num_items_in_batch": 5}
    expected, gradients = step(model, arguments)
    mmfast.optimize(model)
    shapes = watch(model.model.layers[-1].mlp.gate_proj)
    output, found = step(model, arguments)
    assert shapes == [(int((shifted != 0).sum()), 32)]
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(found, gradients, 1e-5)


def test_all_or_none_labelled() -> None:
    model = make()
    _, gradients = step(model, {"input_ids": tokens(), "shift_labels": tokens(1), "labels": tokens(1)})
    mmfast.optimize(model)
    shapes = watch(model.model.layers[-1].mlp.gate_proj)
    _, found = step(model, {"input_ids": tokens(), "shift_labels": tokens(1), "labels": tokens(1)})
    assert_same(found, gradients, 1e-5)
    output, found = step(model, {"input_ids": tokens(), "labels": torch.full((3, 11), -100)})
    assert output.loss == 0
    assert found.keys() == gradients.keys()
    assert not any(gradient.any() for gradient in found.values())
    assert shapes == [(3, 11, 32)] * 2


def test_nothing_stays_after_an_error() -> None:
    model, batch = make(), labelled()
    mmfast.optimize(model)
    before = list(model.model.layers)
    expected = model(**batch).loss
    with pytest.raises(IndexError):
        model(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] != -100, 97)})
    attention = before[-1].self_attn
    attention.o_proj.weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(RuntimeError):
        model(**batch)
    assert list(model.model.layers) == before
    assert not attention.o_proj._forward_pre_hooks
    attention.o_proj.weight = make().model.layers[-1].self_attn.o_proj.weight
    torch.testing.assert_close(model(**batch).loss, expected)


def test_layers_compiled_below_keep_one_graph() -> None:
    torch._dynamo.reset()
    model, batch = make(), labelled()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    model.model.layers[0].compile(fullgraph=True, backend="eager")
    shapes = watch(model.model.layers[-1].mlp.gate_proj)
    _, found = step(model, batch)
    assert shapes == [(LABELLED, 32)]
    assert_same(found, gradients, 1e-5)


def change_mlp(model: Any) -> None:
    class DoubledMLP(type(model.model.layers[-1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[-1].mlp.__class__ = DoubledMLP


def run_fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def put_forward_on_layer(model: Any) -> None:
    layer = model.model.layers[-1]
    layer.forward = layer.forward


def put_forward_on_projection(model: Any) -> None:
    projection = model.model.layers[-1].mlp.down_proj
    plain = projection.forward
    projection.forward = lambda x: plain(x)


def compile_attention(model: Any) -> None:
    model.model.layers[-1].self_attn.compile(backend="eager")


def hook(path: str) -> Callable[[Any], None]:
    def register(model: Any) -> None:
        model.get_submodule(path).register_forward_hook(lambda module, args, output: None)

    return register


LAST = "model.layers.1"
SEEN = "a hook sees what its last layer computes, or a part of that is compiled or has a forward of its own"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_mlp, "the MLP of its last layer: its forward is not that of LlamaMLP"),
        (run_fewer_layers, "the decoder runs 1 of 2 layers"),
        (put_forward_on_layer, "its last layer has hooks or is compiled"),
        (put_forward_on_projection, SEEN),
        (compile_attention, SEEN),
        (hook(LAST), "its last layer has hooks or is compiled"),
        (hook("model"), SEEN),
        (hook("model.norm"), SEEN),
        (hook(f"{LAST}.self_attn"), SEEN),
        (hook(f"{LAST}.self_attn.o_proj"), SEEN),
        (hook(f"{LAST}.mlp"), SEEN),
        (hook(f"{LAST}.mlp.down_proj"), SEEN),
        (hook(f"{LAST}.post_attention_layernorm"), SEEN),
    ],
)
def test_all_positions_where_it_matters(change: Callable[[Any], None], reason: str) -> None:
    model, batch = make(), labelled()
    change(model)
    expected, gradients = step(model, batch)
    report = mmfast.optimize(model, ops=["loss"])
    assert report.left[0].reason.startswith(f"its last layer computes unlabelled positions too: {reason}")
    shapes = watch(model.model.layers[-1].self_attn.o_proj)
    output, found = step(model, batch)
    assert all(shape[:2] == (3, 11) for shape in shapes)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_same(found, gradients, 1e-5)


@pytest.mark.parametrize("config", [False, True])
def test_hidden_states_are_those_of_all_positions(config: bool) -> None:
    model, batch = make(), labelled()
    mmfast.optimize(model)
    model.config.output_hidden_states = config
    output = model(**batch) if config else model(**batch, output_hidden_states=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 11, 32)] * 3


def test_hooks_on_what_all_positions_go_through() -> None:
    model, batch = make(), labelled()
    mmfast.optimize(model)
    seen = []
    for path in ("model.layers.0", f"{LAST}.input_layernorm", f"{LAST}.self_attn.k_proj"):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    shapes = watch(model.model.layers[-1].mlp.gate_proj)
    step(model, batch)
    assert seen == [(3, 11)] * 3
    assert shapes == [(LABELLED, 32)]


def test_other_adapters_and_architectures() -> None:
    model = get_peft_model(make(), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]))
    assert "may tell one position from another" in refusal(model.get_base_model().model)
    assert refusal(AutoModelForCausalLM.from_config(GemmaConfig(**SIZES)).model).startswith("the decoder: its forward")
    assert refusal(AutoModelForCausalLM.from_config(Phi3Config(**SIZES)).model).startswith(
        "its last layer: its forward"
    )


def test_a_decoder_of_one_layer() -> None:
    model, batch = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1})), labelled()
    _, gradients = step(model, batch)
    mmfast.optimize(model)
    _, found = step(model, batch)
    assert_same(found, gradients, 1e-5)


def test_rows_without_a_loss() -> None:
    """The piece by itself: the last hidden states of the positions asked for."""
    decoder, batch = make().model, labelled()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = decoder(**inputs).last_hidden_state
    wanted = batch["labels"] != -100
    with labelled_rows(decoder, wanted, inputs) as rows:
        assert rows is not None
        found = decoder(**inputs).last_hidden_state
    torch.testing.assert_close(found, expected[wanted])
    torch.testing.assert_close(decoder(**inputs).last_hidden_state, expected)
