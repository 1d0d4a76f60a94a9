"""The CPU's small products of a low-rank update, and the large product that starts from them, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.ops import extension, lora_linear_group, low_rank, products
from mmfast.ops.backends import machine

if reason := machine(torch.device("cpu")).lacks("cpu"):
    pytest.skip(reason, allow_module_level=True)

FP32, BF16 = torch.float32, torch.bfloat16
STEPS = low_rank.STEPS["cpu"]
# Of a result in fp32, of one that is rounded to bfloat16 once, and of PyTorch's.
TOLERANCE = {FP32: 1e-6, BF16: 2**-8, None: 1e-2}
NO_TILES = None if extension.has_amx() else "this CPU does not multiply bfloat16 in tiles"
in_tiles = pytest.mark.skipif(NO_TILES is not None, reason=NO_TILES or "")
# As it is on this CPU, and as on one without AMX.
KINDS = [pytest.param(FP32, True, id="fp32"), pytest.param(BF16, True, id="bf16-tiles", marks=in_tiles)]
KINDS += [pytest.param(BF16, False, id="bf16-pytorch")]
# Rows, features, columns and ranks: one of each; odd; whole tiles; several slices and panels; many ranks; more columns
# than pass together; parts of several runs; none.
SHAPES = [(1, 1, 1, 1), (5, 33, 17, 3), (64, 64, 96, 16), (70, 600, 1030, 17), (290, 140, 40, 130)]
SHAPES += [(30, 2100, 2500, 16), (1000, 40, 30, 70)]
SHAPES += [(0, 8, 8, 2), (3, 0, 4, 2), (3, 4, 0, 2)]


def matrix(*shape: int, dtype: torch.dtype, more: int = 0) -> Tensor:
    """Random numbers; with `more`, columns of a matrix that is so much wider."""
    return torch.randn(shape[0], shape[1] + more).to(dtype)[:, : shape[1]]


def assert_close(found: Tensor, wanted: Tensor, rounded: torch.dtype | None) -> None:
    assert found.shape == wanted.shape
    error, size = (torch.linalg.vector_norm(t).item() for t in (found.double() - wanted, wanted))
    assert error <= TOLERANCE[rounded] * size, f"error {error}, size {size}"


def steps_of(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each step makes, and what it should."""
    rows, features, columns, ranks = shape
    x, grad = matrix(rows, features, dtype=dtype, more=3), matrix(rows, columns, dtype=dtype)
    a, b = matrix(ranks, 2 * features, dtype=dtype)[:, ::2], matrix(columns, ranks, dtype=FP32)
    s, bias = matrix(rows, ranks, dtype=dtype, more=5), torch.randn(columns)
    y, grad_x = (torch.full((rows, n + 2), torch.nan, dtype=dtype) for n in (columns, features))
    found, wanted = {"s": STEPS.down(x, a, None, 0)}, {"s": x.double() @ a.double().t()}
    STEPS.up(s, b, 1.75, bias, y[:, :columns])
    STEPS.grad_x(s, a, None, 0, grad_x[:, :features])
    assert y[:, columns:].isnan().all()
    found |= {"y": y[:, :columns], "grad_x": grad_x[:, :features], "grad_a": STEPS.grad_a(s, x, None, 0)}
    cast, wide = b.to(dtype).double(), s.double()
    wanted |= {"y": 1.75 * wide @ cast.t() + bias.to(dtype).double(), "grad_x": wide @ a.double()}
    wanted |= {"grad_a": wide.t() @ x.double()}
    found["ds"], grad_b = STEPS.read_grad(grad, b, s, 0.75)
    assert grad_b is not None
    found |= {"grad_b": grad_b, "ds alone": STEPS.read_grad(grad, b, None, 0.75)[0]}
    wanted |= dict.fromkeys(("ds", "ds alone"), 0.75 * grad.double() @ cast)
    wanted |= {"grad_b": 0.75 * grad.double().t() @ wide}
    return found, wanted


def check_steps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            found, wanted = steps_of(shape, dtype)
            made.append(found)
    finally:
        torch.set_num_threads(threads)
    ours = dtype == FP32 or products.has_tiles(dtype, "cpu")
    for name, tensor in found.items():
        is_sum = name in ("grad_a", "grad_b")
        assert tensor.dtype == (FP32 if is_sum else dtype)
        assert_close(tensor, wanted[name], tensor.dtype if ours else None)
    if ours:
        assert all(torch.equal(made[0][name], made[1][name]) for name in found)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("kind", "tiles"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps(shape: tuple[int, ...], kind: torch.dtype, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not tiles:
        monkeypatch.setattr(extension, "has_amx", lambda: False)
    check_steps(shape, kind)


@in_tiles
@given(st.tuples(st.integers(1, 150), st.integers(1, 200), st.integers(1, 200), st.integers(1, 130)))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_steps_in_tiles_of_any_shape(shape: tuple[int, ...]) -> None:
    check_steps(shape, BF16)


def multiply(shape: tuple[int, ...], along: int) -> None:
    """The large product, with its matrix row by row (0) or column by column (1)."""
    rows, features, columns, ranks = shape
    x, s = matrix(rows, features, dtype=BF16, more=3), matrix(rows, ranks, dtype=BF16, more=2)
    large = matrix(features, columns, dtype=BF16) if along == 0 else matrix(columns, features, dtype=BF16).t()
    factors, bias = matrix(ranks, 2 * columns, dtype=BF16)[:, ::2], torch.randn(columns)
    wide = x.double() @ large.double() + 1.5 * s.double() @ factors.double()
    for added in (None, bias):
        out = torch.full((rows, columns + 2), torch.nan, dtype=BF16)
        low_rank._multiply(x, large, s, factors, 1.5, added, out[:, :columns])
        wanted = wide if added is None else wide + added.bfloat16().double()
        assert_close(out[:, :columns], wanted, BF16)
        assert out[:, columns:].isnan().all()


@in_tiles
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("along", [0, 1])
# The last three: more columns, and more rows, than a block has, and a depth of two.
@pytest.mark.parametrize("shape", [*SHAPES, (40, 64, 520, 16), (1060, 32, 40, 33), (70, 2100, 300, 5)])
def test_large_product_starts_from_the_update(shape: tuple[int, ...], along: int) -> None:
    multiply(shape, along)


@in_tiles
@given(st.tuples(st.integers(1, 100), st.integers(1, 200), st.integers(1, 300), st.integers(1, 70)), st.integers(0, 1))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_large_product_of_any_shape(shape: tuple[int, ...], along: int) -> None:
    multiply(shape, along)


@in_tiles
def test_padding_lets_nothing_in() -> None:
    """What is not finite stays in its row, though tiles reach beyond rows, columns and ranks."""
    x, a, b = matrix(70, 45, dtype=BF16), matrix(3, 45, dtype=BF16), matrix(50, 3, dtype=FP32)
    x[4, 44], x[69, 0] = torch.inf, torch.nan
    s = STEPS.down(x, a, None, 0)
    others = torch.ones(70, dtype=torch.bool)
    others[[4, 69]] = False
    assert s[4].isinf().all()
    assert s[69].isnan().all()
    assert s[others].isfinite().all()
    y = torch.empty(70, 50, dtype=BF16)
    finite = torch.ones_like(s)
    low_rank._multiply(x, matrix(45, 50, dtype=BF16), finite, b.bfloat16().t(), 1.0, None, y)
    assert y[4].isinf().all()
    assert y[69].isnan().all()
    assert y[others].isfinite().all()
    grad_a = STEPS.grad_a(finite, x, None, 0)
    assert grad_a.isfinite().all(0).tolist() == [False, *[True] * 43, False]


@in_tiles
@pytest.mark.parametrize("siblings", [1, 2])
def test_lora_linear_takes_the_large_product_from_so_many_rows(siblings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    multiply = low_rank._multiply

    def counted(x: Tensor, *args: Any) -> None:
        ran.append(x.shape[0])
        multiply(x, *args)

    monkeypatch.setattr(low_rank, "_multiply", counted)
    monkeypatch.setattr(low_rank, "TILED_BLOCKS", 0)
    weights = [matrix(40, 60, dtype=BF16) * 0.1 for _ in range(siblings)]
    lora_as, lora_bs = ([matrix(*size, dtype=FP32) for _ in range(siblings)] for size in ((4, 60), (40, 4)))
    scalings = [0.25] * siblings

    def results(x: Tensor, backend: str) -> list[Tensor]:
        x = x.requires_grad_()
        outputs = lora_linear_group(x, [w.to(x.dtype) for w in weights], lora_as, lora_bs, scalings, backend=backend)
        return [*outputs, *torch.autograd.grad([y.sum() for y in outputs], x)]

    x = matrix(30, 60, dtype=BF16)
    wanted = results(x.double(), "reference")
    for least, expected in ((30, [30] * (siblings + 1)), (31, [])):
        monkeypatch.setattr(low_rank, "TILED_ROWS", least)
        for found, exact in zip(results(x.clone(), "cpu"), wanted, strict=True):
            error = torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact)
            assert error < 1e-2
        assert ran == expected
        ran.clear()


@in_tiles
def test_wrong_arguments_of_the_kernels_are_refused() -> None:
    x, large, s, factors = (matrix(*size, dtype=BF16) for size in ((8, 6), (6, 4), (8, 2), (2, 4)))
    out = torch.empty(8, 4, dtype=BF16)
    for wrong in ((x, large.t(), s, factors), (x.float(), large, s, factors), (x, large, s[:7], factors)):
        with pytest.raises(ValueError, match=r"product(_f32)?: \w+ is .*; expected (bfloat16|float32)\["):
            low_rank._multiply(*wrong, 1.0, None, out)
