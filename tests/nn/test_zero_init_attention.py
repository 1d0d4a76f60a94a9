"""ZeroInitAttention: prompts through a layer's own projections, gates that start closed, keys and values kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn import BiasScaleLinear, LoRALinear, QuantizedLinear, ZeroInitAttention
from mmfast.ops import zero_init_attention

HEADS, KV_HEADS, DIM, PROMPTS, HIDDEN = 4, 2, 8, 5, 48


class Layer:
    """What an attention layer has at hand."""

    def __init__(self, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.key_proj, self.value_proj = (
            nn.Linear(HIDDEN, KV_HEADS * DIM, dtype=dtype).requires_grad_(False) for _ in range(2)
        )
        self.module = ZeroInitAttention(HEADS, KV_HEADS, DIM, PROMPTS, HIDDEN, **options)
        self.words = [torch.randn(2, 6, heads, DIM).to(dtype).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def __call__(self, **options: Any) -> Tensor:
        return self.module(*self.words, self.key_proj, self.value_proj, is_causal=True, **options)

    def expected(self, bias: Tensor | float = 0.0) -> Tensor:
        """By the official code's steps: prompts, projections, heads."""
        few = self.module.prompt + bias
        key, value = (
            projection(few).view(*few.shape[:-1], KV_HEADS, DIM).transpose(-3, -2)
            for projection in (self.key_proj, self.value_proj)
        )
        return zero_init_attention(
            *self.words, key, value, self.module.gate, is_causal=True, gate_activation=self.module.gate_activation
        )

    def plain(self) -> Tensor:
        return F.scaled_dot_product_attention(*self.words, is_causal=True, enable_gqa=True)


def opened(**options: Any) -> Layer:
    layer = Layer(**options)
    nn.init.normal_(layer.module.gate)
    return layer


@pytest.mark.parametrize("gate_per_head", [True, False])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("bias", [None, (2, PROMPTS, HIDDEN), (2, 1, HIDDEN)])
def test_prompts_pass_through_the_layers_own_projections(
    gate_per_head: bool, activation: Any, bias: tuple[int, ...] | None
) -> None:
    layer = opened(gate_per_head=gate_per_head, gate_activation=activation)
    added = None if bias is None else torch.randn(bias)
    found = layer(prompt_bias=added)
    torch.testing.assert_close(found, layer.expected(0.0 if added is None else added))
    assert not torch.allclose(found, layer.plain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_module_changes_no_bit(dtype: torch.dtype, training: bool) -> None:
    layer = Layer(dtype)
    layer.module.train(training)
    assert torch.equal(layer(), layer.plain())
    with torch.no_grad():
        assert torch.equal(layer(), layer.plain())


def test_what_trains_and_when() -> None:
    layer = Layer()
    optimizer = torch.optim.SGD(layer.module.parameters(), lr=1.0)
    before = {name: parameter.clone() for name, parameter in layer.module.named_parameters()}
    assert before.keys() == {"prompt", "gate"} == layer.module.state_dict().keys()
    # The first step opens the gates, the second moves the prompts.
    for moves in ({"gate"}, {"gate", "prompt"}):
        optimizer.zero_grad()
        layer().square().sum().backward()
        assert {name for name, p in layer.module.named_parameters() if p.grad is not None and p.grad.any()} == moves
        optimizer.step()
    for name, parameter in layer.module.named_parameters():
        assert not torch.equal(parameter, before[name])
    assert layer.key_proj.weight.grad is None


def test_an_evaluation_before_training_leaves_the_prompts_trainable() -> None:
    layer = opened()
    layer.module.eval()
    with torch.no_grad():
        layer()
    layer.module.train()
    for _ in range(2):
        layer.module.zero_grad()
        layer().sum().backward()
        assert layer.module.prompt.grad is not None
        assert layer.module.prompt.grad.any()


def test_gradients_in_eval_mode_too() -> None:
    layer = opened()
    layer.module.eval()
    layer().sum().backward()
    assert layer.module.prompt.grad is not None


def counted(layer: Layer) -> list[int]:
    calls: list[int] = []
    layer.key_proj.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_keys_and_values_are_kept_while_nothing_changes() -> None:
    layer = opened()
    layer.module.eval()
    calls = counted(layer)
    first = layer()
    assert torch.equal(layer(), first)
    assert len(calls) == 1
    layer.module.train()
    layer()
    layer()
    assert len(calls) == 3


CHANGES = {
    "prompt": lambda layer: layer.module.prompt.add_(1.0),
    "prompt's memory": lambda layer: setattr(layer.module.prompt, "data", layer.module.prompt.data + 1),
    "key projection": lambda layer: layer.key_proj.weight.mul_(2.0),
    "value projection's bias": lambda layer: layer.value_proj.bias.add_(1.0),
    "other projection": lambda layer: setattr(layer, "key_proj", nn.Linear(HIDDEN, KV_HEADS * DIM)),
    "loaded": lambda layer: layer.module.load_state_dict(opened().module.state_dict()),
    "written through .data": lambda layer: (layer.module.prompt.data.add_(1.0), layer.module.eval()),
    "another dtype": lambda layer: setattr(layer, "words", [x.double() for x in layer.words]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_keys_and_values_are_made_again_after_a_change(change: str) -> None:
    layer = opened()
    layer.module.eval()
    before = layer()
    CHANGES[change](layer)
    if change == "another dtype":
        layer.key_proj.double()
        layer.value_proj.double()
        assert layer().dtype == torch.float64
        return
    assert not torch.allclose(layer(), before)
    torch.testing.assert_close(layer(), layer.expected())


@torch.no_grad()
def test_a_samples_own_prompts_are_kept_too() -> None:
    layer = opened()
    layer.module.eval()
    calls, bias = counted(layer), torch.randn(2, 1, HIDDEN)
    layer(prompt_bias=bias)
    torch.testing.assert_close(layer(prompt_bias=bias), layer.expected(bias))
    torch.testing.assert_close(layer(), layer.expected())
    bias.add_(1.0)
    torch.testing.assert_close(layer(prompt_bias=bias), layer.expected(bias))
    other = torch.randn(2, 1, HIDDEN)
    torch.testing.assert_close(layer(prompt_bias=other), layer.expected(other))
    assert len(calls) == 4 + 4  # `expected` projects as well


def test_inference_mode() -> None:
    layer = opened()
    layer.module.eval()
    with torch.inference_mode():
        torch.testing.assert_close(layer(), layer.expected())
        torch.testing.assert_close(
            layer(prompt_bias=torch.ones(2, 1, HIDDEN)), layer.expected(1.0).expand(2, -1, -1, -1)
        )


@torch.no_grad()
def test_a_copy_does_not_take_what_is_kept() -> None:
    layer = opened()
    layer.module.eval()
    layer()
    assert layer.module._cached is not None
    for other in (copy.deepcopy(layer.module), pickle.loads(pickle.dumps(layer.module))):
        assert other._cached is None
        assert torch.equal(other.prompt, layer.module.prompt)


def test_quantised_projections() -> None:
    layer = opened()
    for name in ("key_proj", "value_proj"):
        linear = nn.Linear(HIDDEN, KV_HEADS * DIM)
        setattr(layer, name, QuantizedLinear.from_linear(linear, "int8").requires_grad_(False))
    torch.testing.assert_close(layer(), layer.expected())
    layer.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(), layer.expected())


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    layer = opened()
    layer.module.train(training)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        found = layer()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer.expected(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training: bool) -> None:
    torch.compiler.reset()
    layer = opened()
    layer.module.train(training)
    compiled = torch.compile(layer.module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(*layer.words, layer.key_proj, layer.value_proj, is_causal=True), layer())


def test_decoding_equals_the_whole_sequence() -> None:
    layer = opened()
    layer.module.eval()
    query, key, value = layer.words
    with torch.no_grad():
        whole = layer()
        for i in range(6):
            step = layer.module(
                query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], layer.key_proj, layer.value_proj
            )
            torch.testing.assert_close(step, whole[:, :, i : i + 1])


def test_init_and_repr() -> None:
    module = ZeroInitAttention(32, 8, 128)
    assert module.prompt.shape == (10, 4096)
    assert 0.9 < module.prompt.std() < 1.1
    assert module.gate.eq(0).all()
    assert repr(module) == (
        "ZeroInitAttention(num_heads=32, num_kv_heads=8, head_dim=128, prompt_length=10, hidden_size=4096, "
        "gate_per_head=True, gate_activation='tanh')"
    )


def test_errors() -> None:
    with pytest.raises(ValueError, match="ZeroInitAttention: num_heads is 6, num_kv_heads 4"):
        ZeroInitAttention(6, 4, 8)
    with pytest.raises(ValueError, match="gate_activation is 'relu'; use one of tanh, identity"):
        ZeroInitAttention(4, 4, 8, gate_activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"prompt_bias is \[2, 7, 1, 48\]; expected \[B, P, C\] or \[B, 1, C\]"):
        Layer()(prompt_bias=torch.zeros(2, 7, 1, HIDDEN))


def test_prompts_that_come_with_the_sample() -> None:
    layer = opened(learned=False)
    assert [name for name, _ in layer.module.named_parameters()] == ["gate"]
    assert layer.module.extra_repr().endswith("learned=False")
    given = torch.randn(2, PROMPTS, HIDDEN)
    key, value = (
        projection(given).view(2, PROMPTS, KV_HEADS, DIM).transpose(1, 2)
        for projection in (layer.key_proj, layer.value_proj)
    )
    expected = zero_init_attention(*layer.words, key, value, layer.module.gate, is_causal=True)
    torch.testing.assert_close(layer(prompt_bias=given), expected)
    for wrong in (None, given[:, :1], given[..., :4]):
        with pytest.raises(ValueError, match=r"expected \[B, P, C\] with \[P, C\] = \[5, 48\]"):
            layer(prompt_bias=wrong)


@pytest.mark.parametrize("given", [False, True])
def test_samples_without_prompts_keep_their_bits(given: bool) -> None:
    layer = opened(learned=False)
    bias, prompted = torch.randn(2, PROMPTS, HIDDEN), torch.tensor([False, True])
    words = layer.plain() if given else None
    found = layer(prompt_bias=bias, prompted=prompted, words=words)
    assert torch.equal(found[0], layer.plain()[0])
    torch.testing.assert_close(found[1], layer(prompt_bias=bias)[1])
    found.sum().backward()
    alone, gate = layer.module.gate.grad, layer.module.gate
    gate.grad = None
    layer(prompt_bias=bias)[1].sum().backward()
    torch.testing.assert_close(alone, gate.grad)


def test_one_vector_for_all_prompts_reaches_every_word_alike() -> None:
    """Softmax does not see what is added to all scores of a query, so V1's image adds act(gate) · V i to each word."""
    layer = opened()
    bias = torch.randn(2, 1, HIDDEN)
    value = (bias @ layer.value_proj.weight.T).view(2, 1, KV_HEADS, DIM).transpose(1, 2)
    value = value.repeat_interleave(HEADS // KV_HEADS, 1)
    expected = layer() + layer.module.gate.tanh()[:, None, None] * value
    torch.testing.assert_close(layer(prompt_bias=bias), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_factor_on_all_gates_comes_after_the_activation(activation: Any, per_sample: bool) -> None:
    layer = opened(gate_activation=activation, gate_scale=True)
    assert layer.module.gate_scale is not None
    options = {"prompted": torch.tensor([True, False])} if per_sample else {}
    at_one = layer(**options)
    nn.init.constant_(layer.module.gate_scale, -1.7)
    found = layer(**options)
    torch.testing.assert_close(found - layer.plain(), -1.7 * (at_one - layer.plain()), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert layer.module.gate_scale.grad is not None and layer.module.gate_scale.grad.any()
    layer.module.reset_parameters()
    assert layer.module.gate_scale.item() == 1.0 and torch.equal(layer(), layer.plain())
    copied = ZeroInitAttention(HEADS, KV_HEADS, DIM, PROMPTS, HIDDEN, gate_scale=True)
    copied.load_state_dict(layer.module.state_dict())
    assert "gate_scale=True" in repr(copied)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("format", [None, "int8"])
def test_prompts_pass_by_adapters_where_they_are_to(training: bool, format: Any) -> None:
    layer = opened(base_projections=True)
    if format is not None:
        layer.key_proj, layer.value_proj = (
            QuantizedLinear.from_linear(proj, format) for proj in (layer.key_proj, layer.value_proj)
        )
    layer.module.train(training)
    expected = layer.expected()
    key, value = LoRALinear.from_linear(layer.key_proj, 2, 2.0), BiasScaleLinear.from_linear(layer.value_proj)
    nn.init.normal_(key.lora_b)
    nn.init.normal_(value.adapter_scale)  # type: ignore[arg-type]
    layer.key_proj, layer.value_proj = key, value
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(layer(), expected)
        layer.module.base_projections = False
        layer.module.eval()  # forgets the keys and values
        assert not torch.allclose(layer(), expected)


def test_adapters_that_prompts_cannot_pass_by_are_refused() -> None:
    layer = opened(base_projections=True)
    assert "base_projections=True" in repr(layer.module)
    layer.key_proj = nn.Sequential(layer.key_proj)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"pass by the adapters of the projections .* one is a Sequential"):
        layer()
