"""The Triton kernels of lora_linear, one by one, against plain PyTorch in float64; how they cut their work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast.ops import dropout as dropouts
from mmfast.ops.backends import machine
from mmfast.ops.dropout import Dropout

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
if reason := machine(DEVICE).lacks("triton"):
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from mmfast.kernels import lora_linear as kernels
from mmfast.kernels.dropout import kept
from mmfast.kernels.lora_linear_fused import HOPPER_SHARED_MEMORY, fused, fused_tile

pytestmark = [pytest.mark.gpu] if ON_GPU else []
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Rows, features, columns and ranks: one of each; odd; several chunks; several blocks of everything; none.
SHAPES = [(1, 1, 1, 1), (5, 33, 17, 3), (70, 600, 90, 16), (290, 140, 150, 40), (17, 40, 24, 130)]
EMPTY = [(0, 8, 8, 2), (3, 0, 4, 2), (3, 4, 0, 2)]


def tensor(*shape: int, dtype: torch.dtype, stride: int | None = None) -> Tensor:
    """Random numbers; with `stride`, columns of a wider matrix."""
    wide = torch.randn(*shape[:-1], stride or shape[-1], device=DEVICE).to(dtype)
    return wide[..., : shape[-1]]


def dropout_of(p: float, seed: int = 2**40 + 17) -> Dropout | tuple[None, int]:
    return Dropout(torch.tensor([seed], device=DEVICE), dropouts.threshold(p)) if p else (None, 0)


def dropped(x: Tensor, dropout: Any) -> Tensor:
    """x in float64 after dropout."""
    return x.double() if dropout[0] is None else dropouts.reference(x.double(), dropout)


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    error, size = (torch.linalg.vector_norm(t).item() for t in (found.double() - wanted, wanted))
    assert error <= TOLERANCE[dtype] * size, f"error {error}, size {size}"


# ---- the mask


@triton.jit
def _kept_kernel(seed, threshold, out, first_row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_m = first_row + tl.arange(0, ROWS).to(tl.int64)[:, None]
    mask = kept(tl.load(seed), threshold, o_m, first_column, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], mask)


@pytest.mark.parametrize("seed", [0, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("first_row", [0, 2**31 - 3, 2**32 - 8, 2**36])
@pytest.mark.parametrize(("first_column", "columns"), [(0, 8), (64, 32)])
def test_mask_is_the_definition_bit_for_bit(seed: int, first_row: int, first_column: int, columns: int) -> None:
    dropout = Dropout(torch.tensor([seed], device=DEVICE), dropouts.threshold(0.4))
    out = torch.empty(16, columns, dtype=torch.bool, device=DEVICE)
    _kept_kernel[(1,)](*dropout, out, first_row, first_column, ROWS=16, COLUMNS=columns)
    wanted = dropouts.kept(dropout, 16, first_column + columns, first_row)[:, first_column:]
    assert torch.equal(out, wanted)
    assert 0 < out.float().mean() < 1


@pytest.mark.parametrize("threshold", [1, 32768, 65535])
def test_mask_compares_all_sixteen_bits(threshold: int) -> None:
    dropout = Dropout(torch.tensor([7], device=DEVICE), threshold)
    out = torch.empty(64, 1024, dtype=torch.bool, device=DEVICE)
    _kept_kernel[(1,)](*dropout, out, 0, 0, ROWS=64, COLUMNS=1024)
    assert torch.equal(out, dropouts.kept(dropout, 64, 1024))
    assert out.any()
    assert not out.all()


# ---- the products


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_down_and_grad_a(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    rows, features, _, ranks = shape
    dropout = dropout_of(p)
    x = tensor(rows, features, dtype=dtype, stride=features + 3)
    lora_a = tensor(ranks, features, dtype=dtype)
    s = kernels.down(x, lora_a, *dropout)
    assert s.dtype == dtype
    assert_close(s, dropped(x, dropout) @ lora_a.double().t(), dtype)
    ds = tensor(rows, ranks, dtype=dtype, stride=ranks + 5)
    grad_a = kernels.grad_a(ds, x, *dropout)
    assert grad_a.dtype == torch.float32
    assert_close(grad_a, ds.double().t() @ dropped(x, dropout), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, _, columns, ranks = shape
    s, lora_b = tensor(rows, ranks, dtype=dtype, stride=ranks + 5), tensor(columns, ranks, dtype=dtype)
    for bias in (None, torch.randn(columns, device=DEVICE), torch.randn(2 * columns, device=DEVICE)[::2].to(dtype)):
        wide = torch.full((rows, columns + 2), float("nan"), dtype=dtype, device=DEVICE)
        kernels.up(s, lora_b, bias, 1.75, wide[:, :columns])
        wanted = 1.75 * (s.double() @ lora_b.double().t()) + (0 if bias is None else bias.double())
        assert_close(wide[:, :columns], wanted, dtype)
        assert wide[:, columns:].isnan().all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_grad_x(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    rows, features, _, ranks = shape
    dropout = dropout_of(p)
    ds, lora_a = tensor(rows, ranks, dtype=dtype), tensor(ranks, features, dtype=dtype)
    out = torch.empty(rows, features, dtype=dtype, device=DEVICE)
    kernels.grad_x(ds, lora_a, *dropout, out)
    assert_close(out, dropped(ds.double() @ lora_a.double(), dropout), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_b", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (290, 0, 530, 20), *EMPTY])
def test_read_grad(shape: tuple[int, ...], need_b: bool, dtype: torch.dtype) -> None:
    rows, _, columns, ranks = shape
    grad, lora_b = tensor(rows, columns, dtype=dtype, stride=columns + 3), tensor(columns, ranks, dtype=dtype)
    s = tensor(rows, ranks, dtype=dtype, stride=ranks + 5) if need_b else None
    ds, grad_b = kernels.read_grad(grad, lora_b, s, 0.75, need_b)
    assert ds.dtype == dtype
    assert_close(ds, 0.75 * grad.double() @ lora_b.double(), dtype)
    assert (grad_b is not None) == need_b
    if s is not None and grad_b is not None:
        assert grad_b.dtype == torch.float32
        assert_close(grad_b, 0.75 * grad.double().t() @ s.double(), torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES[:2], (70, 130, 150, 40), *EMPTY])
def test_fused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, features, columns, ranks = shape
    x, weight = tensor(rows, features, dtype=dtype, stride=features + 3), tensor(columns, features, dtype=dtype)
    s, lora_b = tensor(rows, ranks, dtype=dtype, stride=ranks + 5), tensor(columns, ranks, dtype=dtype)
    for bias in (None, torch.randn(2 * columns, device=DEVICE)[::2]):
        out = torch.empty(rows, columns, dtype=dtype, device=DEVICE)
        fused(x, weight, s, lora_b, bias, 0.3, out)
        wanted = x.double() @ weight.double().t() + 0.3 * (s.double() @ lora_b.double().t())
        assert_close(out, wanted if bias is None else wanted + bias.double(), dtype)


def test_fused_takes_ranks_that_need_no_padding_as_they_are() -> None:
    x, weight = tensor(20, 64, dtype=torch.float32), tensor(30, 64, dtype=torch.float32)
    s, lora_b = tensor(20, 32, dtype=torch.float32, stride=48), tensor(30, 32, dtype=torch.float32)
    out = torch.empty(20, 30, device=DEVICE)
    fused(x, weight, s, lora_b, None, 2.0, out)
    assert_close(out, (x.double() @ weight.double().t() + 2 * (s.double() @ lora_b.double().t())), torch.float32)


def test_grouped_order_covers_every_tile_once() -> None:
    # 9 blocks of rows: one group of 8 and one of 1.
    x, weight = tensor(9 * 64 - 3, 8, dtype=torch.float32), tensor(70, 8, dtype=torch.float32)
    s, lora_b = tensor(9 * 64 - 3, 1, dtype=torch.float32), tensor(70, 1, dtype=torch.float32)
    out = torch.full((9 * 64 - 3, 70), float("nan"), device=DEVICE)
    fused(x, weight, s, lora_b, None, 1.0, out)
    assert_close(out, x.double() @ weight.double().t() + s.double() @ lora_b.double().t(), torch.float32)


@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_shape_and_seed(data: st.DataObject) -> None:
    rows, features, ranks = (data.draw(st.integers(1, most)) for most in (80, 150, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    dropout = dropout_of(data.draw(st.sampled_from([0.0, 0.1, 0.9])), data.draw(st.integers(0, 2**63 - 1)))
    x, lora_a = tensor(rows, features, dtype=dtype), tensor(ranks, features, dtype=dtype)
    s = kernels.down(x, lora_a, *dropout)
    assert_close(s, dropped(x, dropout) @ lora_a.double().t(), dtype)
    assert_close(kernels.grad_a(s, x, *dropout), s.double().t() @ dropped(x, dropout), torch.float32)
    grad = torch.empty_like(x)
    kernels.grad_x(s, lora_a, *dropout, grad)
    assert_close(grad, dropped(s.double() @ lora_a.double(), dropout), dtype)


def test_what_is_dropped_does_not_count_whatever_it_holds() -> None:
    dropout = dropout_of(0.5)
    x = torch.randn(20, 100, device=DEVICE)
    wanted = dropped(x, dropout)
    x[~dropouts.kept(Dropout(*dropout), 20, 100)] = float("nan")
    ones = torch.ones(1, 100, device=DEVICE)
    assert_close(kernels.down(x, ones, *dropout), wanted.sum(1, keepdim=True), torch.float32)
    assert_close(kernels.grad_a(torch.ones(20, 1, device=DEVICE), x, *dropout), wanted.sum(0)[None], torch.float32)


def test_the_same_call_gives_the_same_bits() -> None:
    dropout = dropout_of(0.3)
    x, lora_a = tensor(270, 520, dtype=torch.float16), tensor(8, 520, dtype=torch.float16)
    s = kernels.down(x, lora_a, *dropout)
    assert torch.equal(s, kernels.down(x, lora_a, *dropout))
    assert torch.equal(kernels.grad_a(s, x, *dropout), kernels.grad_a(s, x, *dropout))
    once, again = (kernels.read_grad(x, lora_a.t().contiguous(), s, 1.0, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


# ---- how work is cut


@given(
    rows=st.integers(1, 40000),
    columns=st.integers(1, 20000),
    ranks=st.integers(1, 400),
    element_size=st.sampled_from([2, 4]),
    processors=st.integers(1, 160),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_chunks_cover_everything_once(rows: int, columns: int, ranks: int, element_size: int, processors: int) -> None:
    shape = rows, columns, ranks, element_size, processors
    plans = [(kernels.down_plan(*shape), columns, lambda tile: tile.columns)]
    plans += [(kernels.outer_plan(*shape), rows, lambda tile: tile.rows)]
    if plan := kernels.read_grad_plan(*shape):
        plans += [(plan, rows, lambda tile: tile.rows)]
        assert plan.tile.ranks >= ranks  # it has no rank blocks
    for plan, length, step in plans:
        chunk = plan.chunk * step(plan.tile)
        assert (plan.chunks - 1) * chunk < length <= plan.chunks * chunk
    for tile in (*(plan.tile for plan, *_ in plans), kernels.up_tile(rows, ranks, element_size)):
        assert all(size >= 16 and size & (size - 1) == 0 for size in tile[:3])


@pytest.mark.parametrize("rows", [2048, 8192, 16384, 65536])
@pytest.mark.parametrize("columns", [1024, 4096, 11008])
def test_every_processor_has_work_and_parts_are_small(rows: int, columns: int) -> None:
    for ranks in (8, 16, 32, 64, 128):
        tile, _, chunks = kernels.down_plan(rows, columns, ranks, 2, 132)
        assert triton.cdiv(rows, tile.rows) * chunks >= 64
        assert chunks == 1 or chunks * ranks * 4 <= columns * 2  # a part is an fp32 s
        tile, _, chunks = kernels.outer_plan(rows, columns, ranks, 2, 132)
        assert triton.cdiv(columns, tile.columns) * chunks >= min(132, columns // 128 * rows // 256)
        assert chunks == 1 or chunks * ranks * 4 <= rows * 2
        plan = kernels.read_grad_plan(rows, columns, ranks, 2, 132)
        assert (plan is None) == (ranks > 32)
        if plan:
            parts = ranks * 4 * (triton.cdiv(columns, plan.tile.columns) * rows + plan.chunks * columns)
            assert parts <= rows * columns * 2  # what a second read would be


def test_large_tiles_of_fused_are_for_large_gpus_and_outputs() -> None:
    assert fused_tile(16384, 4096, 2, 132, HOPPER_SHARED_MEMORY)[:2] == (128, 256)
    assert fused_tile(16384, 4096, 2, 108, 166912)[:2] == (128, 128)
    assert fused_tile(512, 4096, 2, 132, HOPPER_SHARED_MEMORY)[:2] == (128, 128)
    assert fused_tile(33, 4096, 2, 132, HOPPER_SHARED_MEMORY)[:2] == (64, 128)
    assert fused_tile(1, 4096, 2, 132, HOPPER_SHARED_MEMORY)[:2] == (16, 128)
    assert fused_tile(16384, 4096, 4, 132, HOPPER_SHARED_MEMORY)[:2] == (64, 64)
