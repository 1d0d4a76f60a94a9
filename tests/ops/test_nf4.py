"""NF4: every backend against the definition, and the definition against bitsandbytes, bit by bit."""

from __future__ import annotations

import itertools
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
    NF4Weight,
    explain,
    extension,
    nf4,
    nf4_dequantize,
    nf4_linear,
    nf4_quantize,
    products,
    quantized_linear,
    use_backend,
    weights,
)
from mmfast.ops.backends import Machine
from mmfast.ops.nf4 import reference_dequantize, reference_quantize

# Whole blocks; rows that start within one; a last block that is not whole; less than a block; several nested blocks.
SHAPES = [(2, 64), (24, 40), (5, 130), (3, 2), (150, 128)]


def some_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales that differ from block to block, and a block of zeros."""
    weight = torch.randn(shape) * torch.exp(torch.randn(shape[0], 1))
    weight[1 : 1 + 64 // shape[1] + 1] = 0
    return weight.to(dtype)


def same(a: NF4Weight, b: NF4Weight) -> bool:
    parts = [a.tensors(), b.tensors()]
    return a.dtype == b.dtype and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*parts, strict=True))


def assert_close(backend: str, x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> None:
    assert_linear_close(nf4_linear, backend, x, q, bias)


# ---- the definition


def test_by_hand() -> None:
    weight = torch.zeros(2, 64)
    weight[0, :4] = torch.tensor([2.0, -2.0, 0.16, 0.0])  # 0.08 of the largest: level 8
    q = reference_quantize(weight, double_quant=False)
    assert q.packed[0, :3].tolist() == [0xF0, 0x87, 0x77]
    assert q.packed[1].tolist() == [0x77] * 32
    assert q.absmax.tolist() == [2.0, 0.0]
    dense = reference_dequantize(q)
    assert dense[0, :4].tolist() == [2.0, -2.0, pytest.approx(2 * nf4.LEVELS[8]), 0.0]
    assert not dense[1].any()


def test_a_tie_goes_to_the_lower_level() -> None:
    levels = torch.tensor(nf4.LEVELS)
    weight = torch.ones(1, 64)
    weight[0, :15] = (levels[:-1] + levels[1:]) / 2
    for backend in ("reference", "cpu"):
        packed = nf4_quantize(weight, double_quant=False, backend=backend).packed[0]
        codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)
        assert codes[:15].tolist() == list(range(15))


def test_invariants() -> None:
    weight = some_weight((32, 128))
    q = reference_quantize(weight, double_quant=False)
    dense = reference_dequantize(q)
    assert same(reference_quantize(dense, double_quant=False), q)
    assert torch.equal(reference_quantize(4 * weight, double_quant=False).packed, q.packed)
    worst = q.absmax.repeat_interleave(64).view_as(weight)
    assert ((dense - weight).abs() <= 0.1520 * worst).all()
    torch.manual_seed(0)
    normal = torch.randn(512, 512)
    for double_quant, expected in ((False, 0.0920), (True, 0.0920)):
        error = (reference_dequantize(reference_quantize(normal, double_quant)) - normal).norm() / normal.norm()
        assert error == pytest.approx(expected, abs=1e-3)


def test_size() -> None:
    q = reference_quantize(torch.randn(256, 512))
    bits = 8 * sum(part.numel() * part.element_size() for part in q.tensors() if part is not q.nested_code)
    assert bits / (256 * 512) == pytest.approx(4.127, abs=1e-3)
    assert q.shape == (256, 512) == weights.shape(weights.tensors(q))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 256)])
def test_bits_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = some_weight(shape, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    q = nf4_quantize(weight, double_quant=double_quant)
    assert torch.equal(q.packed.view(-1, 1), packed)
    assert torch.equal(q.absmax, state.absmax)
    if double_quant:
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert torch.equal(q.nested_code, state.state2.code)
        assert torch.equal(q.nested_offset, state.offset)
    for out in DTYPES:
        state.dtype = out
        assert torch.equal(nf4_dequantize(q, out), bitsandbytes.functional.dequantize_4bit(packed, state))


# ---- the kernels: quantise and dequantise


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantises_to_the_same_bits(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = some_weight(shape, dtype)
    for double_quant, w in itertools.product(
        (False, True), (weight, weight.repeat(1, 2)[:, :: 2 if shape[1] > 2 else 1])
    ):
        if w.shape[1] % 2 == 0:
            assert same(
                nf4_quantize(w, double_quant=double_quant, backend=backend), reference_quantize(w, double_quant)
            )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantises_to_the_same_bits(
    backend: str, dtype: torch.dtype, double_quant: bool, shape: tuple[int, int]
) -> None:
    q = reference_quantize(some_weight(shape), double_quant)
    assert torch.equal(nf4_dequantize(q, dtype, backend=backend), reference_dequantize(q, dtype))
    parts = q.tensors()
    step = nf4.row_step(parts)
    assert step * shape[1] % 64 == 0
    for first in range(0, shape[0], step)[:2]:
        for last in {shape[0], min(first + step, shape[0])}:
            out = torch.empty((last - first, shape[1]), dtype=dtype)
            nf4.dequantize_rows(parts, first, last, out, backend)
            assert torch.equal(out, reference_dequantize(q, dtype)[first:last])


def test_dequantises_past_the_caches() -> None:
    q = nf4_quantize(torch.randn(2050, 4096))
    for dtype in DTYPES:
        dense = nf4_dequantize(q, dtype, backend="cpu")
        assert dense.numel() * dense.element_size() >= 16 << 20
        assert torch.equal(dense[2040:], reference_dequantize(q, dtype)[2040:])
        assert torch.equal(dense, torch.cat([nf4_dequantize_rows(q, dtype, i) for i in range(0, 2050, 205)]))


def nf4_dequantize_rows(q: NF4Weight, dtype: torch.dtype, first: int) -> Tensor:
    out = torch.empty((205, q.shape[1]), dtype=dtype)
    nf4.dequantize_rows(q.tensors(), first, first + 205, out, "cpu")
    return out


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(backend: str, value: float) -> None:
    for at in (0, 63, 129):  # first and last of a block; in a block that is not whole
        weight = torch.randn(1, 130)
        weight[0, at] = value
        with pytest.raises(ValueError, match=r"nf4_quantize: weight \[1, 130\] holds an infinity or NaN"):
            nf4_quantize(weight, backend=backend)


# ---- the kernels: linear


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("shape", [(48, 64), (9, 320), (17, 130)])
def test_close_to_float64(backend: str, dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    q = nf4_quantize(some_weight(shape, dtype), double_quant=rows % 2 == 0)
    assert_close(backend, torch.randn(rows, shape[1]).to(dtype), q, torch.randn(shape[0]) if rows != 3 else None)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    rows, columns = data.draw(st.integers(1, 40)), 2 * data.draw(st.sampled_from([1, 3, 32, 50, 64, 96, 160]))
    leading = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    step = data.draw(st.sampled_from([1, 2]))
    x = torch.randn(*leading, columns * step).to(dtype)[..., ::step]
    if len(leading) > 1 and data.draw(st.booleans()):
        x = x.transpose(0, 1)
    bias = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    q = nf4_quantize(torch.randn(rows, columns), double_quant=data.draw(st.booleans()))
    before = x.clone()
    assert_close(backend, x, q, None if bias is None else torch.randn(rows).to(bias))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
def test_x_may_start_anywhere(backend: str, dtype: torch.dtype) -> None:
    storage = torch.randn(1 + 3 * 64).to(dtype)
    assert_close(backend, storage[1:].view(3, 64), nf4_quantize(torch.randn(24, 64)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_values_of_x(dtype: torch.dtype) -> None:
    # One feature a thousand times larger than the others, and blocks of zeros, as language models have them.
    q = nf4_quantize(torch.randn(64, 256))
    x = torch.randn(4, 256)
    x[:, 5] *= 1000
    x[:, 64:128] = 0
    x[:, 128:192] *= 1e-3 if dtype == torch.float16 else 1e-30
    for rows in (x, x[:, 128:192].repeat(1, 4)):
        assert_close("cpu", rows.to(dtype), q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_x_shows(dtype: torch.dtype, value: float) -> None:
    q = nf4_quantize(torch.randn(64, 128) + 3)  # no weight is zero
    x = torch.randn(3, 128).to(dtype)
    x[1, 70] = value
    for rows in (x, x.repeat(5, 1)):
        output = nf4_linear(rows, q, backend="cpu")
        assert not output[1].isfinite().any()
        assert output[0].isfinite().all() and output[2].isfinite().all()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    q, threads = nf4_quantize(torch.randn(513, 1024)), torch.get_num_threads()
    x, results = torch.randn(rows, 1024), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                [nf4_dequantize(q, backend="cpu"), *([] if rows > 16 else [nf4_linear(x, q, backend="cpu")])]
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend: str) -> None:
    q = nf4_quantize(torch.randn(8, 64))
    output, grad_x, grad_bias = run_linear(nf4_linear, torch.randn(2, 0, 64), q, torch.randn(8), backend=backend)
    assert output.shape == (2, 0, 8) and grad_x.shape == (2, 0, 64)
    assert grad_bias.tolist() == [0.0] * 8


def test_gradcheck_of_the_reference() -> None:
    q = nf4_quantize(torch.randn(4, 6))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, q, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: nf4_linear(x, q, b), (x, bias))


def test_the_dense_weight_never_exists_whole() -> None:
    """Where it is not decoded as it is multiplied: test_quantized_product.py."""
    q = nf4_quantize(torch.randn(4096, 2048))
    x = torch.randn(64, 2048, requires_grad=True)
    sizes: list[int] = []
    dequantize = nf4._cpu_rows

    def watched(parts: list[Tensor], first: int, last: int, out: Tensor) -> None:
        sizes.append(out.numel())
        dequantize(parts, first, last, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nf4._ROWS, "cpu", watched)
        patch.setattr(extension, "has_avx512", lambda: False)
        nf4_linear(x, q, backend="cpu").sum().backward()
    assert max(sizes) <= products.BLOCK_ELEMENTS < 4096 * 2048
    assert sum(sizes) == 2 * 4096 * 2048


# ---- the op in PyTorch


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck(double_quant: bool) -> None:
    ops, weight = torch.ops.mmfast, torch.randn(6, 66)
    parts = nf4_quantize(weight, double_quant=double_quant).tensors()
    torch.library.opcheck(ops.nf4_quantize.default, (weight, "cpu"))
    torch.library.opcheck(ops.nf4_dequantize.default, (parts, torch.bfloat16, "cpu"))
    for rows in (2, 20):
        x = torch.randn(rows, 66)
        torch.library.opcheck(ops.quantized_linear_fwd.default, (x, parts, torch.randn(6), "cpu"))
        torch.library.opcheck(ops.quantized_linear_bwd.default, (torch.randn(rows, 6), parts, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    q, bias = nf4_quantize(torch.randn(16, 64)), torch.randn(16)
    compiled = torch.compile(nf4_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 12):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(
            run_linear(compiled, x, q, bias, backend="cpu"), run_linear(nf4_linear, x, q, bias, backend="cpu")
        )
    dense = torch.compile(nf4_dequantize, fullgraph=True, backend="aot_eager")(q)
    assert torch.equal(dense, nf4_dequantize(q))


def test_saves_nothing_but_the_weight() -> None:
    saved: list[Tensor] = []
    q = nf4_quantize(torch.randn(16, 64))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        nf4_linear(torch.randn(3, 64, requires_grad=True), q, torch.randn(16, requires_grad=True), backend="cpu")
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in q.tensors()]


def test_no_gradient_where_none_is_wanted() -> None:
    q, x = nf4_quantize(torch.randn(16, 64)), torch.randn(3, 64, requires_grad=True)
    assert not nf4_linear(x.detach(), q).requires_grad
    with torch.no_grad():
        assert not nf4_linear(x, q).requires_grad
    bias = torch.randn(16, requires_grad=True)
    nf4_linear(x.detach(), q, bias).sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((16,), 3.0))


def test_second_derivative_is_refused() -> None:
    q, x = nf4_quantize(torch.randn(16, 64)), torch.randn(3, 64, requires_grad=True)
    output = nf4_linear(x, q, backend="cpu")
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast(backend: str) -> None:
    q, x = nf4_quantize(torch.randn(16, 64)), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        output = nf4_linear(x, q, backend=backend)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output, F.linear(x, nf4_dequantize(q)).half(), rtol=4e-3, atol=4e-2)


# ---- the choice of a backend

H100 = Machine("cuda", (9, 0))


@pytest.mark.parametrize(
    ("dtype", "on", "request_", "chosen"),
    [
        (torch.bfloat16, Machine("cpu"), None, "cpu"),
        (torch.float64, Machine("cpu"), None, "reference"),
        (torch.bfloat16, Machine("cpu", no_extension="not built"), None, "reference"),
        (torch.bfloat16, Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (torch.bfloat16, H100, None, "triton"),
        (torch.bfloat16, Machine("cuda", (7, 5)), None, "reference"),
    ],
)
def test_selection(dtype: torch.dtype, on: Machine, request_: str | None, chosen: str) -> None:
    q = nf4_quantize(torch.randn(16, 64))
    assert nf4.LINEAR.select(nf4.check_linear(torch.zeros(2, 64, dtype=dtype), q), on, request_) == chosen
    assert nf4.DEQUANTIZE.select(nf4.check_dequantize(q, dtype), on, request_) == chosen
    if dtype != torch.float64:
        assert nf4.QUANTIZE.select(nf4.check_quantize(torch.zeros(2, 64, dtype=dtype)), on, request_) == chosen


def test_impossible_request() -> None:
    q = nf4_quantize(torch.randn(16, 64))
    with pytest.raises(BackendUnavailable, match=r"nf4_linear: backend 'cpu' cannot .*there is no float64 kernel"):
        nf4_linear(torch.zeros(2, 64, dtype=torch.float64), q, backend="cpu")
    with pytest.raises(BackendUnavailable, match=r"nf4_dequantize: backend 'cpu' cannot .*there is no float64 kernel"):
        nf4_dequantize(q, torch.float64, backend="cpu")
    with pytest.raises(BackendUnavailable, match="nf4_quantize: has no 'cuda' backend"):
        nf4_quantize(torch.zeros(2, 64), backend="cuda")


def test_explain() -> None:
    q = nf4_quantize(torch.randn(16, 64))
    assert explain(nf4_linear, torch.zeros(2, 64), q).splitlines() == [
        "nf4_linear runs on: cpu",
        "  triton: the Triton interpreter is for tests; ask for it by name",
        "  reference: cpu comes first",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for module, name in ((quantized_linear, "_FWD"), (nf4, "_DEQUANTIZE"), (nf4, "_QUANTIZE")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, op=op: ran.append(a[-1]) or op(*a))
    with use_backend(backend):
        q = nf4_quantize(torch.randn(16, 64))
    nf4_dequantize(q, backend=backend)
    nf4_linear(torch.randn(2, 64), q, backend=backend)
    assert ran == [backend] * 3


def test_rows_up_to_which_it_decodes_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    small = nf4._cpu_small_linear
    monkeypatch.setitem(nf4._SMALL_LINEAR, "cpu", lambda *a: decoded.append(len(a[0])) or small(*a))
    q = nf4_quantize(torch.randn(16, 64))
    for rows in (1, nf4.SMALL_ROWS["cpu"], nf4.SMALL_ROWS["cpu"] + 1):
        nf4_linear(torch.randn(rows, 64), q, backend="cpu")
    assert decoded == [1, nf4.SMALL_ROWS["cpu"]]
    few = nf4.SMALL_ROWS["cpu"]
    machines = (True, True, nf4.SMALL_ROWS_TILES), (True, False, nf4.SMALL_ROWS_NATIVE), (False, False, few)
    for native, tiles, most in machines:
        monkeypatch.setattr(nf4.products, "_has_products", lambda dtype, native=native: native)
        monkeypatch.setattr(extension, "has_amx", lambda tiles=tiles: tiles)
        x = torch.zeros(most + 1, 64, dtype=torch.bfloat16)
        assert nf4.takes_small(x[:most], q.tensors(), "cpu")
        assert not nf4.takes_small(x, q.tensors(), "cpu")
    assert not nf4.takes_small(torch.zeros(1, 66), nf4_quantize(torch.randn(2, 66)).tensors(), "triton")


Q = nf4_quantize(torch.ones(4, 64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: nf4_quantize(torch.zeros(64)),
            ValueError,
            r"nf4_quantize: weight has shape \[64\]; expected \[N, K\]",
        ),
        (lambda: nf4_quantize(torch.zeros(4, 3)), ValueError, r"nf4_quantize: weight has shape \[4, 3\].*K even"),
        (lambda: nf4_quantize(torch.zeros(0, 64)), ValueError, r"nf4_quantize: weight has shape \[0, 64\]"),
        (lambda: nf4_quantize(torch.zeros(2, 64).double()), TypeError, "nf4_quantize: weight is torch.float64"),
        (lambda: nf4_dequantize(Q, torch.int8), TypeError, "nf4_dequantize: dtype is torch.int8"),
        (lambda: nf4_dequantize(torch.zeros(2, 64)), TypeError, "nf4_dequantize: the weight is a Tensor"),
        (lambda: nf4_dequantize(Q._replace(packed=Q.absmax)), ValueError, r"packed is torch.uint8 \[4\]"),
        (lambda: nf4_dequantize(Q._replace(nested_code=None)), ValueError, "some are None; give all or none"),
        (
            lambda: nf4_dequantize(Q._replace(absmax=torch.zeros(4))),
            ValueError,
            r"absmax is torch.float32 \[4\]; expected torch.uint8 \[4\] for packed \[4, 32\] and nested parts",
        ),
        (
            lambda: nf4_dequantize(Q._replace(nested_absmax=torch.zeros(1, device="meta"))),
            ValueError,
            "nested_absmax is on meta but packed on cpu; move one",
        ),
        (
            lambda: nf4_dequantize(Q._replace(packed=Q.packed.t().contiguous().t())),
            ValueError,
            "parts of the weight must be contiguous",
        ),
        (
            lambda: nf4_linear(torch.zeros(2, 32), Q),
            ValueError,
            r"x has shape \[2, 32\] but the weight \[N, K\] = \[4, 64",
        ),
        (lambda: nf4_linear(torch.zeros(2, 64).int(), Q), TypeError, "nf4_linear: x is torch.int32; expected"),
        (
            lambda: nf4_linear(torch.zeros(2, 64), Q, torch.zeros(3)),
            ValueError,
            r"bias has shape \[3\]; expected \[N\] = \[4",
        ),
        (
            lambda: nf4_linear(torch.zeros(2, 64), Q, torch.zeros(4).int()),
            TypeError,
            "bias is torch.int32; expected a fl",
        ),
        (lambda: nf4_linear(torch.zeros(2, 64, device="meta"), Q), ValueError, "the weight is on cpu but x on meta"),
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
        module.nf4_dequantize_cpu(parts, 0, 4, view(torch.zeros(4, 32)), 1)
    with pytest.raises(ValueError, match=r"rows 0 to 5 of packed uint8\[4, 32\]"):
        module.nf4_dequantize_cpu(parts, 0, 5, view(torch.zeros(5, 64)), 1)
    with pytest.raises(ValueError, match="nf4: 3 tensors; expected 2, or 5"):
        module.nf4_dequantize_cpu(parts[:3], 0, 4, view(torch.zeros(4, 64)), 1)
    with pytest.raises(ValueError, match=r"x is float32\[1, 32\]; expected float32\[1, 64\]"):
        module.nf4_linear_cpu(view(torch.zeros(1, 32)), parts, None, view(torch.zeros(1, 4)), 1)
    with pytest.raises(ValueError, match=r"packed is uint8\[4, 16\]; expected uint8\[4, 32\]"):
        module.nf4_quantize_cpu(
            view(torch.zeros(4, 64)), view(torch.zeros(4, 16, dtype=torch.uint8)), view(torch.zeros(4)), 1
        )


def test_what_the_triton_kernels_assume() -> None:
    kernels = pytest.importorskip("mmfast.kernels.nf4")
    assert (kernels.BLOCK, kernels.NESTED_BLOCK, kernels.SMALLEST) == (nf4.BLOCK, nf4.NESTED_BLOCK, nf4.SMALLEST)
    assert nf4.SMALL_ROWS["triton"] <= kernels.X_ROWS
    for outputs, columns, processors in itertools.product((1, 64, 700), (64, 256, 4096, 11008), (2, 132)):
        plan = kernels.plan(outputs, columns, 256, processors)
        assert (plan.parts - 1) * plan.steps * 256 < columns <= plan.parts * plan.steps * 256
        assert plan.parts == 1 or plan.parts * outputs <= 8 * processors


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 448), (64, 130)])
def test_gpu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = some_weight(shape, dtype).cuda()
    q = nf4_quantize(weight)
    assert same(nf4_quantize(weight, backend="triton"), reference_quantize(weight))
    for out in DTYPES:
        assert torch.equal(nf4_dequantize(q, out, backend="triton"), reference_dequantize(q, out))
    for rows in (1, 3, 16, 64):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        assert_close("triton", x, q, torch.randn(shape[0], device="cuda"))
        first, second = (nf4_linear(x, q, backend="triton") for _ in range(2))
        assert torch.equal(first, second), "the same bits every time"


@pytest.mark.gpu
def test_gpu_graph() -> None:
    q, x = nf4_quantize(torch.randn(512, 256, device="cuda")), torch.randn(1, 256, device="cuda")
    expected = nf4_linear(x, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = nf4_linear(x, q)
    graph.replay()
    assert torch.equal(output, expected)
