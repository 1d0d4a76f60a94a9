"""MixtureAdapter and Adapter against their equations, LaVIN's own lines and their promises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn import Adapter, MixtureAdapter, QuantizedLinear
from mmfast.ops import mixture_adapter


def trained(hidden_size: int = 24, **options: Any) -> MixtureAdapter:
    """An adapter in which nothing is zero any more, in evaluation."""
    adapter = MixtureAdapter(hidden_size, **{"bottleneck_size": 4, "dropout": 0.0, **options})
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return adapter.eval()


def lavin(adapter: MixtureAdapter, x: Tensor) -> Tensor:
    """LaVIN's forward (lavin/mm_adapter.py) on the published tensors."""
    state = adapter.to_lavin()
    weights = F.linear(x[:, 0], state["expert_weights.weight"], state["expert_weights.bias"])
    weights = torch.softmax(weights / adapter.temperature, -1)
    channels = x.transpose(1, 2)
    h = F.conv1d(channels, state["conv_A.weight"], state["conv_A.bias"])
    y = channels
    for k, name in enumerate(("conv_B", "conv_D")):
        update = F.conv1d(h, state[f"{name}.weight"], state[f"{name}.bias"], groups=2)
        y = y + update * adapter.scale * weights[:, k, None, None]
    return y.transpose(1, 2)


# ---- the mixture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_identity(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 24).to(dtype)
    for adapter in (MixtureAdapter(24), MixtureAdapter(24, 6, 3, 1, activation="gelu"), Adapter(24, 4)):
        for mode in (adapter, adapter.eval()):
            assert torch.equal(mode(x), x)
            assert mode(x).dtype == dtype


def test_initial_values_are_lavin_s() -> None:
    adapter = MixtureAdapter(64, 8)
    bound = (6 / (64 + 8)) ** 0.5
    assert 0.8 * bound < adapter.down_weight.abs().max() <= bound
    assert 0 < adapter.router_weight.abs().max() <= 1 / 8
    for zero in (adapter.down_bias, adapter.up_weight, adapter.up_bias):
        assert not zero.any()
    weights = adapter.route(torch.randn(50, 64))
    assert (weights - 0.5).abs().max() < 0.2
    assert not torch.equal(weights, torch.full_like(weights, 0.5))


def test_counts_and_names_of_a_published_adapter() -> None:
    for size, count in ((4096, 81_930), (5120, 102_410), (1024, 20_490)):
        assert sum(p.numel() for p in MixtureAdapter(size, device="meta").parameters()) == count
    state = MixtureAdapter(4096, device="meta").to_lavin()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "conv_A.weight": (8, 4096, 1),
        "conv_A.bias": (8,),
        "conv_B.weight": (4096, 4, 1),
        "conv_B.bias": (4096,),
        "conv_D.weight": (4096, 4, 1),
        "conv_D.bias": (4096,),
        "expert_weights.weight": (2, 4096),
        "expert_weights.bias": (2,),
    }


def test_gradients_of_the_first_step() -> None:
    adapter = MixtureAdapter(24, 4, dropout=0.0)
    adapter(torch.randn(3, 5, 24)).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) == name.startswith("up_"), name


def test_equals_lavin_s_lines() -> None:
    adapter, x = trained(scale=0.7, temperature=5.0), torch.randn(3, 7, 24)
    torch.testing.assert_close(adapter(x), lavin(adapter, x))
    double = copy.deepcopy(adapter).double()
    torch.testing.assert_close(double(x.double()), lavin(double, x.double()))


def test_router_weights() -> None:
    adapter, x = trained(), torch.randn(30, 24)
    weights = adapter.route(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(30))
    adapter.temperature = 1e6
    torch.testing.assert_close(adapter.route(x), torch.full((30, 2), 0.5), atol=1e-4, rtol=0)


def test_swapping_experts_with_their_rows_of_the_router_changes_nothing() -> None:
    adapter, x = trained(), torch.randn(3, 7, 24)
    swapped = copy.deepcopy(adapter)
    with torch.no_grad():
        for name in ("up_weight", "up_bias", "router_weight", "router_bias"):
            getattr(swapped, name).copy_(getattr(adapter, name).flip(0))
    torch.testing.assert_close(swapped(x), adapter(x))


def test_the_first_token_routes_its_sample_alone() -> None:
    adapter, x = trained(), torch.randn(3, 7, 24)
    changed = x.clone()
    changed[1, 0] += 5
    found, wanted = adapter(changed), adapter(x)
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])
    assert not torch.isclose(found[1, 1:], wanted[1, 1:]).all()
    alone = adapter(x, router_input=x[:, 0].flip(0))
    torch.testing.assert_close(alone[1], wanted[1])
    assert not torch.isclose(alone[0], wanted[0]).all()


def test_compatible_with_the_layout_of_lavin_s_clip() -> None:
    adapter, x = trained(), torch.randn(4, 7, 24)
    # There the adapter sees [L, B, C]: "the first token" is the first image of the batch, for every token.
    published = lavin(adapter, x.transpose(0, 1)).transpose(0, 1)
    found = adapter(x, router_input=x[:1].expand_as(x))
    torch.testing.assert_close(found, published)
    order = torch.tensor([0, 3, 1, 2])
    permuted = x[order]
    torch.testing.assert_close(adapter(permuted, router_input=permuted[:1].expand_as(x)), found[order])
    replaced = torch.cat([torch.randn(1, 7, 24), x[1:]])
    assert not torch.isclose(adapter(replaced, router_input=replaced[:1].expand_as(x))[1:], found[1:]).all()


def test_dropout_in_training_only() -> None:
    adapter, x = trained(dropout=0.5), torch.randn(2, 9, 24)
    assert torch.equal(adapter(x), adapter(x))
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


def test_one_token_without_its_dimension() -> None:
    adapter, x = trained(), torch.randn(3, 24)
    torch.testing.assert_close(adapter(x), adapter(x[:, None])[:, 0])
    with pytest.raises(ValueError, match=r"MixtureAdapter: x is \[2, 3, 4, 24\]; \[B, T, 24\] or \[B, 24\]"):
        adapter(torch.randn(2, 3, 4, 24))


# ---- cached weights


def test_cached_weights_decode_what_one_call_gives() -> None:
    adapter, x = trained(), torch.randn(3, 7, 24)
    whole = adapter(x)
    adapter.cache_router()
    torch.testing.assert_close(adapter(x[:, :4]), whole[:, :4])
    for t in (4, 5, 6):
        torch.testing.assert_close(adapter(x[:, t : t + 1]), whole[:, t : t + 1])
    adapter.cache_router(False)
    assert not torch.isclose(adapter(x[:, 4:5]), whole[:, 4:5]).all()


def test_cached_weights_are_reset_and_kept_nowhere() -> None:
    adapter, x = trained(), torch.randn(2, 7, 24)
    names = adapter.state_dict().keys()
    adapter.cache_router()
    adapter(x)
    assert adapter.state_dict().keys() == names
    adapter.cache_router()
    adapter(torch.randn(4, 3, 24))
    with pytest.raises(
        ValueError, match=r"x has 2 samples but the cached router weights are those of 4; .*cache_router"
    ):
        adapter(x)


def test_cached_weights_do_not_outlive_training() -> None:
    adapter, x = trained(), torch.randn(2, 7, 24)
    adapter.cache_router()
    adapter(x)
    with pytest.raises(RuntimeError, match=r"the module is training; call eval\(\) first"):
        adapter.train().cache_router()
    adapter.eval()
    assert adapter(torch.randn(5, 2, 24)).shape == (5, 2, 24)  # nothing is cached, so any batch will do


@pytest.mark.parametrize("change", ["step", "load", "assign", "cast"])
def test_cached_weights_do_not_outlive_a_change_of_the_router(change: str) -> None:
    adapter, x = trained(), torch.randn(2, 7, 24)
    adapter.cache_router()
    adapter(x)
    if change == "step":
        adapter.router_weight.grad = torch.ones_like(adapter.router_weight)
        torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    elif change == "load":
        adapter.load_state_dict(trained().state_dict())
    elif change == "assign":
        adapter.router_bias = nn.Parameter(torch.zeros(2))
    else:
        adapter.double()
    with pytest.raises(RuntimeError, match="the router's parameters changed after its weights were cached"):
        adapter(x[:, :1].to(adapter.router_weight.dtype))


def test_cached_weights_under_inference_mode() -> None:
    with torch.inference_mode():
        adapter, x = trained(), torch.randn(2, 7, 24)
        whole = adapter(x)
        adapter.cache_router()
        adapter(x[:, :6])
        torch.testing.assert_close(adapter(x[:, 6:]), whole[:, 6:])


# ---- folding


@pytest.mark.parametrize("bias", [True, False])
def test_folded_equals_unfolded(bias: bool) -> None:
    adapter, linear = trained(scale=0.7), nn.Linear(24, 10, bias=bias)
    weights, x = torch.tensor([0.3, 0.7]), torch.randn(2, 5, 24)
    before = copy.deepcopy(linear.state_dict())
    folded, drift = adapter.fold_into(linear, weights)
    parameters = [p for name, p in adapter.named_parameters() if not name.startswith("router")]
    wanted = linear(mixture_adapter(x, *parameters, weights.expand(2, 2), 0.7))
    torch.testing.assert_close(folded(x), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(linear.state_dict()[name], tensor) for name, tensor in before.items())
    assert 0 < drift.largest < 1e-6
    assert 0 < drift.relative < 1e-6
    assert drift.unmerged < 1e-4


def test_folding_measures_what_rounding_does() -> None:
    adapter, linear = trained(), nn.Linear(24, 10).bfloat16()
    folded, drift = adapter.fold_into(linear, torch.tensor([0.5, 0.5]))
    exact, fine = adapter.double().fold_into(copy.deepcopy(linear).double(), torch.tensor([0.5, 0.5]))
    assert folded.weight.dtype == torch.bfloat16
    assert drift.largest == (folded.weight.double() - exact.weight).abs().max().item()
    assert drift.relative > 1e-4
    assert fine.unmerged < 1e-10
    fresh, nothing = MixtureAdapter(24, 4).eval().fold_into(linear, torch.tensor([0.5, 0.5]))
    assert torch.equal(fresh.weight, linear.weight)
    assert nothing == (0.0, 0.0, 0.0)


def test_folding_is_refused() -> None:
    weights = torch.tensor([0.5, 0.5])
    with pytest.raises(RuntimeError, match="the adapter is training; a linear one"):
        MixtureAdapter(24, 4).fold_into(nn.Linear(24, 8), weights)
    with pytest.raises(RuntimeError, match="the adapter is of activation 'relu'"):
        trained(activation="relu").fold_into(nn.Linear(24, 8), weights)
    with pytest.raises(TypeError, match=r"the layer is a QuantizedLinear; a torch\.nn\.Linear is accepted"):
        trained().fold_into(QuantizedLinear(24, 8, format="int8"), weights)
    with pytest.raises(ValueError, match=r"the layer takes 20 features and weights is \[2\]; 24 and \[2\]"):
        trained().fold_into(nn.Linear(20, 8), weights)
    with pytest.raises(ValueError, match=r"weights is \[3\]"):
        trained().fold_into(nn.Linear(24, 8), torch.ones(3))


# ---- published checkpoints


def test_published_names_both_ways() -> None:
    adapter, x = trained(scale=0.5, temperature=5.0), torch.randn(2, 5, 24)
    state = adapter.to_lavin()
    loaded = MixtureAdapter.from_lavin(state, scale=0.5, temperature=5.0).eval()
    assert torch.equal(loaded(x), adapter(x))
    assert loaded.groups == 2
    again = loaded.to_lavin()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    half = MixtureAdapter.from_lavin({name: tensor.half() for name, tensor in state.items()})
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_D.bias": None}, r"missing \['conv_D.bias'\], unknown \[\]"),
        ({"conv_C.bias": torch.zeros(24)}, r"missing \[\], unknown \['conv_C.bias'\]"),
        ({"conv_D.weight": torch.zeros(24, 4, 1)}, r"conv_D.weight is \[24, 4, 1\]; \[24, 2, 1\] is accepted"),
        ({"conv_A.weight": torch.zeros(4, 24)}, r"conv_A.weight is \[4, 24\]"),
        ({"conv_A.bias": torch.zeros(1)}, r"conv_A.bias is \[1\]; \[4\] is accepted"),
        ({"expert_weights.weight": torch.zeros(3, 24)}, r"expert_weights.weight is \[3, 24\]; \[2, 24\]"),
    ],
)
def test_published_tensors_that_do_not_fit(changes: dict[str, Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in (trained().to_lavin() | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"MixtureAdapter.from_lavin: .*{message}"):
        MixtureAdapter.from_lavin(state)


def test_what_has_no_published_form() -> None:
    with pytest.raises(ValueError, match="there are 3 experts"):
        trained(num_experts=3).to_lavin()
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        trained(activation="gelu").to_lavin()


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; a whole number of 1 or more is accepted"),
        ({"bottleneck_size": 2.5}, "bottleneck_size is 2.5; a whole number"),
        ({"num_experts": 0}, "num_experts is 0; a whole number"),
        ({"groups": 3}, "groups is 3; .* divides hidden_size 16 and bottleneck_size 8"),
        ({"dropout": 1.0}, r"dropout is 1.0; a probability in \[0, 1\) is accepted"),
        ({"temperature": 0.0}, "temperature is 0.0; a number above 0 is accepted"),
        ({"activation": "tanh"}, "activation is 'tanh'; 'identity', 'relu', 'gelu', 'silu' are accepted"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MixtureAdapter: {message}"):
        MixtureAdapter(**{"hidden_size": 16, **options})


def test_repr() -> None:
    assert repr(MixtureAdapter(16, 4, temperature=5.0)) == (
        "MixtureAdapter(16, 4, num_experts=2, groups=2, dropout=0.1, scale=1, temperature=5, activation='identity')"
    )
    assert repr(Adapter(16, 4, scale=0.5)) == "Adapter(16, 4, activation='relu', dropout=0, scale=0.5, bias=True)"


# ---- the bottleneck


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_adapter_is_its_equation(activation: str, bias: bool) -> None:
    adapter = Adapter(24, 6, activation, scale=0.7, bias=bias)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    assert {*dict(adapter.named_parameters())} == {
        "down_weight", "up_weight", *(("down_bias", "up_bias") if bias else ()),
    }  # fmt: skip
    x = torch.randn(2, 5, 24)
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "identity": lambda z: z}[activation]
    wanted = x + 0.7 * F.linear(
        act(F.linear(x, adapter.down_weight, adapter.down_bias)), adapter.up_weight, adapter.up_bias
    )
    torch.testing.assert_close(adapter(x), wanted)
    torch.testing.assert_close(adapter(x[0]), wanted[0])


def test_adapter_s_gradients_of_the_first_step() -> None:
    adapter = Adapter(24, 6)
    adapter(torch.randn(3, 5, 24)).square().sum().backward()
    grads = {name: bool(p.grad is not None and p.grad.any()) for name, p in adapter.named_parameters()}
    assert grads == {"down_weight": False, "up_weight": True, "down_bias": False, "up_bias": True}


def test_adapter_drops_in_training_only() -> None:
    adapter, x = Adapter(24, 6, dropout=0.5), torch.randn(2, 9, 24)
    nn.init.normal_(adapter.up_weight)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_adapter_refuses_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="Adapter: bottleneck_size is 0; a whole number"):
        Adapter(16, 0)


def test_adapters_in_16_bits_and_under_autocast() -> None:
    x = torch.randn(2, 5, 24)
    for adapter in (trained(), Adapter(24, 6)):
        assert adapter(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert adapter(x).dtype == torch.float32
            torch.testing.assert_close(adapter(x), adapter(x.clone()))
