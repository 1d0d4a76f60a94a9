"""Products of fp32 matrices that AMX tiles of bfloat16 make, against float64 and PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.ops import extension, low_rank, products
from mmfast.ops.backends import machine

if reason := machine(torch.device("cpu")).lacks("cpu") or (None if extension.has_amx() else "this CPU has no AMX"):
    pytest.skip(reason, allow_module_level=True)

# Rows, depth and columns: one of each; odd; whole tiles; more than pass together, of each.
SHAPES = [(1, 1, 1), (33, 31, 17), (64, 64, 96), (40, 300, 600), (1030, 40, 70), (70, 1030, 300)]
layouts = pytest.mark.parametrize("transposed", [False, True], ids=["x W", "x Wᵀ"])


def matrix(rows: int, columns: int, transposed: bool = False) -> Tensor:
    """Random numbers, part of a wider matrix; of stride 1 in its first dimension if it is `transposed`."""
    return matrix(columns, rows).t() if transposed else torch.randn(rows, columns + 3)[:, 2:-1]


def multiply(x: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x w + bias, or added to `out`."""
    add = out is not None
    if out is None:
        out = torch.full((x.shape[0], w.shape[1] + 2), torch.nan)[:, 1:-1]
    module, view = extension.module(), extension.view
    module.product_f32(view(x), view(w), extension.optional_view(bias), add, view(out), torch.get_num_threads())
    return out


def errors(found: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Of each number, relative to the norms of a row of x and a column of w."""
    size = torch.linalg.vector_norm(x.double(), dim=1)[:, None] * torch.linalg.vector_norm(w.double(), dim=0)
    return (found.double() - x.double() @ w.double()).abs() / size.clamp_min(1e-300)


def assert_close(found: Tensor, x: Tensor, w: Tensor) -> None:
    assert found.shape == (x.shape[0], w.shape[1])
    assert errors(found, x, w).max() < 2.0**-22


@layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    rows, depth, columns = shape
    x, w, bias = matrix(rows, depth), matrix(depth, columns, transposed), torch.randn(columns)
    assert_close(multiply(x, w), x, w)
    ones = torch.ones(rows, 1)
    assert_close(multiply(x, w, bias), torch.cat([x, ones], 1), torch.cat([w, bias[None]]))
    before = torch.randn(rows, columns)
    assert torch.equal(multiply(x, w, out=before.clone()), multiply(x, w) + before)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 600),
    st.integers(1, 400),
    st.booleans(),
    st.integers(0, 28),
    st.integers(0, 2**31),
)
def test_numbers_of_many_sizes(
    rows: int, depth: int, columns: int, transposed: bool, exponents: int, seed: int
) -> None:
    """Those of a row differ by powers of two up to 2^56, and so do rows and columns."""
    torch.manual_seed(seed)

    def spread(x: Tensor) -> Tensor:
        each = torch.randint(-exponents, exponents + 1, x.shape)
        return x * 2.0 ** each.float() * 2.0 ** torch.randint(-exponents, exponents + 1, (len(x), 1)).float()

    x, w = spread(matrix(rows, depth)), spread(matrix(columns, depth)).t()
    w = w if transposed else w.contiguous()
    assert_close(multiply(x, w), x, w)


@layouts
@pytest.mark.parametrize("depth", [64, 512, 4096])
def test_as_exact_as_pytorch(depth: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, w = matrix(200, depth), matrix(depth, 300, transposed)
    exact = x.double() @ w.double()
    ours, theirs = (torch.linalg.vector_norm(found.double() - exact) for found in (multiply(x, w), x @ w))
    assert ours <= theirs


@layouts
def test_whole_numbers_are_exact(transposed: bool) -> None:
    """Of 24 bits, all of which count: x is a permutation, which moves rows of w."""
    torch.manual_seed(0)
    w = torch.randint(2**23, 2**24, (300, 100)).float() * torch.tensor([1.0, -1.0]).repeat(50)
    order = torch.randperm(300)
    x = torch.eye(300)[order]
    assert torch.equal(multiply(x, w.t().contiguous().t() if transposed else w), w[order])
    assert torch.equal(multiply(w.t().contiguous(), x.t().contiguous().t() if transposed else x), w.t() @ x)


EXTREMES = [math.inf, -math.inf, math.nan, 3e38, 2e-45, 1e-38, 1e-30, 0.0]


@layouts
@pytest.mark.parametrize("number", EXTREMES)
@pytest.mark.parametrize("everywhere", [False, True])
def test_numbers_that_tiles_cannot_take(number: float, everywhere: bool, transposed: bool) -> None:
    """In a row of x, and in a column of w: results are what fp32 gives, and elsewhere as near as they were."""
    torch.manual_seed(0)
    x, w = matrix(70, 300), matrix(300, 80, transposed)
    if everywhere:
        x[5], w[:, 41] = number, number
    else:
        x[5, 270], w[3, 41] = number, number
    found, exact = multiply(x, w), x.double() @ w.double()
    reference = (x @ w).double()
    odd = ~reference.isfinite()
    assert torch.equal(found.double()[odd].nan_to_num(nan=7.0), reference[odd].nan_to_num(nan=7.0))
    size = torch.linalg.vector_norm(x.double(), dim=1)[:, None] * torch.linalg.vector_norm(w.double(), dim=0)
    near = (found.double() - exact).abs() <= 2.0**-22 * size + 2.0**-140
    assert near[~odd].all()


def test_rows_of_zeros_and_padding() -> None:
    x, w = torch.zeros(64, 100), matrix(100, 50)
    x[::2] = torch.randn(32, 100)
    assert (multiply(x, w)[1::2] == 0).all()
    assert (multiply(torch.zeros(64, 100), torch.zeros(100, 50)) == 0).all()


@layouts
def test_the_same_for_any_number_of_threads(transposed: bool) -> None:
    torch.manual_seed(0)
    x, w, before = matrix(150, 700), matrix(700, 900, transposed), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(multiply(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@layouts
@pytest.mark.parametrize("shape", [(5, 0, 7, 3), (130, 300, 90, 16), (40, 20, 30, 300), (0, 4, 5, 2), (4, 5, 0, 2)])
def test_with_a_low_rank_product(shape: tuple[int, int, int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    rows, depth, columns, ranks = shape
    x, large = matrix(rows, depth), matrix(depth, columns, transposed)
    s, factors, bias = matrix(rows, ranks), matrix(ranks, columns, transposed), torch.randn(columns)
    out = torch.full((rows, columns + 2), torch.nan)[:, 1:-1]
    low_rank._multiply(x, large, s, factors, 1.75, bias, out)
    ones = torch.ones(rows, 1)
    if out.numel():
        assert_close(out, torch.cat([1.75 * s, x, ones], 1), torch.cat([factors, large, bias[None]]))


def test_steps_of_ops_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many rows on, and where the user wants fp32: the bits tell by whom a product was made."""
    torch.manual_seed(0)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(products, "TILED_F32_ROWS", 40)
    w = matrix(60, 200)
    try:
        for rows, precision, ours in ((40, "highest", True), (39, "highest", False), (40, "high", False)):
            torch.set_float32_matmul_precision(precision)
            x, grad = matrix(rows, 200), matrix(rows, 60)
            out, out_grad = torch.empty(rows, 60), torch.ones(rows, 200)
            products.linear(out, x, [w], "cpu", bias=w[:, 0])
            products.linear_grad(out_grad, grad, [w], "cpu", add=True)
            assert torch.equal(out, multiply(x, w.t(), w[:, 0].contiguous())) == ours
            assert torch.equal(out_grad, multiply(grad, w, out=torch.ones(rows, 200))) == ours
    finally:
        torch.set_float32_matmul_precision(before)


def test_wrong_arguments_are_refused() -> None:
    x, w, bias = torch.randn(8, 6), torch.randn(6, 4), torch.randn(4)
    for wrong in ((x, w.t()), (x.double(), w), (x, w[:5]), (x.t().contiguous().t(), w), (x, w.repeat(2, 2)[::2, ::2])):
        with pytest.raises(ValueError, match=r"product_f32: \w+ is .*; expected"):
            multiply(*wrong)
    for wrong_bias in (bias[:3], bias.double()):
        with pytest.raises(ValueError, match="bias"):
            multiply(x, w, wrong_bias)
    with pytest.raises(ValueError, match="product_f32: out is"):
        multiply(x, w, out=torch.empty(8, 5))
    with pytest.raises(ValueError, match="two matrices"):
        multiply(x[0], w, out=torch.empty(8, 4))
    with pytest.raises(ValueError, match="a column or more"):
        multiply(x[:, :0], w[:0])
    s, factors, out = torch.randn(8, 2), torch.randn(2, 4), torch.empty(8, 4)
    for wrong in ((s[:7], factors), (s, factors.t()), (s[:, 0], factors), (s, factors.double())):
        with pytest.raises(ValueError, match=r"product_f32: \w+ is .*; expected"):
            low_rank._multiply(x, w, *wrong, 1.0, None, out)
