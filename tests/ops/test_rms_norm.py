"""rms_norm: every backend against the reference in float64, and against transformers' LlamaRMSNorm."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DEVICES, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near, case, dtypes_of
from torch import Tensor

from mmfast.ops import BackendUnavailable, explain, extension, rms_norm, use_backend
from mmfast.ops.backends import Machine, machine
from mmfast.ops.rms_norm import OP, TRITON_WIDTH, check, reference

EPS = 1e-5


def some(
    *shape: int, dtype: torch.dtype = torch.float32, weight: torch.dtype | None = None, device: str = "cpu"
) -> list[Tensor]:
    """x, weight and residual."""
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return [x, (torch.rand(shape[-1], device=device) + 0.5).to(weight or dtype), residual]


def run(
    function: Any,
    arguments: list[Tensor],
    needs: str = "xwr",
    outputs: str = "ys",
    with_residual: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    """The outputs, and the gradients that are needed, for fixed gradients of the outputs that are named."""
    named = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in zip("xwr", arguments, strict=True)}
    found = function(named["x"], named["w"], EPS, named["r"] if with_residual else None, **options)
    results = dict(zip("ys", found if with_residual else (found,), strict=False))
    generator = torch.Generator().manual_seed(1)
    # Exact in every dtype, so that float64 sees the same gradients.
    grads = {name: torch.randn(out.shape, generator=generator).bfloat16() for name, out in results.items()}
    kept = [name for name in results if name in outputs and results[name].requires_grad]
    if kept:
        torch.autograd.backward([results[name] for name in kept], [grads[name].to(results[name]) for name in kept])
    values = {name: out.detach() for name, out in results.items()}
    for name, tensor in named.items():
        if tensor.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            values[f"grad {name}"] = tensor.grad
    return values


def assert_close(backend: str, arguments: list[Tensor], **options: Any) -> None:
    dtype = max((arguments[0].dtype, arguments[1].dtype), key=lambda dtype: -torch.finfo(dtype).bits)
    exact = run(reference, [tensor.double() for tensor in arguments], **options)
    eager = run(reference, arguments, **options)
    ours = run(rms_norm, arguments, **options, backend=backend)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        assert ours[name].dtype == eager[name].dtype
        assert_as_near(ours[name], eager[name], wanted, dtype)


# ---- the equation


def test_reference_by_hand() -> None:
    x, weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    root = 12.5**0.5
    torch.testing.assert_close(reference(x, weight, 0.0), torch.tensor([[3 / root, 8 / root]], dtype=torch.float64))
    y, total = reference(x - 1, weight, 0.0, torch.ones_like(x))
    assert torch.equal(total, x)
    torch.testing.assert_close(y, reference(x, weight, 0.0))


def test_gradcheck_of_the_reference() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in some(3, 5)]
    assert torch.autograd.gradcheck(lambda x, w, r: reference(x, w, EPS, r), tensors)
    assert torch.autograd.gradgradcheck(lambda x, w, r: reference(x, w, EPS, r), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_agrees_with_llama(backend: str, dtype: torch.dtype, weight: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, w, residual = some(40, 1000, dtype=dtype, weight=weight)
    norm = llama.LlamaRMSNorm(1000, EPS)
    norm.weight.data = w
    expected = norm(x + residual).detach()
    y, total = rms_norm(x, w, EPS, residual, backend=backend)
    assert torch.equal(total, x + residual)
    assert y.dtype == expected.dtype
    if backend == "reference":
        assert torch.equal(y, expected)
        return
    # The order of the sum of squares moves rstd by a few fp32 units: some elements round the other way.
    spacing = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 4)
    torch.testing.assert_close(y, expected, rtol=2 * spacing, atol=0)
    if dtype != torch.float32:
        assert (y != expected).float().mean() < 0.01


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", [(1, 9), (1, 4096), (3, 5, 33), (70, 48), (5, 130)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], with_residual: bool) -> None:
    assert_close(backend, some(*shape, dtype=dtype), with_residual=with_residual)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.skipif(bool(machine(torch.device("cpu")).lacks("cpu")), reason="the extension is not built")
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 256, 512])
def test_vectors_of_every_size(
    bits: int, dtype: torch.dtype, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = extension.module()
    limited = SimpleNamespace(
        rms_norm_fwd_cpu=partial(built.rms_norm_fwd_cpu, vector_bits=bits),
        rms_norm_bwd_cpu=partial(built.rms_norm_bwd_cpu, vector_bits=bits),
    )
    monkeypatch.setattr(extension, "module", lambda: limited)
    for needs in ("xwr", "xr", "w"):
        assert_close("cpu", some(6, 77, dtype=dtype, weight=weight), needs=needs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "weight"), list(itertools.permutations(DTYPES, 2)))
def test_a_weight_of_another_dtype(backend: str, dtype: torch.dtype, weight: torch.dtype) -> None:
    if backend == "triton" and torch.bfloat16 in (dtype, weight):
        pytest.skip("the interpreter truncates to bfloat16")
    assert_close(backend, some(37, 50, dtype=dtype, weight=weight))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outputs", ["y", "s", "ys"])
def test_only_the_gradients_that_are_asked_for(backend: str, outputs: str) -> None:
    arguments = some(70, 33)
    everything = run(rms_norm, arguments, outputs=outputs, backend=backend)
    exact = run(reference, [tensor.double() for tensor in arguments], outputs=outputs)
    for count in range(4):
        for needs in map("".join, itertools.combinations("xwr", count)):
            found = run(rms_norm, arguments, needs, outputs, backend=backend)
            wanted = {f"grad {name}" for name in needs if f"grad {name}" in exact}
            assert {name for name in found if "grad" in name} == wanted
            for name, value in found.items():
                torch.testing.assert_close(value, everything[name])
                torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_x_and_residual_do_not_share_memory_once_accumulated(backend: str) -> None:
    x, weight, residual = some(4, 16)
    x.requires_grad_(), residual.requires_grad_()
    for _ in range(2):
        sum(part.sum() for part in rms_norm(x, weight, EPS, residual, backend=backend)).backward()
    kept = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, kept)


def test_a_frozen_weight_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module, asked = sys.modules[OP.check.__module__], []
    bwd = module._BWD
    monkeypatch.setattr(module, "_BWD", lambda *arguments: asked.append(arguments[-3:-1]) or bwd(*arguments))
    for needs in ("xr", "w", "xwr"):
        run(rms_norm, some(4, 16), needs, backend="cpu")
    run(rms_norm, some(4, 16), "xr", outputs="s", backend="cpu")
    assert asked == [(True, False), (False, True), (True, True)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_size_may_be_zero(backend: str) -> None:
    for shape in ((0, 8), (3, 0, 8), (4, 0), (0, 0)):
        for with_residual in (False, True):
            ours = run(rms_norm, some(*shape), with_residual=with_residual, backend=backend)
            torch.testing.assert_close(ours, run(reference, some(*shape), with_residual=with_residual))


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    # Of a row of very few elements hardly any gradient is left: see the next test.
    shape = [*data.draw(st.lists(st.integers(1, 30), max_size=2)), data.draw(st.integers(8, 40))]
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))

    def strided() -> Tensor:
        order, steps = data.draw(st.permutations(range(len(shape)))), data.draw(st.sampled_from([1, 2]))
        storage = torch.randn([shape[i] * steps for i in order]).to(dtype)
        view = storage.permute([order.index(i) for i in range(len(shape))])
        return view[tuple(slice(None, None, steps) for _ in shape)]

    weight = data.draw(st.sampled_from([(torch.rand(shape[-1]) + 0.5).to(dtype), torch.ones((), dtype=dtype)]))
    arguments = [strided(), weight.expand(shape[-1]), strided()]
    before = [tensor.clone() for tensor in arguments]
    assert_close(backend, arguments, with_residual=data.draw(st.booleans()))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_element_a_row(backend: str) -> None:
    # The gradient of x / |x| is 0 but for eps: what is found is the rounding of two terms that cancel.
    x, weight, residual = some(50, 1)
    exact = run(reference, [tensor.double() for tensor in (x, weight, residual)], outputs="y")
    ours = run(rms_norm, [x, weight, residual], outputs="y", backend=backend)
    for name in ("y", "grad w"):
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    terms = exact["y"].abs() / (x + residual).abs()
    assert ((ours["grad x"] - exact["grad x"]).abs() <= 8 * torch.finfo(torch.float32).eps * terms * 4).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_infinity_and_nan_stay_in_their_rows(backend: str) -> None:
    x, weight, residual = some(4, 40, dtype=torch.float16)
    clean, _ = rms_norm(x, weight, EPS, residual, backend=backend)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    dirty, total = rms_norm(x, weight, EPS, residual, backend=backend)
    assert dirty[1].isnan().all()
    assert dirty[2, 5].isnan()
    assert total[2, 5].isinf()
    assert torch.equal(dirty[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    arguments, threads, results = some(100, 1500, dtype=dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(rms_norm, arguments, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[name], value) for other in results[1:] for name, value in results[0].items())


# ---- the op in PyTorch


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(with_residual: bool) -> None:
    x, weight, residual = some(4, 16)
    residual = residual if with_residual else None
    ops, rstd = torch.ops.mmfast, torch.rand(4)
    for keep in (False, True):
        torch.library.opcheck(ops.rms_norm_fwd.default, (x, weight, residual, EPS, keep, "cpu"))
    for needs in ((True, False), (False, True), (True, True)):
        torch.library.opcheck(ops.rms_norm_bwd.default, (x, residual, x, weight, rstd, *needs, "cpu"))
    half = weight.half()
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, half, residual, EPS, True, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_compiles_as_one_graph(dynamic: bool, with_residual: bool) -> None:
    compiled = torch.compile(rms_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        arguments = some(rows, 16)
        ours = run(compiled, arguments, with_residual=with_residual, backend="cpu")
        torch.testing.assert_close(ours, run(rms_norm, arguments, with_residual=with_residual, backend="cpu"))


def test_saves_what_was_normalised_and_one_number_a_row() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        x, weight, residual = (tensor.requires_grad_() for tensor in some(8, 64))
        _, total = rms_norm(x, weight, EPS, residual, backend="cpu")
        rms_norm(x, weight, EPS, backend="cpu")
    memory = {tensor.data_ptr() for tensor in (x, weight, total)}
    assert {tensor.data_ptr() for tensor in saved} >= memory
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in memory] == [(8,), (8,)]


def test_no_gradient_where_none_is_wanted() -> None:
    x, weight, residual = (tensor.requires_grad_() for tensor in some(2, 8))
    with torch.no_grad():
        assert not any(part.requires_grad for part in rms_norm(x, weight, EPS, residual, backend="cpu"))
    assert not rms_norm(x.detach(), weight.detach(), backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    x, weight, _ = some(2, 8)
    y = rms_norm(x.requires_grad_(), weight, backend="cpu")
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_keeps_the_dtypes(backend: str) -> None:
    arguments = some(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(rms_norm, arguments, backend=backend)
    assert inside["y"].dtype == torch.float32
    torch.testing.assert_close(inside, run(rms_norm, arguments, backend=backend))


# ---- the choice of a backend


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("x", "residual", "on", "request_", "chosen"),
    [
        (meta(1, 128), True, Machine("cpu"), None, "cpu"),
        (meta(1, 128, dtype=torch.float64), True, Machine("cpu"), None, "reference"),
        (meta(1, 128), True, Machine("cpu", no_extension="not built"), None, "reference"),
        (meta(1, 128), True, Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (meta(16, 4096, dtype=torch.float16), True, Machine("cpu"), None, "cpu"),
        (meta(4, 4096), True, Machine("cuda", (9, 0)), None, "triton"),
        (meta(4, TRITON_WIDTH + 16), True, Machine("cuda", (9, 0)), None, "reference"),
        (meta(4, 4096), True, Machine("cuda", (7, 5)), None, "reference"),
        (meta(4, 4096), True, Machine("mps"), None, "reference"),
    ],
)
def test_selection(x: Tensor, residual: bool, on: Machine, request_: str | None, chosen: str) -> None:
    weight = meta(x.shape[-1], dtype=x.dtype)
    assert OP.select(check(x, weight, EPS, x if residual else None), on, request_) == chosen


@pytest.mark.parametrize(
    ("x", "on", "request_", "reason"),
    [
        (meta(2, 16, dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (meta(2, 8208), Machine("cuda", (9, 0)), "triton", "H is 8208; the kernel takes at most 4096, or 8192"),
        (meta(2, 4097), Machine("cuda", (9, 0)), "triton", "H is 4097; the kernel takes at most 4096, or 8192"),
        (meta(2, 16), Machine("cuda", (9, 0)), "cuda", "it has cpu, triton, reference"),
    ],
)
def test_impossible_request(x: Tensor, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"rms_norm: .*'{request_}' .*{reason}"):
        OP.select(check(x, meta(x.shape[-1])), on, request_)


def test_explain() -> None:
    assert "triton: the Triton interpreter is for tests" in explain(rms_norm, *some(2, 16)[:2])


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = module._FWD, module.reference
    monkeypatch.setattr(module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    x, weight, _ = some(2, 16)
    rms_norm(x, weight, backend=backend)
    with use_backend(backend):
        rms_norm(x, weight)
    assert ran == [backend, backend]


X, W = torch.zeros(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.ones(7)), ValueError, r"x is \[2, 8\] and weight is \[7\]; expected \[..., H\] and \[H\]"),
        ((torch.tensor(1.0), W), ValueError, r"x is \[\] and weight is \[8\]"),
        ((X.int(), W), TypeError, "x is torch.int32; expected one of torch.float32"),
        ((X, W.int()), TypeError, "weight is torch.int32; expected one of torch.float32"),
        ((X, meta(8)), ValueError, "weight is on meta but x on cpu"),
        ((X, W, -1.0), ValueError, "eps is -1.0; expected at least 0"),
        ((X, W, EPS, X[:1]), ValueError, r"residual is \[1, 8\] but x \[2, 8\]; expected one shape"),
        ((X, W, EPS, X.half()), TypeError, "residual is torch.float16 but x torch.float32; expected one dtype"),
        ((X, W, EPS, meta(2, 8, dtype=torch.float32)), ValueError, "residual is on meta but x on cpu"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"rms_norm: {message}"):
        rms_norm(*arguments)


def test_cpp_checks_what_it_is_given() -> None:
    from mmfast.ops import extension

    x, weight, y, short = map(extension.view, (X, W, torch.empty(2, 8), torch.empty(1, 8)))
    run_fwd = extension.module().rms_norm_fwd_cpu
    with pytest.raises(ValueError, match=r"rms_norm: y is float32\[1, 8\]; expected float32\[2, 8\]"):
        run_fwd(x, weight, None, EPS, short, None, None, 1)
    with pytest.raises(ValueError, match="residual and sum come together"):
        run_fwd(x, weight, x, EPS, y, None, None, 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.rms_norm")
    listed = {
        (c["constexprs"]["BLOCK_N"], c["num_warps"]) for c in kernels.compile_cases() if "add parts" not in c["name"]
    }
    for width in (50, 2048, 3072, 4096, 5120, 8192):
        shape = kernels.launch(width)
        assert (shape["BLOCK_N"], shape["num_warps"]) in listed
        chunks = -(-1000 // kernels.chunk(1000, width, 132))
        assert 1 <= chunks <= 132 * 32


# ---- on a GPU


@pytest.mark.parametrize(("backend", "shape"), [case("triton", (33, 4096)), case("triton", (200, 130))])
def test_triton_where_it_is_at_home(backend: str, shape: tuple[int, ...]) -> None:
    for dtype in dtypes_of(backend):
        arguments = some(*shape, dtype=dtype, device=DEVICES[backend])
        first, second = (run(rms_norm, arguments, backend=backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), "the same bits every time"
        assert_close(backend, arguments)
