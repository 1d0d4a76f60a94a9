"""Products with a quantised weight that is decoded as it is needed, into tiles (bf16) or panels (fp32), and without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.ops import Int8Weight, extension, int8_quantize, nf4_quantize, products, weights
from mmfast.ops.backends import machine
from mmfast.ops.weights import QuantizedWeight

FORMATS = {
    "nf4": nf4_quantize,
    "nf4, absmax in fp32": partial(nf4_quantize, double_quant=False),
    "int8": int8_quantize,
}
BF16 = torch.bfloat16


def decoded_here(dtype: torch.dtype) -> bool:
    return not machine(torch.device("cpu")).lacks("cpu") and products.decodes(dtype, "cpu", 1)


formats = pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(BF16, marks=pytest.mark.skipif(not decoded_here(BF16), reason="needs the extension and AMX")),
        pytest.param(
            torch.float32,
            marks=pytest.mark.skipif(not decoded_here(torch.float32), reason="needs the extension and AVX-512"),
        ),
    ],
    ids=["bf16", "fp32"],
)


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows are decoded too, where a test does not say otherwise."""
    monkeypatch.setattr(products, "DEQUANTIZED_F32_ROWS", 10**9)


@pytest.fixture(params=["decoded", "dequantised"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As it is multiplied; and as on a CPU that has neither AMX nor AVX-512."""
    if request.param == "dequantised":
        monkeypatch.setattr(extension, "has_amx", lambda: False)
        monkeypatch.setattr(extension, "has_avx512", lambda: False)
    return request.param


def filled(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns], rows of a wider matrix."""
    return torch.full((rows, columns + 3), float("nan"), dtype=dtype)[:, 2:-1]


def run(x: Tensor, grad: Tensor, q: QuantizedWeight, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x Wᵀ + bias and grad W."""
    out, out_grad = filled(x.shape[0], q.shape[0], x.dtype), filled(x.shape[0], q.shape[1], x.dtype)
    products.linear(out, x, q.tensors(), "cpu", bias=bias)
    products.linear_grad(out_grad, grad, q.tensors(), "cpu")
    return out, out_grad


def operands(rows: int, q: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, q.shape[1]).to(dtype), torch.randn(rows, q.shape[0]).to(dtype)


def factors(q: QuantizedWeight, dtype: torch.dtype, decoded: bool = True) -> tuple[Tensor, Tensor]:
    """The weight by which x and grad are multiplied: rounded, but for whole numbers that are scaled at the end."""
    rounded = weights.dense(q, dtype).double()
    scaled_at_the_end = decoded and isinstance(q, Int8Weight)
    return weights.dense(q, torch.float32).double() if scaled_at_the_end else rounded, rounded


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Within the rounding of the result, and what sums in fp32 are off."""
    assert found.shape == exact.shape
    off, size = (found.double() - exact).abs(), exact.abs()
    rounding = 2**-8 if found.dtype == BF16 else 0
    assert (off <= rounding * size + 1e-5 * size.amax()).all(), f"off by {off.max()}, size {size.max()}"


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(data=st.data())
@formats
@dtypes
def test_any_shape_and_stride(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    m, n = data.draw(st.integers(5 if dtype == BF16 else 17, 70)), data.draw(st.integers(1, 150))  # fewer go elsewhere
    k = 2 * data.draw(st.sampled_from([1, 3, 16, 31, 32, 50, 64, 90, 160]))
    k -= quantize is int8_quantize and data.draw(st.booleans())
    q = quantize(torch.randn(n, k))
    (forward, backward), (x, grad) = factors(q, dtype), operands(m, q, dtype)
    if data.draw(st.booleans()):
        x, grad = filled(m, k, dtype).copy_(x), filled(m, n, dtype).copy_(grad)
    bias = data.draw(st.sampled_from([None, torch.randn(n).to(dtype), torch.randn(2 * n).to(dtype)[::2]]))
    out, out_grad = run(x, grad, q, bias)
    assert_near(out, x.double() @ forward.t() + (0 if bias is None else bias.double()))
    assert_near(out_grad, grad.double() @ backward)


@formats
@dtypes
@pytest.mark.parametrize(("rows", "shape"), [(530, (1100, 1090)), (2100, (70, 130)), (40, (257, 2050))])
def test_several_panels_and_chunks(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, rows: int, shape: tuple[int, int], way: str
) -> None:
    q = quantize(torch.randn(shape))
    (forward, backward), (x, grad) = factors(q, dtype, way == "decoded"), operands(rows, q, dtype)
    out, out_grad = run(x, grad, q, torch.ones(shape[0]).to(dtype))
    assert_near(out, x.double() @ forward.t() + 1)
    assert_near(out_grad, grad.double() @ backward)


@formats
@dtypes
@pytest.mark.parametrize("shape", [(70, 130), (800, 40), (40, 800)])
def test_added_and_rounded_once(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, shape: tuple[int, int], way: str
) -> None:
    q = quantize(torch.randn(shape))
    (forward, backward), (x, grad) = factors(q, dtype, way == "decoded"), operands(40, q, dtype)
    grad_before, before = operands(40, q, dtype)
    out, out_grad = before.clone(), grad_before.clone()
    products.linear(out, x, q.tensors(), "cpu", add=True)
    products.linear_grad(out_grad, grad, q.tensors(), "cpu", add=True)
    assert_near(out, before.double() + x.double() @ forward.t())
    assert_near(out_grad, grad_before.double() + grad.double() @ backward)


@formats
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_is(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, value: float
) -> None:
    q = quantize(torch.randn(50, 100) + 9)  # no weight is zero
    x, grad = operands(20, q, dtype)
    x[3, 99] = grad[3, 49] = value
    for found in run(x, grad, q):
        wrong = found.isnan() if value != value else found == value
        assert wrong[3].all() and found.isfinite().all(1).sum() == 19


@formats
@dtypes
@pytest.mark.parametrize("rows", [17, 40, 600])
def test_threads_do_not_change_a_bit(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, rows: int
) -> None:
    q, threads = quantize(torch.randn(1030, 520)), torch.get_num_threads()
    x, grad = operands(rows, q, dtype)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(x, grad, q))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@formats
@dtypes
def test_the_dense_weight_never_exists(
    quantize: Callable[[Tensor], QuantizedWeight], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Where it is decoded as it is multiplied; else it does."""
    q, blocks = quantize(torch.randn(64, 64)), products._blocks
    dequantised: list[int] = []
    monkeypatch.setattr(products, "_blocks", lambda *args: dequantised.append(1) or blocks(*args))
    run(*operands(40, q, dtype), q)
    assert len(dequantised) == (0 if way == "decoded" else 2)


@formats
@pytest.mark.skipif(not extension.has_amx(), reason="needs AMX")
@pytest.mark.parametrize("shape", [(300, 130), (1100, 2050)])
def test_many_rows_of_fp32_are_multiplied_in_tiles(
    quantize: Callable[[Tensor], QuantizedWeight], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of the dense weight."""
    monkeypatch.setattr(products, "DEQUANTIZED_F32_ROWS", 150)
    q, blocks = quantize(torch.randn(shape)), products._blocks
    dequantised: list[int] = []
    monkeypatch.setattr(products, "_blocks", lambda *args: dequantised.append(1) or blocks(*args))
    weight = weights.dense(q, torch.float32).double()
    for rows, count in ((149, 0), (150, 2)):
        x, grad = operands(rows, q, torch.float32)
        out, out_grad = run(x, grad, q, torch.ones(shape[0]))
        assert_near(out, x.double() @ weight.t() + 1)
        assert_near(out_grad, grad.double() @ weight)
        assert len(dequantised) == count


def test_which_dtypes_are_made_where() -> None:
    assert not any(products.has_tiles(dtype, "cpu") for dtype in (torch.float32, torch.float16))
    assert not products.decodes(torch.float16, "cpu", 1)
    for backend in ("triton", "cuda", "reference"):
        assert not products.has_tiles(BF16, backend) and not products.decodes(torch.float32, backend, 1)


@pytest.mark.skipif(not decoded_here(BF16), reason="needs the extension and AMX")
def test_cpp_checks_what_it_is_given() -> None:
    module, view = extension.module(), extension.view
    nf4, int8 = (
        [view(part) for part in quantize(torch.ones(4, 64)).tensors()] for quantize in (nf4_quantize, int8_quantize)
    )
    x, out = torch.zeros(2, 64, dtype=BF16), torch.zeros(2, 4, dtype=BF16)
    for parts in (nf4, int8):
        with pytest.raises(ValueError, match=r"x is bfloat16\[2, 32\]; expected \[2, 64\]"):
            module.quantized_linear(view(x[:, :32]), parts, None, False, view(out), 1)
        with pytest.raises(ValueError, match=r"out is bfloat16\[2, 3\]; expected \[2, 4\]"):
            module.quantized_linear(view(x), parts, None, False, view(out[:, :3]), 1)
        with pytest.raises(ValueError, match=r"x is bfloat16\[2, 64\]; expected \[2, 4\]"):
            module.quantized_grad(view(x), parts, False, view(x), 1)
    with pytest.raises(ValueError, match=r"x is float32\[2, 64\] and out bfloat16\[2, 4\]; expected both"):
        module.quantized_linear(view(x.float()), nf4, None, False, view(out), 1)
    with pytest.raises(ValueError, match=r"bias is float32\[3\]; expected float32\[4\]"):
        module.quantized_linear(view(x), nf4, view(torch.zeros(3)), False, view(out), 1)
    with pytest.raises(ValueError, match="a bias is not added to what is there"):
        module.quantized_linear(view(x), nf4, view(torch.zeros(4)), True, view(out), 1)
    with pytest.raises(ValueError, match="int8: 1 tensors; expected 2"):
        module.quantized_linear(view(x), int8[:1], None, False, view(out), 1)
    with pytest.raises(ValueError, match=r"the weight is float32\[4, 64\]; expected uint8"):
        module.quantized_linear(view(x), [view(torch.zeros(4, 64))], None, False, view(out), 1)
