"""How a call reaches an implementation: straight, or through PyTorch's dispatcher where somebody listens there."""

from __future__ import annotations

from typing import Any

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


X, W, B = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)
LINEAR = "*n *k nk= n=?"


@pytest.mark.parametrize(
    ("pattern", "tensors", "counted"),
    [
        (LINEAR, (X, W, B), 24),
        (LINEAR, (X[0, 0], W, None), 4),
        (LINEAR, (X[:0], W, torch.nn.Parameter(B)), 0),
        (LINEAR, (X, W[:, :7], None), -1),
        (LINEAR, (X, W, B[:1]), -1),
        (LINEAR, (X, W, B.half()), -1),
        (LINEAR, (X, None, B), -1),
        (LINEAR, (X.long(), W.long(), None), -1),
        (LINEAR, (X.to("meta"), W, B), -1),
        (LINEAR, (X, W.to_sparse(), B), -1),
        (LINEAR, (X, W, 3.0), -1),
        ("*h *h *h=", (X, X.half()), -1),
        ("*h *h *h", (X, X.transpose(0, 1).reshape(2, 3, 8).half()), 48),
        ("*h *h *h", (X, X.transpose(0, 1)), -1),
        ("*h *h *h", (X, X[0]), -1),
        ("*h *h ~h", (X, W[0]), 48),
        ("*h *h ~h", (X, torch.zeros(1)), 48),
        ("*h *h ~h", (X, torch.zeros(())), 48),
        ("*h *h ~h", (X, torch.zeros(1, 1)), -1),
        ("*h *th *t#", (X, torch.zeros(2, 3, dtype=torch.int64)), 16),
        ("*h *th *t#", (X, torch.zeros(2, 3)), -1),
        ("*h *th *t#", (X[0, 0], torch.zeros((), dtype=torch.int64)), -1),
        ("n nk 1k", (W, W[:1]), 4),
        ("h *h", (X,), 8),
        ("n nk 1k", (W, W), -1),
    ],
)
def test_fits(pattern: str, tensors: tuple[Any, ...], counted: int) -> None:
    assert backends.fits(None, pattern, *tensors) == counted
    assert backends.fits("cpu", pattern, *tensors) == -1
    with use_backend("reference"):
        assert backends.fits(None, pattern, *tensors) == -1


class _Own(Tensor):
    pass


def test_what_c_plus_plus_takes_as_it_is() -> None:
    def packed(*tensors: Any) -> bool:
        return backends.packed(None, "*h *h *h=", *tensors) >= 0

    assert backends.packed(None, "*h *h *h= ~h", W, torch.nn.Parameter(W), W[0, ::2].double().sum()) == W.numel()
    assert backends.packed(None, "*h *h *h= ~h", W, W, torch.zeros(2 * W.shape[1])[::2]) == -1
    assert packed(W.half(), W.half())
    strided = torch.randn(4, 16)[:, ::2]
    for other in (W[:2], W.half(), W.to("meta"), W.as_subclass(_Own), strided, W.to_sparse(), W[None]):
        assert not packed(W, other)
        assert not packed(other, W)
    assert not packed(W.double(), W.double())
    assert backends.packed("cpu", "*h *h", W) == -1
    with use_backend("cpu"):
        assert not packed(W, W)
    with _Seen():
        assert not packed(W, W)
    with torch.autograd.forward_ad.dual_level():
        assert not packed(W, W)
    assert torch.func.vmap(lambda w: w * packed(w, w) + packed(W, W))(W).eq(0).all()


def test_once_differentiable_asks_for_a_graph_first() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        @backends.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(Doubled.apply(x).sum(), x)[0].tolist() == [2, 2, 2]
    output = Doubled.apply(x)
    (first,) = torch.autograd.grad(output, x, torch.ones(3, requires_grad=True), create_graph=True)
    assert first.tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


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
