"""The short ways through lora_linear give the bits of the long one, and refuse what only that can do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.ops import extension, int8_quantize, lora_short, low_rank, nf4_quantize, products
from mmfast.ops.lora_linear import lora_linear, reference

BF16 = torch.bfloat16
DTYPES = [
    torch.float32,
    pytest.param(BF16, marks=pytest.mark.skipif(not extension.has_amx(), reason="this CPU has no AMX")),
]
if extension.missing("cpu"):
    pytest.skip("the compiled extension is missing", allow_module_level=True)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels serve any size."""
    for key in lora_short.LEAST:
        monkeypatch.setitem(lora_short.LEAST, key, 1)
    monkeypatch.setattr(lora_short, "MOST_DOTS", 0)
    monkeypatch.setattr(low_rank, "TILED_ROWS", 1)
    monkeypatch.setattr(low_rank, "TILED_BLOCKS", 0)


def some_tensors(dtype: torch.dtype, bias: bool = True) -> list[Any]:
    """x [2, 35, 48], weight [40, 48], A, B, scaling and bias, of which all but the weight are trained."""
    x, weight, lora_a, lora_b = (torch.randn(shape).to(dtype) for shape in ((2, 35, 48), (40, 48), (5, 48), (40, 5)))
    added = torch.randn(40).to(dtype).requires_grad_() if bias else None
    return [x.requires_grad_(), weight, lora_a.requires_grad_(), lora_b.requires_grad_(), 1.5, added]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of lora_linear from now on was short."""
    found: list[bool] = []
    attempt = lora_short.attempt

    def seen(*arguments: Any) -> Tensor | None:
        y = attempt(*arguments)
        found.append(y is not None)
        return y

    monkeypatch.setattr(lora_short, "attempt", seen)
    return found


def both(arguments: list[Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """What `run` gives by the short way and by the long one."""
    short = run(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(lora_short, "attempt", lambda *arguments: None)
        return short, run(*arguments)


@pytest.fixture(params=["tiles", "sgemm", "addmm"])
def product_f32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether C++ makes the product of fp32 matrices, or calls PyTorch's, or Python does."""
    if request.param == "tiles" and not extension.has_amx():
        pytest.skip("this CPU has no AMX")
    if request.param == "sgemm" and not extension.has_sgemm():
        pytest.skip("PyTorch's library exports no SGEMM_64")
    monkeypatch.setattr(products, "TILED_F32_ROWS", 70 if request.param == "tiles" else 71)
    monkeypatch.setattr(extension, "has_sgemm", lambda: request.param == "sgemm")
    return str(request.param)


@pytest.mark.usefixtures("product_f32")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("trained", "bias"), [("bias", True), *product(("all", "x", "a", "b", "none"), (False, True))])
def test_the_bits_of_the_long_way(
    dtype: torch.dtype, trained: str, bias: bool, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = some_tensors(dtype, bias)
    tensors = dict(zip(("x", "weight", "a", "b", "scaling", "bias"), arguments, strict=True))
    wanted = [name for name in ("x", "a", "b", "bias") if tensors[name] is not None and trained in (name, "all")]
    for name in ("x", "a", "b", "bias"):
        if tensors[name] is not None:
            tensors[name].requires_grad_(name in wanted)
    grad = torch.randn(2, 35, 40).to(dtype)

    def run(*arguments: Any) -> list[Tensor]:
        y = lora_linear(*arguments)
        assert y.requires_grad == bool(wanted)
        return [y, *(torch.autograd.grad(y, [tensors[name] for name in wanted], grad) if wanted else ())]

    short, long = both(arguments, run, monkeypatch)
    assert calls == [True]
    for a, b in zip(short, long, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


@pytest.mark.usefixtures("product_f32")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_not_packed(dtype: torch.dtype, calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some_tensors(dtype)
    trained = [arguments[i] for i in (0, 2, 3, 5)]
    grad = torch.randn(40, 35, 2).to(dtype).permute(2, 1, 0)

    def run(*arguments: Any) -> Any:
        return torch.autograd.grad(lora_linear(*arguments), trained, grad)

    short, long = both(arguments, run, monkeypatch)
    assert calls == [True]
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_that_the_user_allows(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "has_sgemm", lambda: True)
    monkeypatch.setattr(extension, "has_amx", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert products.calls_sgemm() == products.tiles_f32(2**20, "cpu") == (precision == "highest")
        assert not products.tiles_f32(2**20, "triton")
    finally:
        torch.set_float32_matmul_precision(before)


def test_sgemm_refuses_what_is_not_its_own() -> None:
    """C++ reads no memory beyond a matrix, whatever Python hands it."""
    if not extension.has_sgemm():
        pytest.skip("PyTorch's library exports no SGEMM_64")
    x, weight, lora_a, lora_b, scaling, _ = some_tensors(torch.float32, bias=False)
    s, y = torch.empty(70, 5), torch.empty(70, 40)
    call = extension.module().lora_linear_fwd_cpu
    matrix = x.detach().flatten(0, 1)
    for wrong in (weight[:, :-1], weight.t().contiguous().t(), weight.double(), weight[:-1].contiguous()):
        with pytest.raises(ValueError, match="w "):
            call(matrix, wrong, lora_a.detach(), lora_b.detach(), scaling, None, s, y, False, 2)


def test_saves_what_the_long_way_does(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = some_tensors(torch.float32)

    def run(*arguments: Any) -> int:
        saved: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.data_ptr()] = x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            lora_linear(*arguments)
        return sum(saved.values())

    short, long = both(arguments, run, monkeypatch)
    assert calls == [True]
    assert short == long == 4 * (2 * 35 * (48 + 5) + 40 * 48 + 5 * 48 + 40 * 5)


def test_is_differentiable_once() -> None:
    arguments = some_tensors(torch.float32)
    (grad,) = torch.autograd.grad(lora_linear(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_leaves_alone_what_it_cannot_do(calls: list[bool]) -> None:
    x, weight, lora_a, lora_b, scaling, bias = some_tensors(torch.float32)
    lora_linear(x, weight.requires_grad_(), lora_a, lora_b, scaling, bias)
    weight = weight.detach()
    lora_linear(x.transpose(0, 1), weight, lora_a, lora_b, scaling, bias)
    lora_linear(x, weight, lora_a.double(), lora_b, scaling, bias)
    lora_linear(x, weight, [lora_a, lora_a], [lora_b, lora_b], [scaling, scaling], bias)
    lora_linear(x, nf4_quantize(weight), lora_a, lora_b, scaling, bias)
    lora_linear(x, weight, lora_a, lora_b, scaling, bias, backend="reference")
    with torch.autocast("cpu", BF16):
        lora_linear(x, weight, lora_a, lora_b, scaling, bias)
    assert calls == [False] * 7
    torch.func.vmap(lambda x: x if lora_short.attempt(x, weight, lora_a, lora_b, scaling, bias, None) is None else 0)(x)
    assert calls[7:] == [False]
    with pytest.raises(ValueError, match="lora_linear: lora_b is"):
        lora_linear(x, weight, lora_a, lora_b[:, :3], scaling, bias)


def test_few_rows_take_the_reference(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("rows", "packed rows"):
        monkeypatch.setitem(lora_short.LEAST, key, 10**9)
    arguments = some_tensors(torch.float32)
    short, long = both(arguments, lora_linear, monkeypatch)
    assert calls == [True]
    torch.testing.assert_close(short, long, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr(products, "is_slow", lambda *arguments, **options: True)
    lora_linear(*arguments)
    lora_linear(*some_tensors(torch.float16))
    assert calls == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(("rows", "features", "columns", "ranks"), [(1, 300, 70, 20), (2, 64, 33, 8), (1, 5, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_one_row_is_nearer_to_float64_than_eager(
    dtype: torch.dtype,
    rows: int,
    features: int,
    columns: int,
    ranks: int,
    bias: bool,
    wide: bool,
    calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora_short, "MOST_DOTS", 2)
    shapes = (rows, 1, features), (columns, features), (ranks, features), (columns, ranks), (columns,)
    x, weight, lora_a, lora_b, added = (torch.randn(shape).to(dtype) for shape in shapes)
    if wide:
        lora_a, lora_b = lora_a.float(), lora_b.float()
    arguments = x, weight, lora_a, lora_b, 1.5, added if bias else None
    doubles = (t.double() if isinstance(t, Tensor) else t for t in arguments)
    exact, eager = reference(*doubles), reference(*arguments)
    found = lora_linear(*arguments)
    assert calls == [True] and found.shape == (rows, 1, columns) and found.dtype == dtype
    # fp32 has two orders of one sum, of which neither is the nearer one.
    allowed = 1e-5 * float(exact.norm()) if dtype == torch.float32 else float((eager - exact).norm())
    assert float((found - exact).norm()) <= allowed
    for bits in (0, 256):
        narrow = torch.empty_like(found)
        extension.module().lora_linear_rows_cpu(*arguments, narrow, 2, bits)
        assert float((narrow - exact).norm()) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("quantize", [nf4_quantize, int8_quantize])
def test_one_row_of_a_quantised_weight(
    dtype: torch.dtype, quantize: Callable[..., Any], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize(torch.randn(48, 128))
    x, lora_a, lora_b, bias = (torch.randn(shape).to(dtype) for shape in ((1, 1, 128), (4, 128), (48, 4), (48,)))
    short, long = both([x, weight, lora_a, lora_b, 1.5, bias], lora_linear, monkeypatch)
    assert calls == [True] and short.shape == long.shape and short.dtype == dtype
    error = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((short - long).norm()) <= error * float(long.norm())
    # Two rows, a gradient, and a weight of another size are for others.
    lora_linear(torch.cat([x, x]), weight, lora_a, lora_b, 1.5, bias)
    lora_linear(x, weight, lora_a.requires_grad_(), lora_b, 1.5, bias)
    assert calls == [True, False, False]
    with pytest.raises(ValueError, match=r"lora_linear: weight is \[48, 128\] but x \[1, 1, 64\]"):
        lora_linear(x[..., :64], weight, lora_a.detach()[:, :64].contiguous(), lora_b, 1.5, bias)


def test_the_kernel_of_few_rows_refuses_what_does_not_fit() -> None:
    x, weight, lora_a, lora_b, out = (torch.randn(shape) for shape in ((1, 8), (6, 8), (2, 8), (6, 2), (1, 6)))
    kernel = extension.module().lora_linear_rows_cpu
    with pytest.raises(ValueError, match=r"lora_linear: weight is .*; expected"):
        kernel(x, weight[:, :7].contiguous(), lora_a, lora_b, 1.0, None, out, 2)
    with pytest.raises(ValueError, match="expected one dtype"):
        kernel(x, weight.bfloat16(), lora_a, lora_b, 1.0, None, out, 2)
    with pytest.raises(ValueError, match=r"a is float64\[2, 8\] and b .*; expected both float32 or float32"):
        kernel(x, weight, lora_a.double(), lora_b.double(), 1.0, None, out, 2)
    with pytest.raises(ValueError, match="bias comes with weight"):
        kernel(x, None, lora_a, lora_b, 1.0, torch.zeros(6), out, 2)
