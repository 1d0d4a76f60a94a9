"""int8 weights: every backend against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_linear_close, run_linear
from torch import Tensor

from mmfast.ops import (
    BackendUnavailable,
    Int8Weight,
    explain,
    int8,
    int8_dequantize,
    int8_linear,
    int8_quantize,
    quantized_linear,
    use_backend,
    weights,
)
from mmfast.ops.backends import Machine
from mmfast.ops.int8 import reference_dequantize, reference_quantize

SHAPES = [(2, 64), (24, 40), (5, 131), (3, 1), (150, 128)]


def some_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales that differ from row to row, and a row of zeros."""
    weight = torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))
    weight[1] = 0
    return weight.to(dtype)


def same(a: Int8Weight, b: Int8Weight) -> bool:
    return a.dtype == b.dtype and all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


def assert_close(backend: str, x: Tensor, q: Int8Weight, bias: Tensor | None = None) -> None:
    assert_linear_close(int8_linear, backend, x, q, bias)


# ---- the definition


def test_by_hand() -> None:
    weight = torch.tensor([[127.0, -254.0, 1.0, 3.0, 5.0], [0, 0, 0, 0, 0]])
    q = reference_quantize(weight)
    assert q.values.tolist() == [[64, -127, 0, 2, 2], [0] * 5]  # 63.5, 0.5, 1.5 and 2.5: half to even
    assert q.scale.tolist() == [2.0, 0.0]
    assert reference_dequantize(q).tolist() == [[128, -254, 0, 4, 4], [0] * 5]
    assert q.shape == (2, 5) == weights.shape(weights.tensors(q))


def test_invariants() -> None:
    weight = some_weight((32, 128))
    q = reference_quantize(weight)
    dense = reference_dequantize(q)
    assert ((dense - weight).abs() <= 0.5001 * q.scale[:, None]).all()
    assert torch.equal(reference_quantize(-weight).values, -q.values)
    assert torch.equal(reference_quantize(4 * weight).values, q.values)
    assert torch.equal(reference_quantize(dense).values, q.values)
    tiny = reference_quantize(torch.full((1, 4), 1e-44))
    assert tiny.scale.item() == 0.0 and not tiny.values.any()


# ---- the kernels: quantise and dequantise


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantises_to_the_same_bits(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = some_weight(shape, dtype)
    for w in (weight, weight.t().contiguous().t(), weight[:, ::2], 1e-4 * weight):
        assert same(int8_quantize(w, backend="cpu"), reference_quantize(w))
    halves = (torch.arange(-254, 255) / 2).to(dtype)[None]
    assert same(int8_quantize(halves, backend="cpu"), reference_quantize(halves))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantises_to_the_same_bits(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    q = reference_quantize(some_weight(shape))
    assert torch.equal(int8_dequantize(q, dtype, backend=backend), reference_dequantize(q, dtype))
    for first, last in ((0, shape[0]), (1, 2), (shape[0] - 1, shape[0]), (1, 1)):
        out = torch.empty((last - first, shape[1]), dtype=dtype)
        int8.dequantize_rows(q.tensors(), first, last, out, backend)
        assert torch.equal(out, reference_dequantize(q, dtype)[first:last])


@pytest.mark.parametrize("columns", [4096, 4090])
def test_dequantises_past_the_caches(columns: int) -> None:
    q = int8_quantize(torch.randn(2100, columns))
    for dtype in DTYPES:
        dense = int8_dequantize(q, dtype, backend="cpu")
        assert dense.numel() * dense.element_size() >= 16 << 20
        assert torch.equal(dense, reference_dequantize(q, dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(backend: str, value: float) -> None:
    weight = torch.randn(3, 33)
    weight[1, 32] = value
    with pytest.raises(ValueError, match=r"int8_quantize: weight \[3, 33\] holds an infinity or NaN"):
        int8_quantize(weight, backend=backend)


# ---- the kernels: linear


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("shape", [(48, 64), (17, 331)])
def test_close_to_float64(backend: str, dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    q = int8_quantize(some_weight(shape, dtype))
    assert_close(backend, torch.randn(rows, shape[1]).to(dtype), q, torch.randn(shape[0]) if rows != 3 else None)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 200))
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    step = data.draw(st.sampled_from([1, 2]))
    x = torch.randn(*leading, columns * step).to(dtype)[..., ::step]
    if len(leading) > 1 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    bias = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    q = int8_quantize(torch.randn(rows, columns))
    before = x.clone()
    assert_close(backend, x, q, None if bias is None else torch.randn(rows).to(bias))
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    q, threads = int8_quantize(torch.randn(513, 1024)), torch.get_num_threads()
    x, results = torch.randn(rows, 1024), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([int8_dequantize(q, backend="cpu"), int8_linear(x, q, backend="cpu")])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend: str) -> None:
    q = int8_quantize(torch.randn(8, 64))
    output, grad_x, grad_bias = run_linear(int8_linear, torch.randn(2, 0, 64), q, torch.randn(8), backend=backend)
    assert output.shape == (2, 0, 8) and grad_x.shape == (2, 0, 64)
    assert grad_bias.tolist() == [0.0] * 8


def test_gradcheck_of_the_reference() -> None:
    q = int8_quantize(torch.randn(4, 6))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: int8_linear(x, q, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: int8_linear(x, q, b), (x, bias))


# ---- the op in PyTorch


def test_opcheck() -> None:
    ops, weight = torch.ops.mmfast, torch.randn(6, 66)
    parts = int8_quantize(weight).tensors()
    torch.library.opcheck(ops.int8_quantize.default, (weight, "cpu"))
    torch.library.opcheck(ops.int8_dequantize.default, (parts, torch.bfloat16, "cpu"))
    for rows in (2, 20):
        x = torch.randn(rows, 66)
        torch.library.opcheck(ops.quantized_linear_fwd.default, (x, parts, torch.randn(6), "cpu"))
        torch.library.opcheck(ops.quantized_linear_bwd.default, (torch.randn(rows, 6), parts, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    q, bias = int8_quantize(torch.randn(16, 64)), torch.randn(16)
    compiled = torch.compile(int8_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 12):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(
            run_linear(compiled, x, q, bias, backend="cpu"), run_linear(int8_linear, x, q, bias, backend="cpu")
        )
    dense = torch.compile(int8_dequantize, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(dense, int8_dequantize(q))


def test_saves_nothing_but_the_weight() -> None:
    saved: list[Tensor] = []
    q = int8_quantize(torch.randn(16, 64))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        int8_linear(torch.randn(3, 64, requires_grad=True), q, torch.randn(16, requires_grad=True), backend="cpu")
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in q.tensors()]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast(backend: str) -> None:
    q, x = int8_quantize(torch.randn(16, 64)), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        output = int8_linear(x, q, backend=backend)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, F.linear(x, int8_dequantize(q)).half(), rtol=4e-3, atol=4e-2)


# ---- the choice of a backend


@pytest.mark.parametrize(
    ("dtype", "on", "request_", "chosen"),
    [
        (torch.bfloat16, Machine("cpu"), None, "cpu"),
        (torch.float64, Machine("cpu"), None, "reference"),
        (torch.bfloat16, Machine("cpu", no_extension="not built"), None, "reference"),
        (torch.bfloat16, Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (torch.bfloat16, Machine("cuda", (9, 0)), None, "triton"),
        (torch.bfloat16, Machine("cuda", (7, 5)), None, "reference"),
    ],
)
def test_selection(dtype: torch.dtype, on: Machine, request_: str | None, chosen: str) -> None:
    q = int8_quantize(torch.randn(16, 64))
    assert int8.LINEAR.select(int8.check_linear(torch.zeros(2, 64, dtype=dtype), q), on, request_) == chosen
    assert int8.DEQUANTIZE.select(int8.check_dequantize(q, dtype), on, request_) == chosen


def test_impossible_request() -> None:
    q = int8_quantize(torch.randn(16, 64))
    with pytest.raises(BackendUnavailable, match=r"int8_linear: backend 'cpu' cannot .*there is no float64 kernel"):
        int8_linear(torch.zeros(2, 64, dtype=torch.float64), q, backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"int8_dequantize: backend 'cpu' cannot .*there is no float64 kernel"):
        int8_dequantize(q, torch.float64, backend="cpu")
    with pytest.raises(BackendUnavailable, match="int8_quantize: has no 'triton' backend"):
        int8_quantize(torch.zeros(2, 64), backend="triton")


def test_explain() -> None:
    q = int8_quantize(torch.randn(16, 64))
    assert explain(int8_linear, torch.zeros(2, 64), q).splitlines() == [
        "int8_linear runs on: cpu",
        "  triton: the Triton interpreter is for tests; ask for it by name",
        "  reference: cpu comes first",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for module, name in ((quantized_linear, "_FWD"), (int8, "_DEQUANTIZE")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op: ran.append(a[-1]) or op(*a))
    q = int8_quantize(torch.randn(16, 64))
    with use_backend(backend):
        int8_dequantize(q)
    int8_linear(torch.randn(2, 64), q, backend=backend)
    assert ran == [backend] * 2


Q = int8_quantize(torch.ones(4, 64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: int8_quantize(torch.zeros(64)),
            ValueError,
            r"int8_quantize: weight has shape \[64\]; expected \[N, K\]",
        ),
        (lambda: int8_quantize(torch.zeros(0, 64)), ValueError, r"int8_quantize: weight has shape \[0, 64\]"),
        (lambda: int8_quantize(torch.zeros(2, 64).double()), TypeError, "int8_quantize: weight is torch.float64"),
        (lambda: int8_dequantize(Q, torch.int8), TypeError, "int8_dequantize: dtype is torch.int8"),
        (lambda: int8_dequantize(torch.zeros(2, 64)), TypeError, "int8_dequantize: the weight is a Tensor"),
        (lambda: int8_dequantize(Q._replace(values=Q.scale)), ValueError, r"values are torch.float32 \[4\]"),
        (lambda: int8_dequantize(Q._replace(scale=Q.scale[:3])), ValueError, r"scale is torch.float32 \[3\]; expected"),
        (
            lambda: int8_dequantize(Q._replace(scale=torch.zeros(4, device="meta"))),
            ValueError,
            "scale is on meta but values on cpu; move one",
        ),
        (
            lambda: int8_dequantize(Q._replace(values=Q.values.t().contiguous().t())),
            ValueError,
            "parts of the weight must be contiguous",
        ),
        (lambda: int8_linear(torch.zeros(2, 32), Q), ValueError, r"int8_linear: x has shape \[2, 32\] but the weight"),
        (lambda: int8_linear(torch.zeros(2, 64), Q, torch.zeros(3)), ValueError, r"bias has shape \[3\]"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_cpp_checks_what_it_is_given() -> None:
    from mmfast.ops import extension

    module, view = extension.module(), extension.view
    parts = [view(part) for part in Q.tensors()]
    with pytest.raises(ValueError, match=r"out is float32\[4, 32\]; expected float32\[4, 64\]"):
        module.int8_dequantize_cpu(*parts, 0, 4, view(torch.zeros(4, 32)), 1)
    with pytest.raises(ValueError, match=r"rows 0 to 5 of int8\[4, 64\]"):
        module.int8_dequantize_cpu(*parts, 0, 5, view(torch.zeros(5, 64)), 1)
    with pytest.raises(ValueError, match=r"x is float32\[1, 32\]; expected float32\[1, 64\]"):
        module.int8_linear_cpu(view(torch.zeros(1, 32)), *parts, None, view(torch.zeros(1, 4)), 1)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 447)])
def test_gpu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    q = int8_quantize(some_weight(shape, dtype).cuda())
    for out in DTYPES:
        assert torch.equal(int8_dequantize(q, out, backend="triton"), reference_dequantize(q, out))
    for rows in (1, 3, 16, 64):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        assert_close("triton", x, q, torch.randn(shape[0], device="cuda"))
        first, second = (int8_linear(x, q, backend="triton") for _ in range(2))
        assert torch.equal(first, second), "the same bits every time"
