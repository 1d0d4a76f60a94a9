"""The dropout mask: its definition against published numbers and statistics, the C++ form against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfast.ops import dropout as dropouts
from mmfast.ops.backends import machine
from mmfast.ops.dropout import Dropout


def of_seed(seed: int, p: float) -> Dropout:
    return Dropout(torch.tensor([seed]), dropouts.threshold(p))


def test_bits_are_those_of_philox_with_seven_rounds() -> None:
    # Known answer of Random123 for philox4x32, 7 rounds, counter 0 and key 0.
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for column, half in enumerate(halves):
        seed = torch.zeros(1, dtype=torch.int64)
        assert dropouts.kept(Dropout(seed, half), 1, 8)[0, column]
        assert not dropouts.kept(Dropout(seed, half + 1), 1, 8)[0, column]


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_as_many_are_dropped_as_should_be_and_independently(p: float) -> None:
    rows, columns = 2048, 1024
    mask = dropouts.kept(of_seed(2**62 + 3, p), rows, columns).double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(mask.mean() - (1 - p)) < 4 * spread / (rows * columns) ** 0.5
    assert mask.mean(0).std() == pytest.approx(spread / rows**0.5, rel=0.1)
    assert mask.mean(1).std() == pytest.approx(spread / columns**0.5, rel=0.15)
    for lines in (mask[:64], mask.t()[:64]):  # neighbours share Philox calls
        correlation = torch.corrcoef(lines).fill_diagonal_(0).abs().max()
        assert correlation < 6 / lines.shape[1] ** 0.5


def test_seeds_and_rows_beyond_32_bits_matter() -> None:
    masks = [dropouts.kept(of_seed(seed, 0.5), 4, 64) for seed in (0, 1, 2**32, 2**40 + 1)]
    masks += [dropouts.kept(of_seed(0, 0.5), 4, 64, first_row=row) for row in (4, 2**32, 2**33)]
    for i, a in enumerate(masks):
        assert all(not torch.equal(a, b) for b in masks[i + 1 :])
    assert torch.equal(dropouts.kept(of_seed(5, 0.5), 2, 64, first_row=2), dropouts.kept(of_seed(5, 0.5), 4, 64)[2:])


def test_seed_follows_the_generator() -> None:
    torch.manual_seed(3)
    first = dropouts.draw_seed(torch.device("cpu"))
    second = dropouts.draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, dropouts.draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cpu_equals_the_definition_bit_for_bit(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 1100))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    dropout = of_seed(data.draw(st.integers(0, 2**63 - 1)), data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.999])))
    first_row = data.draw(st.sampled_from([0, 7, 2**31, 2**33]))
    x = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    expected = torch.where(dropouts.kept(dropout, rows, columns, first_row), x.float() * dropout.scale, 0).to(dtype)
    out = torch.full_like(x, float("nan"))
    assert torch.equal(dropouts.apply_cpu(x, dropout, first_row, out), expected)
    assert torch.equal(dropouts.apply_cpu(x.clone(), dropout, first_row, out), expected)
    dropouts.apply_cpu(x, dropout, first_row, x)
    assert torch.equal(x, expected)


def test_what_is_dropped_is_zero_whatever_it_held() -> None:
    dropout = of_seed(1, 0.5)
    x = torch.full((8, 64), float("nan"))
    dropped = ~dropouts.kept(dropout, 8, 64)
    for result in (dropouts.apply_cpu(x, dropout, 0, torch.empty_like(x)), dropouts.reference(x, dropout)):
        assert (result[dropped] == 0).all()
        assert result[~dropped].isnan().all()


def test_probability_is_rounded_and_what_stays_is_scaled() -> None:
    assert dropouts.threshold(0.05) == 3277
    assert dropouts.threshold(0.0) == dropouts.threshold(1e-6) == 0
    assert dropouts.threshold(0.9999999) == 65535
    assert of_seed(0, 0.5).scale == 2.0
    x = torch.ones(200, 512)
    assert dropouts.reference(x, of_seed(0, 0.3)).mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.skipif(bool(machine(torch.device("cpu")).lacks("cpu")), reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_op_on_a_cpu_and_its_gradient_are_the_definition_s(dtype: torch.dtype) -> None:
    dropout = of_seed(7, 0.3)
    x = torch.randn(2, 5, 140, dtype=dtype)[..., 3:].requires_grad_()
    grad = torch.randn(x.shape, dtype=dtype)
    found, expected = dropouts.on_cpu(x, dropout), dropouts.reference(x, dropout)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))
    torch.testing.assert_close(torch.compile(dropouts.on_cpu, backend="aot_eager", fullgraph=True)(x, dropout), found)


def test_opcheck() -> None:
    if machine(torch.device("cpu")).lacks("cpu"):
        pytest.skip("the extension is not built")
    torch.library.opcheck(torch.ops.mmfast.dropout, (torch.randn(3, 20), torch.tensor([5]), 3000, "cpu"))
