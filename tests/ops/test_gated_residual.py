"""gated_residual: every backend against the reference in float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, CPU, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near
from torch import Tensor

from mmfast.ops import BackendUnavailable, explain, extension, gated_residual
from mmfast.ops.backends import Machine, machine
from mmfast.ops.gated_residual import LEAST, OP, check, reference

Operands = tuple[Tensor, Tensor, Tensor]


def some(
    *shape: int, gate: tuple[int, ...] = (1,), dtype: torch.dtype = torch.float32, gate_dtype: Any = None
) -> Operands:
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    return x, y, torch.randn(gate).to(gate_dtype or dtype)


def run(function: Any, operands: Operands, needs: str, grad: Tensor, **options: Any) -> list[Tensor]:
    """The output, and the gradients that are needed, for a gradient of the output."""
    leaves = [x.detach().requires_grad_(name in needs) for name, x in zip("xyg", operands, strict=True)]
    output = function(*leaves, **options)
    assert output.dtype == operands[0].dtype
    if needs:
        output.backward(grad.to(output))
    for name, leaf in zip("xyg", leaves, strict=True):
        assert (leaf.grad is not None) == (name in needs)
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(backend: str | None, operands: Operands, needs: str = "xyg", grad: Tensor | None = None) -> None:
    if grad is None:
        grad = torch.randn(operands[0].shape).to(operands[0])  # the same numbers for all
    x, y, gate = operands
    exact = run(reference, (x.double(), y.double(), gate.double()), needs, grad)
    eager = run(reference, operands, needs, grad)
    ours = run(gated_residual, operands, needs, grad, backend=backend)
    for found, baseline, wanted in zip(ours, eager, exact, strict=True):
        assert_as_near(found, baseline, wanted, found.dtype)


# ---- the equation


def test_reference_by_hand() -> None:
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -10.0]])
    torch.testing.assert_close(reference(x, y, torch.tensor(0.5493061443)), torch.tensor([[6.0, -3.0]]))  # tanh: 0.5
    torch.testing.assert_close(reference(x, y, torch.tensor([0.5493061443, 0.0])), torch.tensor([[6.0, 2.0]]))


@pytest.mark.parametrize("gate", [(), (1,), (4,)])
def test_gradcheck_of_the_reference(gate: tuple[int, ...]) -> None:
    trained = [x.double().requires_grad_() for x in some(3, 4, gate=gate)]
    assert torch.autograd.gradcheck(reference, trained)
    assert torch.autograd.gradgradcheck(reference, trained)


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", [(7,), (1, 2048), (3, 5, 33), (300, 3), (2, 1)])
@pytest.mark.parametrize("per", ["scalar", "one", "channel"])
@pytest.mark.parametrize("needs", ["xyg", "yg", "y", "g", "x", ""])
def test_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], per: str, needs: str) -> None:
    gate = {"scalar": (), "one": (1,), "channel": shape[-1:]}[per]
    assert_close(backend, some(*shape, gate=gate, dtype=dtype, gate_dtype=torch.float32), needs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gate_of_any_dtype(backend: str, gate_dtype: torch.dtype) -> None:
    for gate in ((), (40,)):
        operands = some(6, 40, gate=gate, gate_dtype=gate_dtype)
        grad = torch.randn(6, 40)
        ours, eager = (
            run(f, operands, "xyg", grad, **o) for f, o in ((gated_residual, {"backend": backend}), (reference, {}))
        )
        assert ours[3].dtype == gate_dtype
        torch.testing.assert_close(ours[:3], eager[:3])
        # Both are sums in fp32, whatever the gate's dtype; 16-bit ones are rounded once more.
        unit = max(torch.finfo(gate_dtype).eps, 1e-5)
        torch.testing.assert_close(ours[3], eager[3], rtol=unit, atol=unit)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0), (2, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    _, grad_x, grad_y, grad_gate = run(gated_residual, some(*shape), "xyg", torch.zeros(shape), backend=backend)
    assert grad_x.shape == grad_y.shape == shape
    assert grad_gate.tolist() == [0.0]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_closed_gate_returns_x_and_learns(backend: str | None, dtype: torch.dtype) -> None:
    x, y, _ = some(5, 40, dtype=dtype)
    out, grad_gate = run(gated_residual, (x, y, torch.zeros(1)), "g", torch.ones(5, 40), backend=backend)
    assert torch.equal(out, x)
    torch.testing.assert_close(grad_gate, y.float().sum()[None])
    y[2, 3] = float("nan")
    out = gated_residual(x, y, torch.zeros(1), backend=backend)
    assert out.isnan().nonzero().tolist() == [[2, 3]], "0 · NaN is NaN, as in eager"


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 70)))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    operands = []
    for _ in range(2):
        order = data.draw(st.permutations(range(3)))
        # Positive: in a tensor of one number a difference may leave nothing but the rounding of tanh.
        storage = torch.rand([shape[i] for i in order]).to(dtype)
        x = storage.permute([order.index(i) for i in range(3)])
        operands.append(x.narrow(0, 0, 1).expand(shape) if data.draw(st.booleans()) else x)
    gate = torch.rand(2 * shape[2])[::2] if data.draw(st.booleans()) else torch.rand(())
    before = [x.clone() for x in operands]
    assert_close(backend, (*operands, gate), grad=torch.rand(shape).to(dtype))
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


@pytest.mark.skipif(bool(machine(CPU).lacks("cpu")), reason="the extension is not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_every_size(dtype: torch.dtype) -> None:
    x, y, gate = some(3, 37, gate=(37,), dtype=dtype, gate_dtype=torch.float32)
    module, view, factor = extension.module(), extension.view, torch.tanh(gate)
    for bits in (0, 256, 512):
        found = torch.full_like(x, torch.nan)
        module.gated_residual_fwd_cpu(view(x), view(y), view(factor), view(found), 1, bits)
        exact = reference(x.double(), y.double(), gate.double())
        assert_as_near(found, reference(x, y, gate), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [(), (501,)])
def test_threads_do_not_change_a_bit(dtype: torch.dtype, gate: tuple[int, ...]) -> None:
    operands, grad = some(600, 501, gate=gate, dtype=dtype), torch.randn(600, 501)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(gated_residual, operands, "xyg", grad, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- the op in PyTorch


def test_opcheck() -> None:
    ops, (x, y, gate) = torch.ops.mmfast, some(3, 40)
    torch.library.opcheck(ops.gated_residual_fwd.default, (x, y, gate, "cpu"))
    for with_y, need_y in ((y, True), (y, False), (None, True)):
        torch.library.opcheck(ops.gated_residual_bwd.default, (x, with_y, gate, need_y, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["cpu", None])
def test_compiles_as_one_graph(dynamic: bool, backend: str | None) -> None:
    compiled = torch.compile(gated_residual, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        operands, grad = some(rows, 40), torch.randn(rows, 40)
        expected = run(gated_residual, operands, "xyg", grad, backend=backend)
        torch.testing.assert_close(run(compiled, operands, "xyg", grad, backend=backend), expected)


@pytest.mark.parametrize(("needs", "kept"), [("xyg", "yg"), ("g", "yg"), ("xy", "g"), ("x", "")])
def test_saves_what_its_gradients_need(needs: str, kept: str) -> None:
    leaves = {name: x.requires_grad_(name in needs) for name, x in zip("xyg", some(3, 40), strict=True)}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        gated_residual(*leaves.values(), backend="cpu")
    assert [x.data_ptr() for x in saved] == [leaves[name].data_ptr() for name in kept]


def test_the_gradient_of_x_is_not_copied() -> None:
    x, y, gate = some(3, 40)
    output, grad = gated_residual(x.requires_grad_(), y, gate, backend="cpu"), torch.randn(3, 40)
    assert torch.autograd.grad(output, x, grad)[0].data_ptr() == grad.data_ptr()


def test_second_derivative_is_refused() -> None:
    x, y, gate = some(3, 40)
    output = gated_residual(x, y.requires_grad_(), gate, backend="cpu")
    (gradient,) = torch.autograd.grad(output, y, torch.ones_like(output).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference", None])
def test_autocast_keeps_the_dtype(backend: str | None) -> None:
    operands = some(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = gated_residual(*operands, backend=backend)
    torch.testing.assert_close(output, reference(*operands))


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))
FLOAT32 = LEAST["float32"]


def sized(count: int, dtype: torch.dtype = torch.float32) -> Operands:
    """Operands that take no memory."""
    x = torch.zeros((), dtype=dtype).expand(1, count)
    return x, x, torch.zeros(1)


@pytest.mark.parametrize(
    ("operands", "on", "request_", "chosen"),
    [
        (sized(FLOAT32), Machine("cpu"), None, "cpu"),
        (sized(FLOAT32 - 1), Machine("cpu"), None, "reference"),
        (sized(LEAST["bfloat16"], torch.bfloat16), Machine("cpu"), None, "cpu"),
        (sized(8), Machine("cpu"), "cpu", "cpu"),
        (sized(FLOAT32, torch.float64), Machine("cpu"), None, "reference"),
        (sized(FLOAT32), Machine("cpu", no_extension="not built"), None, "reference"),
        (sized(8), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (sized(8), H200, None, "triton"),
        (sized(8, torch.float64), H200, None, "reference"),
        (sized(8), Machine("cuda", (7, 5)), None, "reference"),
    ],
)
def test_selection(operands: Operands, on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(*operands), on, request_) == chosen


def test_impossible_request() -> None:
    with pytest.raises(BackendUnavailable, match=r"gated_residual: backend 'cpu' cannot .*there is no float64 kernel"):
        OP.select(check(*sized(8, torch.float64)), Machine("cpu"), "cpu")


def test_explain() -> None:
    assert explain(gated_residual, *some(2, 8)).splitlines() == [
        "gated_residual runs on: reference",
        f"  cpu: x has 16 elements; below {LEAST['packed forward']} the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gates", [(), (1,), (333,)])
@pytest.mark.parametrize("needs", ["xyg", "y", "g", ""])
def test_packed_calls_run_the_kernel_at_once(
    dtype: torch.dtype, gates: tuple[int, ...], needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = some(3, 7, 333, gate=gates, dtype=dtype, gate_dtype=torch.float16)
    grad = torch.randn(3, 7, 333).to(dtype)
    expected = run(gated_residual, operands, needs, grad, backend="cpu")
    leaves = [x.clone().requires_grad_(name in needs) for name, x in zip("xyg", operands, strict=True)]
    assert explain(gated_residual, *leaves).startswith("gated_residual runs on: cpu\n")
    module = sys.modules[OP.check.__module__]
    for name in ("check", "_FWD", "_BWD"):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("the general path"))
    assert_close(None, operands, needs, grad)
    found = run(gated_residual, operands, needs, grad)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        output = gated_residual(operands[0], operands[1].requires_grad_(), operands[2])
    assert torch.equal(output, found[0]) and not output.requires_grad


@pytest.mark.parametrize("gates", [(), (128,)])
def test_packed_calls_whose_gradients_are_not(gates: tuple[int, ...]) -> None:
    operands, grad = some(64, 128, gate=gates), torch.randn(128, 64).t()
    found, expected = (run(gated_residual, operands, "xyg", grad, **o) for o in ({}, {"backend": "cpu"}))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


X, G = torch.zeros(2, 3), torch.zeros(1)


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ((X, torch.zeros(1, 3), G), ValueError, r"x is \[2, 3\] and y is \[1, 3\]; expected one shape \[..., H\]"),
        ((torch.zeros(()), torch.zeros(()), G), ValueError, r"x is \[\] and y is \[\]"),
        ((X.long(), X.long(), G), TypeError, "x is torch.int64; expected one of torch.float32"),
        ((X.half(), X, G), TypeError, "x is torch.float16 and y is torch.float32; expected one dtype"),
        ((X, X, torch.zeros(2)), ValueError, r"gate is \[2\] but x \[2, 3\]; expected \[\], \[1\] or \[H\] = \[3\]"),
        ((X, X, torch.zeros(2, 1)), ValueError, r"gate is \[2, 1\]"),
        ((X, X, G.long()), TypeError, "gate is torch.int64; expected a floating dtype"),
        ((X, X.to("meta"), G), ValueError, "y is on meta but x on cpu; move one"),
        ((X, X, G.to("meta")), ValueError, "gate is on meta but x on cpu; move one"),
    ],
)
def test_errors(operands: Operands, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gated_residual: {message}"):
        gated_residual(*operands)


def test_cpp_checks_what_it_is_given() -> None:
    forward, view = extension.module().gated_residual_fwd_cpu, extension.view
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"y is float32\[3, 5\]; expected \[3, 4\] with stride 1"):
        forward(view(x), view(torch.zeros(3, 5)), view(x[0]), view(x), 1)
    with pytest.raises(ValueError, match=r"factor is float32\[3\]; expected float32\[4\]"):
        forward(view(x), view(x), view(x[:, 0].contiguous()), view(x), 1)
    with pytest.raises(ValueError, match="x is float32, y float16 and out float32; expected one dtype"):
        forward(view(x), view(x.half()), view(x[0]), view(x), 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.gated_residual")
    assert {case["num_warps"] for case in kernels.compile_cases()} == {kernels.TILE["num_warps"]}
    assert all(case["constexprs"].items() <= kernels.TILE.items() for case in kernels.compile_cases())
