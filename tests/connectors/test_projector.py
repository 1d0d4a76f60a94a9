"""Projectors: sizes of the published ones, names of the kinds, and what ties them together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.connectors import build_connector


@pytest.mark.parametrize(
    ("kind", "width", "parameters"),
    [
        ("linear", 4096, 4_198_400),
        ("linear", 5120, 5_248_000),
        ("mlp2x_gelu", 4096, 20_979_712),
        ("mlp2x_gelu", 5120, 31_467_520),
    ],
)
def test_build_connector_has_the_published_sizes(kind: str, width: int, parameters: int) -> None:
    with torch.device("meta"):
        connector = build_connector(kind, 1024, width)
    assert sum(p.numel() for p in connector.parameters()) == parameters


def test_build_connector_mlp_with_identity_second_layer_is_gelu_of_linear() -> None:
    linear, mlp = build_connector("linear", 6, 5), build_connector("mlp2x_gelu", 6, 5)
    with torch.no_grad():
        mlp[0].load_state_dict(linear.state_dict())
        mlp[2].weight.copy_(torch.eye(5))
        mlp[2].bias.zero_()
    x = torch.randn(2, 3, 6)
    # The exact GELU, by the error function; its tanh approximation differs by 1e-4 or so.
    y = linear(x).double()
    expected = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    torch.testing.assert_close(mlp(x).double(), expected, rtol=0, atol=1e-6)


def test_build_connector_mlp_keys_are_llavas() -> None:
    assert list(build_connector("mlp3x_gelu", 6, 5).state_dict()) == [
        f"{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")
    ]
    assert list(build_connector("mlp1x_gelu", 6, 5).state_dict()) == ["0.weight", "0.bias"]


def test_build_connector_identity() -> None:
    x = torch.randn(2, 6)
    connector = build_connector("identity", 6, 6)
    assert isinstance(connector, nn.Identity)
    assert connector(x) is x
    with pytest.raises(ValueError, match="encoder is 6 wide and the language model 5"):
        build_connector("identity", 6, 5)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_gelu ", "mlp2x_relu", "mlpx_gelu", "LINEAR", ""])
def test_build_connector_refuses_unknown_kinds(kind: str) -> None:
    with pytest.raises(ValueError, match=f"kind is {kind!r}; accepted are 'linear'"):
        build_connector(kind, 4, 4)
