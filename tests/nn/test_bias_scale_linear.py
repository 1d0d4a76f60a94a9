"""BiasScaleLinear against its three equations, its base layer and what it folds into."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmfast.nn import BiasScaleLinear, LoRALinear, QuantizedLinear

FORMS = ["output", "input", "none"]


def adapted(linear: nn.Linear, scale_on: Any) -> BiasScaleLinear:
    layer = BiasScaleLinear.from_linear(linear, scale_on)
    nn.init.normal_(layer.adapter_bias)
    if layer.adapter_scale is not None:
        nn.init.normal_(layer.adapter_scale, 1.0, 0.3)
    return layer


def equation(layer: BiasScaleLinear, weight: Tensor, x: Tensor) -> Tensor:
    x, weight, bias = x.double(), weight.double(), layer.adapter_bias.double()
    scale = torch.ones(()) if layer.adapter_scale is None else layer.adapter_scale.double()
    if layer.bias is not None:
        bias = bias + layer.bias.double()
    if layer.scale_on == "output":
        return scale * (x @ weight.T + bias)
    return (x * scale) @ weight.T + bias


@pytest.mark.parametrize("scale_on", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_forward_equals_the_equation_in_float64(scale_on: str, bias: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(12, 7, bias=bias)
    layer = adapted(linear, scale_on)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x).double(), equation(layer, linear.weight, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_on", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_returns_what_the_base_returns(scale_on: Any, dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(16, 8, bias=bias, dtype=dtype)
    layer = BiasScaleLinear.from_linear(linear, scale_on)
    x = torch.randn(5, 16, dtype=dtype)
    if dtype == torch.float32 or not bias:
        assert torch.equal(layer(x), linear(x))
    else:  # the bias, in fp32, is added after the product was rounded
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(layer(x), linear(x), rtol=step, atol=2 * step)


@pytest.mark.parametrize("scale_on", FORMS)
def test_only_the_adapter_trains_on_a_frozen_base_and_in_float32(scale_on: Any) -> None:
    linear = nn.Linear(16, 8, dtype=torch.bfloat16).requires_grad_(False)
    layer = adapted(linear, scale_on)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    layer(torch.randn(5, 16, dtype=torch.bfloat16)).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert gradients.keys() == {"adapter_bias", "adapter_scale"} - ({"adapter_scale"} if scale_on == "none" else set())
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients.values())
    assert set(layer.state_dict()) == {"weight", "bias", *gradients}


@pytest.mark.parametrize("scale_on", FORMS)
def test_gradients_pass_gradcheck_in_float64(scale_on: Any) -> None:
    layer = adapted(nn.Linear(5, 4, dtype=torch.float64), scale_on).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tensors = dict(layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(tensors, values, strict=True)), x),
        (x, *(t.detach().clone().requires_grad_() for t in tensors.values())),
    )


@pytest.mark.parametrize("scale_on", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", [None, "nf4", "int8"])
def test_folded_it_returns_the_same(scale_on: Any, bias: bool, format: Any) -> None:
    linear = nn.Linear(64, 8, bias=bias).requires_grad_(False)
    base = linear if format is None else QuantizedLinear.from_linear(linear, format)
    layer = adapted(base, scale_on)
    dense = linear if format is None else base.to_linear()  # type: ignore[operator]
    merged, drift = layer.merged_linear()
    x = torch.randn(5, 64)
    assert type(merged) is nn.Linear
    assert not merged.weight.requires_grad
    assert torch.equal(merged.weight, layer.merged_weight())
    assert torch.equal(merged.bias, layer.merged_bias())
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged(x).double(), equation(layer, dense.weight, x), rtol=1e-4, atol=1e-5)
    assert (drift.largest > 0) == (scale_on != "none")
    assert drift.unmerged < 1e-6
    half = layer.merged_linear(torch.bfloat16)[0]
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16


def test_a_scale_of_zero_cannot_be_taken_off_again() -> None:
    layer = adapted(nn.Linear(16, 8), "output")
    assert layer.adapter_scale is not None
    layer.adapter_scale.data[3] = 0
    drift = layer.merged_linear()[1]
    assert not drift.unmerged < float("inf")
    assert drift.largest < 1e-6


@pytest.mark.parametrize("scale_on", FORMS)
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantised_base_comes_back_untouched(scale_on: Any, format: Any) -> None:
    base = QuantizedLinear.from_linear(nn.Linear(64, 8), format)
    layer = adapted(base, scale_on)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x).double(), equation(layer, base.to_linear().weight, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.to_linear()(x), base(x))


@pytest.mark.parametrize("scale_on", FORMS)
def test_compiles_without_a_graph_break(scale_on: Any) -> None:
    layer = adapted(nn.Linear(16, 8), scale_on)
    x = torch.randn(3, 16)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_autocast_gives_the_dtype_that_linear_gives() -> None:
    linear = nn.Linear(16, 8)
    layer = adapted(linear, "output")
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = equation(layer, linear.weight, x)
    assert (out.double() - exact).norm() / exact.norm() < 1e-2


def test_a_copy_and_a_state_keep_the_form() -> None:
    layer = adapted(nn.Linear(16, 8), "input")
    other = BiasScaleLinear(16, 8, "input")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert repr(layer) == "BiasScaleLinear(in_features=16, out_features=8, bias=True, scale_on='input')"


def test_what_is_no_base_and_no_form_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_on is 'both'; 'output', 'input', 'none' are accepted"):
        BiasScaleLinear(4, 4, "both")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BiasScaleLinear: the layer is a LoRALinear"):
        BiasScaleLinear.from_linear(LoRALinear(4, 4, 2, 1.0))
