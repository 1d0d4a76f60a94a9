"""nn.RMSNorm against the modules it takes the place of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.nn import RMSNorm


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    norm = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(48, 1e-5).to(dtype)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_takes_the_place_of_llamas(dtype: torch.dtype) -> None:
    theirs = llama(dtype).eval()
    ours = RMSNorm.from_norm(theirs)
    assert ours.weight is theirs.weight
    assert ours.eps == 1e-5
    assert not ours.training
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, residual = torch.randn(3, 7, 48).to(dtype), torch.randn(3, 7, 48).to(dtype)
    y, total = ours(x, residual)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, theirs(x + residual), rtol=4 * eps, atol=0)
    torch.testing.assert_close(ours(total), y, rtol=0, atol=0)
    assert f"{ours}".removeprefix("RMSNorm") == f"{theirs}".removeprefix("LlamaRMSNorm")


def test_takes_the_place_of_pytorchs() -> None:
    for eps, expected in ((None, torch.finfo(torch.float32).eps), (1e-4, 1e-4)):
        theirs = nn.RMSNorm(48, eps)
        ours = RMSNorm.from_norm(theirs)
        assert ours.eps == expected
        x = torch.randn(5, 48)
        torch.testing.assert_close(ours(x), theirs(x))
        RMSNorm(48).load_state_dict(theirs.state_dict())


def test_trains_the_shared_weight() -> None:
    theirs = llama()
    RMSNorm.from_norm(theirs)(torch.randn(5, 48)).square().sum().backward()
    assert theirs.weight.grad is not None
    theirs.weight.requires_grad_(False)
    assert not RMSNorm.from_norm(theirs).weight.requires_grad


def test_a_fresh_one() -> None:
    norm = RMSNorm(6, 1e-3, dtype=torch.float64)
    assert norm.weight.tolist() == [1.0] * 6
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.RMSNorm(8, elementwise_affine=False)]
)
def test_refuses_what_is_no_rms_norm(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=f"RMSNorm.from_norm: got {type(module).__name__}; .* is accepted"):
        RMSNorm.from_norm(module)


def test_refuses_a_norm_without_epsilon() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(8))
    with pytest.raises(TypeError, match="neither `variance_epsilon` nor `eps`"):
        RMSNorm.from_norm(module)
