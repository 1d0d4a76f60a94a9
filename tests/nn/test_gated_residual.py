"""GatedResidual: closed at first, trained from there."""

from __future__ import annotations

import pytest
import torch

from mmfast.nn import GatedResidual


@pytest.mark.parametrize("num_channels", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_module_returns_x_and_its_gate_learns(num_channels: int | None, dtype: torch.dtype) -> None:
    module = GatedResidual(num_channels)
    x, y = (torch.randn(2, 5, 16).to(dtype) for _ in range(2))
    out = module(x, y)
    assert out.dtype == dtype
    assert torch.equal(out, x)
    out.float().sum().backward()
    expected = y.float().sum((0, 1)) if num_channels else y.float().sum()[None]
    torch.testing.assert_close(module.gate.grad, expected)


@pytest.mark.parametrize("num_channels", [None, 16])
def test_equation(num_channels: int | None) -> None:
    module = GatedResidual(num_channels, dtype=torch.float64)
    torch.nn.init.normal_(module.gate)
    x, y = torch.randn(2, 3, 16, dtype=torch.float64).unbind()
    torch.testing.assert_close(module(x, y), x + module.gate.tanh() * y)


def test_state_and_repr() -> None:
    assert {name: tuple(x.shape) for name, x in GatedResidual(8).state_dict().items()} == {"gate": (8,)}
    assert {name: tuple(x.shape) for name, x in GatedResidual().state_dict().items()} == {"gate": (1,)}
    assert repr(GatedResidual(8)) == "GatedResidual(num_channels=8)"
    module = GatedResidual(4, device="meta", dtype=torch.bfloat16)
    assert (module.gate.device.type, module.gate.dtype) == ("meta", torch.bfloat16)
