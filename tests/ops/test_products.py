"""Products with a frozen weight: blocks, chunks and dtypes, on machines with 16-bit instructions and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast.ops import products
from mmfast.ops.lora_linear import reference as lora_reference
from mmfast.ops.mixture_adapter import reference as adapter_reference

FAST = {True: "with 16-bit products", False: "without"}


@pytest.fixture(params=FAST, ids=FAST.get)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_has_products", lambda dtype: dtype == torch.float32 or request.param)
    return request.param


def matrices(rows: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(rows, n).to(dtype)


def test_dtype_and_chunks(machine: bool) -> None:
    few, many = torch.zeros(products.DOT_ROWS, 4), torch.zeros(products.DOT_ROWS + 1, 4)
    assert products.compute_dtype(many, "cpu") == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        slow = dtype if machine else torch.float32
        assert products.compute_dtype(many.to(dtype), "cpu") == slow
        assert products.compute_dtype(few.to(dtype), "cpu") == dtype
        assert products.compute_dtype(few.to(dtype), "cpu", grad=True) == slow
    x = torch.zeros(2500, 1, dtype=torch.bfloat16)
    assert products.row_chunks(x, x.dtype) == [slice(0, 2500)]
    assert products.row_chunks(x, torch.float32) == [slice(0, 1024), slice(1024, 2048), slice(2048, 2500)]
    assert products.row_chunks(x[:0], torch.float32) == [slice(0, 0)]


def test_other_backends_keep_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_products", lambda dtype: False)
    assert products.compute_dtype(torch.empty(4096, 64, dtype=torch.float16), "triton") == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 70, 2**21])
def test_a_weight_of_another_dtype_is_taken_in_blocks(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", block)
    _, weight, _ = matrices(5, 11, 20, dtype)
    x, _, grad = matrices(5, 11, 20)
    out, out_grad = torch.full((5, 11), float("nan")), torch.full((5, 20), float("nan"))
    products.linear(out, x, [weight], "cpu")
    products.linear_grad(out_grad, grad, [weight], "cpu")
    torch.testing.assert_close(out, x @ weight.float().t())
    torch.testing.assert_close(out_grad, grad @ weight.float())
    products.linear(out, x, [weight], "cpu", add=True)
    products.linear_grad(out_grad, grad, [weight], "cpu", add=True)
    torch.testing.assert_close(out, 2 * x @ weight.float().t())
    torch.testing.assert_close(out_grad, 2 * grad @ weight.float())


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (5, 3, 0)])
def test_empty_matrices(shape: tuple[int, int, int]) -> None:
    x, weight, grad = matrices(*shape)
    out, out_grad = torch.full((shape[0], shape[1]), float("nan")), torch.full((shape[0], shape[2]), float("nan"))
    products.linear(out, x, [weight], "cpu")
    products.linear_grad(out_grad, grad, [weight], "cpu")
    assert torch.equal(out, x @ weight.t())
    assert torch.equal(out_grad, grad @ weight)


def test_autocast_does_not_touch_them() -> None:
    x, weight, grad = matrices(9, 6, 7)
    out, out_grad = torch.empty(9, 6), torch.empty(9, 7)
    with torch.autocast("cpu", torch.bfloat16):
        products.linear(out, x, [weight.bfloat16()], "cpu")
        products.linear_grad(out_grad, grad, [weight], "cpu")
    torch.testing.assert_close(out, x @ weight.bfloat16().float().t())
    torch.testing.assert_close(out_grad, grad @ weight)


@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_compiled_references_keep_the_scale_of_an_update(shape: tuple[int, ...]) -> None:
    """Of matrices too, whose sum with a product inductor makes one op that has no scale."""
    x, weight, a, b = torch.randn(shape), torch.randn(8, 8), torch.randn(4, 8), torch.randn(8, 4)
    lora = torch.compile(lora_reference, dynamic=False)(x, weight, a, b, 2.0)
    torch.testing.assert_close(lora, lora_reference(x, weight, a, b, 2.0))
    arguments = x, a, None, b[None], None, None, 2.0
    adapter = torch.compile(adapter_reference, dynamic=False)(*arguments)
    torch.testing.assert_close(adapter, adapter_reference(*arguments))
