"""LoRALinear against its equation, its base layer and its promises on dtype and memory."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mmfast.nn import LoRALinear


def adapted(linear: nn.Linear, rank: int = 3, alpha: float = 6.0, dropout: float = 0.0) -> LoRALinear:
    layer = LoRALinear.from_linear(linear, rank, alpha, dropout)
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
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.scaling * (dropped @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_merged_weight_is_summed_in_float32_and_rounded_once() -> None:
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
    with pytest.raises(TypeError, match="LoRALinear"):
        LoRALinear.from_linear(LoRALinear(4, 4, 2, 1.0), 2, 1.0)
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
