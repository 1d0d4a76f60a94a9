"""LoRALinear against its equation, its base layer and its promises on dtype, memory and merging."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mmfast.nn import BaseLinear, BiasLoRALinear, BiasScaleLinear, LoRALinear, LoRALinearGroup, QuantizedLinear
from mmfast.ops import dropout as dropouts
from mmfast.ops import use_backend


def adapted(
    linear: nn.Linear, rank: int = 3, alpha: float = 6.0, dropout: float = 0.0, use_rslora: bool = False
) -> LoRALinear:
    layer = LoRALinear.from_linear(linear, rank, alpha, dropout, use_rslora=use_rslora)
    nn.init.normal_(layer.lora_b)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (0, 7)])
def test_forward_equals_the_equation_in_float64(bias: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(7, 4, bias=bias)
    layer = adapted(linear)
    x = torch.randn(shape)
    weight, a, b = (t.detach().double() for t in (linear.weight, layer.lora_a, layer.lora_b))
    expected = x.double() @ weight.T + (6.0 / 3) * (x.double() @ a.T @ b.T)
    if bias:
        expected = expected + linear.bias.detach().double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_gradcheck_in_float64() -> None:
    layer = adapted(nn.Linear(5, 4, dtype=torch.float64)).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tensors = dict(layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(tensors, values, strict=True)), x),
        (x, *(t.detach().clone().requires_grad_() for t in tensors.values())),
    )


def test_a_fresh_layer_returns_what_the_base_returns() -> None:
    linear = nn.Linear(8, 6)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), linear(x))
    assert layer.lora_a.abs().max() > 0
    assert layer.lora_a.abs().max() <= 8**-0.5


def test_from_linear_shares_the_base_and_keeps_its_state() -> None:
    linear = nn.Linear(8, 6).eval()
    linear.weight.requires_grad_(False)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert not layer.training
    assert set(layer.state_dict()) == {"weight", "bias", "lora_a", "lora_b"}
    assert layer.to_linear().weight is linear.weight
    assert type(layer.to_linear()) is nn.Linear


def test_adapters_stay_float32_on_a_bfloat16_base() -> None:
    layer = adapted(nn.Linear(8, 6, dtype=torch.bfloat16))
    assert layer.lora_a.dtype == layer.lora_b.dtype == torch.float32
    out = layer(torch.randn(3, 8, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.lora_a.grad is not None
    assert layer.lora_a.grad.dtype == torch.float32


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_that_linear_gives(base_dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 6, dtype=base_dtype)
    layer = adapted(linear)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, base = layer(x), linear(x)
    assert out.dtype == base.dtype == torch.bfloat16
    exact = x @ layer.merged_weight().float().T + linear.bias.float()
    assert (out.float() - exact).norm() / exact.norm() < 1e-2


def test_dropout_acts_on_the_low_rank_path_only_and_only_in_training() -> None:
    linear = nn.Linear(64, 6)
    layer = adapted(linear, dropout=0.5)
    x = torch.randn(4, 64)
    torch.manual_seed(0)
    update = layer(x) - linear(x)
    torch.manual_seed(0)
    dropout = dropouts.Dropout(dropouts.draw_seed(x.device), dropouts.threshold(0.5))
    dropped = dropouts.reference(x, dropout)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    expected = layer.scaling * (dropped @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    layer.eval()
    whole = layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x) - linear(x), whole, rtol=1e-4, atol=1e-5)


def test_merged_weight_is_the_exact_sum_rounded_to_the_dtype_of_the_base() -> None:
    layer = adapted(nn.Linear(8, 6, dtype=torch.bfloat16))
    exact = layer.weight.double() + layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    merged = layer.merged_weight()
    assert merged.dtype == torch.bfloat16
    assert not merged.requires_grad
    spacing = 2.0**-8 * exact.abs()
    assert ((merged.double() - exact).abs() <= spacing + 1e-6).all()


def test_compiles_without_a_graph_break() -> None:
    layer = adapted(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, r"rank is 2\.5"),
        ({"alpha": 0.0}, r"alpha is 0\.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"dropout": -0.1}, r"dropout is -0\.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(4, 4, **{"rank": 2, "alpha": 1.0, **options})  # type: ignore[arg-type]


def test_only_a_plain_linear_without_hooks_is_accepted() -> None:
    with pytest.raises(TypeError, match="the layer is a LoRALinear"):
        LoRALinear.from_linear(LoRALinear(4, 4, 2, 1.0), 2, 1.0)
    with pytest.raises(ValueError, match="maps 4 to 4 features; 4 to 5"):
        LoRALinear(4, 5, 2, 1.0).adopt(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="ParametrizedLinear"):
        LoRALinear.from_linear(parametrizations.weight_norm(nn.Linear(4, 4)), 2, 1.0)
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="hooks"):
        LoRALinear.from_linear(hooked, 2, 1.0)


def test_repr_names_the_adapter() -> None:
    layer = LoRALinear(4, 5, rank=2, alpha=8.0, dropout=0.1)
    expected = "in_features=4, out_features=5, bias=True, rank=2, alpha=8, dropout=0.1"
    assert repr(layer) == f"LoRALinear({expected})"
    assert "use_rslora=True" in repr(LoRALinear(4, 5, 2, 8.0, use_rslora=True))


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    linear = nn.Linear(8, 6)
    layer = adapted(linear, rank=4, alpha=6.0, use_rslora=True)
    x = torch.randn(3, 8)
    assert layer.scaling == 3.0
    torch.testing.assert_close(layer(x) - linear(x), 3.0 * (x @ layer.lora_a.T @ layer.lora_b.T))


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_merge_and_unmerge_drift_by_what_they_say(dtype: torch.dtype) -> None:
    layer = adapted(nn.Linear(24, 16, dtype=dtype)).eval()
    original = layer.weight.detach().clone()
    update = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
    exact = original.double() + update
    drift = layer.merge()
    error = layer.weight.double() - exact
    assert drift.largest == pytest.approx(error.abs().max().item(), rel=1e-6)
    assert drift.relative == pytest.approx((error.norm() / update.norm()).item(), rel=1e-6)
    assert drift.relative < 4 * torch.finfo(dtype).eps
    assert torch.equal(layer.weight, exact.to(dtype))
    layer.unmerge()
    assert drift.unmerged == (layer.weight.double() - original.double()).abs().max().item()
    if dtype in (torch.float16, torch.bfloat16):
        assert drift.unmerged > 0


def test_a_large_weight_is_merged_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(nn.Linear(24, 17))
    whole, drift = layer.merged_linear()
    monkeypatch.setattr("mmfast.nn.adapted_linear._CHUNK", 24 * 5)
    blocks, again = layer.merged_linear()
    assert torch.equal(blocks.weight, whole.weight)
    assert again == pytest.approx(drift)


def test_a_merged_layer_computes_the_base_alone_and_is_the_same_parameter() -> None:
    layer = adapted(nn.Linear(8, 6), dropout=0.5).eval()
    x, weight = torch.randn(3, 8), layer.weight
    before = layer(x)
    layer.merge()
    assert layer.merged
    assert layer.weight is weight
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias))
    assert "merged=True" in repr(layer)
    layer.unmerge()
    torch.testing.assert_close(layer(x), before)


def test_merging_twice_unmerging_first_and_training_merged_are_errors() -> None:
    layer = adapted(nn.Linear(8, 6))
    with pytest.raises(RuntimeError, match="the layer is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match=r"merged and training.*call unmerge\(\) to train"):
        layer(torch.randn(3, 8))
    with torch.no_grad():
        layer(torch.randn(3, 8))
    layer.eval()(torch.randn(3, 8))


def test_the_state_of_a_merged_layer_is_that_of_the_merged_linear() -> None:
    layer = adapted(nn.Linear(8, 6))
    unmerged = copy.deepcopy(layer.state_dict())
    layer.merge()
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"}
    plain = nn.Linear(8, 6)
    plain.load_state_dict(state)
    x = torch.randn(3, 8)
    torch.testing.assert_close(plain(x), layer.eval()(x))
    with pytest.raises(RuntimeError, match="lora_a"):
        LoRALinear(8, 6, 3, 6.0).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"the LoRALinear is merged; call unmerge\(\) before loading"):
        layer.load_state_dict(unmerged)
    twin = copy.deepcopy(layer)
    twin.unmerge()
    twin.load_state_dict(unmerged)


# ---- quantised bases


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_base_gets_an_adapter_and_loses_it_again(format: Any, bias: bool) -> None:
    base = QuantizedLinear.from_linear(nn.Linear(64, 24, bias=bias), format).eval()
    layer = adapted(base)
    x = torch.randn(3, 64, requires_grad=True)
    expected = base(x) + layer.scaling * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    assert layer.lora_a.grad is not None
    assert x.grad is not None
    again = layer.to_linear()
    assert type(again) is QuantizedLinear
    assert torch.equal(again(x), base(x))
    assert again.weight.data_ptr() == base.weight.data_ptr()
    assert set(layer.state_dict()) == set(base.state_dict()) | {"lora_a", "lora_b"}
    with pytest.raises(RuntimeError, match=rf"the weight is {format}.*mmfast.adapt.merge"):
        layer.merge()
    dense, drift = layer.merged_linear(torch.float64)
    torch.testing.assert_close(dense(x.double()), expected.double(), rtol=1e-4, atol=1e-5)
    assert drift.relative < 1e-15
    assert layer.merged_weight().dtype == torch.float32


def test_a_base_linear_is_adopted_as_a_plain_one_is() -> None:
    base = BaseLinear(8, 6)
    assert LoRALinear.from_linear(base, 2, 4.0).weight is base.weight


# ---- groups


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_group_returns_and_trains_as_its_layers_alone(backend: str, quantized: bool) -> None:
    bases: list[nn.Linear] = [nn.Linear(32, 16), nn.Linear(32, 8, bias=False), nn.Linear(32, 16)]
    for base in bases:
        base.requires_grad_(False)
    if quantized:
        bases[1] = QuantizedLinear.from_linear(bases[1], "int8")
    layers = [adapted(base, rank) for base, rank in zip(bases, (1, 3, 4), strict=True)]
    twins = copy.deepcopy(layers)
    x = torch.randn(2, 5, 32)
    with use_backend(backend):
        together, alone = LoRALinearGroup(layers)(x), [layer(x) for layer in twins]
        sum(out.square().sum() for out in together).backward()  # type: ignore[union-attr]
        sum(out.square().sum() for out in alone).backward()  # type: ignore[union-attr]
    for out, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for layer, twin in zip(layers, twins, strict=True):
        torch.testing.assert_close(layer.lora_a.grad, twin.lora_a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.lora_b.grad, twin.lora_b.grad, rtol=1e-4, atol=1e-4)


def test_a_group_shares_one_mask_and_runs_with_merged_layers() -> None:
    layers = [adapted(nn.Linear(64, 6), dropout=0.5), adapted(nn.Linear(64, 6), dropout=0.5)]
    layers[1].load_state_dict(layers[0].state_dict())
    group = LoRALinearGroup(layers)
    x = torch.randn(4, 64)
    first, second = group(x)
    assert torch.equal(first, second)
    group.eval()
    first, second = group(x)
    assert not torch.equal(first, layers[0].train()(x))
    group.eval()
    layers[0].merge()
    torch.testing.assert_close(group(x), (first, second))


def test_layers_that_are_no_siblings_are_refused() -> None:
    with pytest.raises(TypeError, match="a layer is a Linear"):
        LoRALinearGroup([nn.Linear(4, 4)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"are \[\(4, 0.0\), \(5, 0.0\)\]"):
        LoRALinearGroup([LoRALinear(4, 4, 1, 1.0), LoRALinear(5, 4, 1, 1.0)])
    with pytest.raises(ValueError, match="1 or more"):
        LoRALinearGroup([])


def biased(linear: nn.Linear, **options: Any) -> BiasLoRALinear:
    layer = BiasLoRALinear.from_linear(linear, 3, 6.0, **options)
    nn.init.normal_(layer.lora_b)
    nn.init.normal_(layer.adapter_bias)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", [None, "nf4", "int8"])
@pytest.mark.parametrize("shape", [(64,), (2, 5, 64), (0, 64)])
def test_bias_and_lora_are_both_added(bias: bool, format: Any, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(64, 8, bias=bias).requires_grad_(False)
    base = linear if format is None else QuantizedLinear.from_linear(linear, format)
    layer, x = biased(base), torch.randn(shape)
    dense = linear if format is None else base.to_linear()  # type: ignore[operator]
    weight, a, b = (t.detach().double() for t in (dense.weight, layer.lora_a, layer.lora_b))
    expected = x.double() @ weight.T + layer.adapter_bias.double() + 2.0 * (x.double() @ a.T @ b.T)
    if bias:
        expected = expected + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(LoRALinearGroup([layer])(x)[0], layer(x))
    torch.testing.assert_close(layer.base_forward(x), dense(x), rtol=1e-5, atol=1e-5)
    merged, _ = layer.merged_linear()
    assert type(merged) is nn.Linear and torch.equal(merged.bias, layer.merged_bias())
    torch.testing.assert_close(merged(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.to_linear()(x), base(x))


def test_bias_and_lora_pass_gradcheck_and_alone_train() -> None:
    layer = biased(nn.Linear(5, 4, dtype=torch.float64)).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    tensors = dict(layer.named_parameters())
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(tensors, values, strict=True)), x),
        (x, *(t.detach().clone().requires_grad_() for t in tensors.values())),
    )
    layer = biased(nn.Linear(8, 6, dtype=torch.bfloat16).requires_grad_(False))
    layer(torch.randn(3, 8, dtype=torch.bfloat16)).sum().backward()
    trained = {name: p.grad.dtype for name, p in layer.named_parameters() if p.grad is not None}
    assert trained == dict.fromkeys(("lora_a", "lora_b", "adapter_bias"), torch.float32)
    other = BiasLoRALinear(8, 6, 3, 6.0, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_lora_joins_a_trained_bias(bias: bool) -> None:
    first = BiasScaleLinear.from_linear(nn.Linear(8, 6, bias=bias).eval(), "none")
    nn.init.normal_(first.adapter_bias)
    layer = BiasLoRALinear.from_linear(first, 2, 4.0)
    assert layer.adapter_bias is first.adapter_bias and layer.weight is first.weight and not layer.training
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), first(x), rtol=1e-6, atol=1e-6)
    plain = nn.Linear(8, 6, bias=bias)
    assert torch.equal(BiasLoRALinear.from_linear(plain, 2, 4.0)(x), plain(x))


def test_what_lora_cannot_join_and_what_has_no_place_in_the_base() -> None:
    for scale_on in ("output", "input"):
        with pytest.raises(ValueError, match=f"has a trained scale on its {scale_on}; a trained bias alone"):
            BiasLoRALinear.from_linear(BiasScaleLinear(4, 4, scale_on), 2, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the layer is a LoRALinear"):
        BiasLoRALinear.from_linear(LoRALinear(4, 4, 2, 1.0), 2, 1.0)
    hooked = BiasScaleLinear(4, 4, "none")
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="BiasLoRALinear: the layer carries hooks"):
        BiasLoRALinear.from_linear(hooked, 2, 1.0)
    layer = BiasLoRALinear(4, 4, 2, 1.0)
    with pytest.raises(RuntimeError, match="has a trained bias, for which its base may have no place"):
        layer.merge()
    assert not layer.merged
    merged = LoRALinear(4, 4, 2, 1.0)
    merged.merge()
    with pytest.raises(RuntimeError, match=r"base_forward: the layer is merged"):
        merged.base_forward(torch.randn(4))
