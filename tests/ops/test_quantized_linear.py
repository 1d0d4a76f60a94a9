"""The short way of one row through nf4_linear and int8_linear: where it is taken, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.ops import int8_linear, int8_quantize, nf4_linear, nf4_quantize, quantized_linear, use_backend
from mmfast.ops.backends import machine

pytestmark = pytest.mark.skipif(
    bool(machine(torch.device("cpu")).lacks("cpu")), reason="the extension is not built, or not found"
)

FORMATS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "nf4": (nf4_linear, nf4_quantize),
    "nf4, absmax in fp32": (nf4_linear, partial(nf4_quantize, double_quant=False)),
    "int8": (int8_linear, int8_quantize),
}
formats = pytest.mark.parametrize(("linear", "quantize"), FORMATS.values(), ids=FORMATS)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that came as far as C++ was made there."""
    found: list[bool] = []
    fill = quantized_linear._cpu_row()

    def recorded(*arguments: Any) -> bool:
        found.append(fill(*arguments))
        return found[-1]

    monkeypatch.setattr(quantized_linear, "_cpu_row", lambda: recorded)
    return found


@formats
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(130,), (1, 130), (1, 1, 130)])
@pytest.mark.parametrize("bias", [False, True])
def test_gives_the_same_bits(
    taken: list[bool], linear: Any, quantize: Any, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    x, q = torch.randn(shape).to(dtype), quantize(torch.randn(48, 130))
    given = torch.randn(48) if bias else None
    found = linear(x, q, given)
    assert taken == [True]
    expected = linear(x, q, given, backend="cpu")
    assert found.dtype == dtype and found.shape == (*shape[:-1], 48)
    assert torch.equal(found, expected)


@formats
def test_is_not_for_other_calls(taken: list[bool], linear: Any, quantize: Any) -> None:
    """More rows, a gradient, autocast, a backend that is asked for, somebody who listens, another class."""

    class Quiet(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Other(Tensor):
        pass

    x, q, bias = torch.randn(1, 64), quantize(torch.randn(48, 64)), torch.randn(48)
    expected = linear(x, q, bias, backend="cpu")
    linear(torch.randn(2, 64), q)
    linear(torch.randn(0, 64), q)
    linear(x, q, bias, backend="reference")
    assert linear(x.clone().requires_grad_(), q).requires_grad and linear(x, q, bias.clone().requires_grad_()).grad_fn
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, q).dtype == torch.bfloat16
    with use_backend("reference"):
        linear(x, q)
    with Quiet():
        assert torch.equal(linear(x, q, bias), expected)
    with pytest.raises(RuntimeError, match="Batching rule"):
        torch.func.vmap(lambda row: linear(row[None], q))(torch.randn(3, 64))
    linear(x.as_subclass(Other), q)
    assert taken == []
    # These are found in C++: memory that is not packed, a bias and an x that the kernels have to be given otherwise.
    wide = torch.randn(1, 128)
    assert torch.equal(linear(wide[:, ::2], q), linear(wide[:, ::2].contiguous(), q, backend="cpu"))
    assert torch.equal(linear(x, q, bias.double()), expected)
    assert linear(x.double(), q).dtype == torch.float64
    assert taken == [False] * 3


@formats
def test_mistakes_have_the_error_of_the_op(linear: Any, quantize: Any) -> None:
    x, q, name = torch.randn(1, 64), quantize(torch.randn(48, 64)), linear.__name__
    with pytest.raises(ValueError, match=f"{name}: x has shape"):
        linear(torch.randn(1, 62), q)
    with pytest.raises(ValueError, match=f"{name}: x has shape"):
        linear(torch.tensor(1.0), q)
    with pytest.raises(ValueError, match=f"{name}: bias has shape"):
        linear(x, q, torch.randn(47))
    with pytest.raises(TypeError, match=f"{name}: x is torch.int64"):
        linear(x.long(), q)
    with pytest.raises(TypeError, match=f"{name}: the weight is a"):
        linear(x, (int8_quantize if linear is nf4_linear else nf4_quantize)(torch.randn(48, 64)))
    with pytest.raises(TypeError, match=f"{name}: the weight is a"):
        linear(x, tuple(q))
    with pytest.raises(ValueError, match=f"{name}: .*(absmax|scale) is"):
        linear(x, q._replace(**{"scale" if linear is int8_linear else "absmax": torch.randn(3)}))
