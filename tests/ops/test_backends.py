"""How a call reaches an implementation: straight, or through PyTorch's dispatcher where somebody listens there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.ops import backends, int8_linear, int8_quantize, lora_linear, use_backend


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_and_the_result_is_the_same() -> None:
    x, weight = torch.randn(3, 8), int8_quantize(torch.randn(4, 8))
    straight = int8_linear(x, weight)
    with _Seen() as seen:
        observed = int8_linear(x, weight)
    assert any("quantized_linear_fwd" in name for name in seen.names)
    assert torch.equal(straight, observed)


def test_plain_is_for_floating_tensors_on_the_cpu_and_no_request() -> None:
    x = torch.randn(2)
    assert backends.plain((x, None), None)
    assert not backends.plain((x,), "reference")
    assert not backends.plain((x, torch.ones(2, dtype=torch.int64)), None)
    assert not backends.plain((x, torch.empty(2, device="meta")), None)
    with use_backend("reference"):
        assert not backends.plain((x,), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not backends.plain((x,), None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora_b": torch.randn(1, 2)},
        {"lora_b": torch.randn(4, 3)},
        {"lora_a": torch.randn(2, 7)},
        {"bias": torch.randn(1)},
        {"weight": torch.randn(4, 7)},
        {"weight": torch.randn(4, 8, dtype=torch.float64)},
    ],
)
def test_a_small_call_refuses_what_broadcasting_would_let_pass(wrong: dict[str, Tensor]) -> None:
    arguments = {"x": torch.randn(3, 8), "weight": torch.randn(4, 8), "lora_a": torch.randn(2, 8)}
    arguments |= {"lora_b": torch.randn(4, 2)} | wrong
    with pytest.raises((ValueError, TypeError), match="lora_linear: "):
        lora_linear(**arguments, scaling=2.0)
