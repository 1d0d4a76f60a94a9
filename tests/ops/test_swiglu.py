"""swiglu: every backend against the reference in float64."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, CPU, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.ops import BackendUnavailable, explain, extension, swiglu, use_backend
from mmfast.ops.backends import Machine, machine
from mmfast.ops.swiglu import LEAST, OP, check, reference


def run(
    function: Any, gate: Tensor, up: Tensor, needs: str = "gu", grad: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """The output, and the gradients that are needed, for a fixed gradient of the output."""
    gate, up = gate.detach().requires_grad_("g" in needs), up.detach().requires_grad_("u" in needs)
    output = function(gate, up, **options)
    assert output.dtype == gate.dtype
    if not needs:
        return [output]
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output))
    assert (gate.grad is not None, up.grad is not None) == ("g" in needs, "u" in needs)
    return [output.detach(), *(x.grad for x in (gate, up) if x.grad is not None)]


def assert_close(backend: str, gate: Tensor, up: Tensor, needs: str = "gu") -> None:
    grad = torch.randn(gate.shape).to(gate)  # the same numbers for all
    exact = run(reference, gate.double(), up.double(), needs, grad)
    eager = run(reference, gate, up, needs, grad)
    ours = run(swiglu, gate, up, needs, grad, backend=backend)
    for found, baseline, wanted in zip(ours, eager, exact, strict=True):
        assert_as_near(found, baseline, wanted, gate.dtype)


def some(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    gate, up = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return gate * 3, up


# ---- the equation


def test_reference_by_hand() -> None:
    gate, up = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), torch.tensor([5.0, 2.0, 4.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 2 / (1 + 2.718281828459045**-1), -4 / (1 + 2.718281828459045)], dtype=torch.float64)
    torch.testing.assert_close(reference(gate, up), expected)


def test_gradcheck_of_the_reference() -> None:
    trained = [x.double().requires_grad_() for x in some(3, 4)]
    assert torch.autograd.gradcheck(reference, trained)
    assert torch.autograd.gradgradcheck(reference, trained)


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 2048), (3, 5, 33), (9, 300), (2, 1), (300, 3)])
@pytest.mark.parametrize("needs", ["gu", "g", "u", ""])
def test_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], needs: str) -> None:
    assert_close(backend, *some(*shape, dtype=dtype), needs)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (2, 0), (2, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    assert [x.shape for x in run(swiglu, *some(*shape), backend=backend)] == [shape] * 3


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
        steps = data.draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 3))
        storage = torch.randn([shape[i] * steps[i] for i in order]).to(dtype)
        x = storage.permute([order.index(i) for i in range(3)])[:: steps[0], :: steps[1], :: steps[2]]
        operands.append(x.narrow(0, 0, 1).expand(shape) if data.draw(st.booleans()) else x)
    before = [x.clone() for x in operands]
    assert_close(backend, *operands)
    assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_one_projection_are_read_in_place(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = torch.randn(2, 5, 2 * 48).chunk(2, -1)
    monkeypatch.setattr(Tensor, "contiguous", lambda *a, **k: pytest.fail("copied"))
    ours = swiglu(gate, up, backend=backend)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, reference(gate, up))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_stride(backend: str) -> None:
    gate, up = some(6, 40)
    for grad in (torch.ones((), dtype=torch.float64).expand(6, 40), torch.randn(40, 6, dtype=torch.float64).t()):
        ours = run(swiglu, gate, up, grad=grad, backend=backend)
        torch.testing.assert_close(ours, run(reference, gate, up, grad=grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    gate, up = some(37, 4001, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(swiglu, gate, up, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 86.9, -86.9, -88.0, 200.0, -200.0, 6e4, -6e4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [0, 19])  # in the last, incomplete vector, and in a whole one
def test_any_gate_on_the_cpu(dtype: torch.dtype, padding: int) -> None:
    gate = torch.tensor([*SPECIAL, float("inf"), float("-inf"), float("nan"), *[1.0] * padding]).to(dtype)
    up = torch.full_like(gate, 0.5)
    ours, eager = run(swiglu, gate, up, backend="cpu"), run(reference, gate, up)
    for found, wanted in zip(ours, eager, strict=True):
        # Below -87 the kernel's sigmoid is 0, PyTorch's a number that is subnormal or nearly.
        torch.testing.assert_close(found, wanted, equal_nan=True, atol=1e-35, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.skipif(bool(machine(CPU).lacks("cpu")), reason="the extension is not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_every_size(dtype: torch.dtype) -> None:
    gate, up = some(3, 37, dtype=dtype)
    grad = torch.randn(3, 37).to(dtype)
    exact = run(reference, gate.double(), up.double(), "gu", grad)
    eager = run(reference, gate, up, "gu", grad)
    module, view = extension.module(), extension.view
    for bits in (0, 256, 512):
        found = [torch.full_like(gate, torch.nan) for _ in exact]
        module.swiglu_fwd_cpu(view(gate), view(up), view(found[0]), 1, bits)
        module.swiglu_bwd_cpu(view(grad), view(gate), view(up), view(found[1]), view(found[2]), 1, bits)
        for actual, baseline, wanted in zip(found, eager, exact, strict=True):
            assert_as_near(actual, baseline, wanted, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_where_it_is(backend: str) -> None:
    for index in range(3):
        gate, up = some(4, 40)
        grad = torch.randn(4, 40, dtype=torch.float64)
        (gate, up, grad)[index][2, 3] = float("nan")
        for name, found in zip(
            ("output", "gate", "up"), run(swiglu, gate, up, grad=grad, backend=backend), strict=True
        ):
            touched = (name, index) not in {("output", 2), ("up", 1)}
            assert found.isnan().nonzero().tolist() == ([[2, 3]] if touched else [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_llama(dtype: torch.dtype) -> None:
    """PyTorch's exponential and ours differ in the last bit: so may silu, and after it the product."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=4096)).to(dtype)
    x = torch.randn(16, 32).to(dtype)
    with torch.no_grad():
        gate, up = mlp.gate_proj(x * 8), mlp.up_proj(x * 8)
        eager, ours = mlp.act_fn(gate) * up, swiglu(gate, up, backend="cpu")
        assert torch.equal(mlp.down_proj(eager), mlp(x * 8))
    # In fp32 each silu is within two units of the last place; 16-bit ones differ by one, where both round near a tie.
    different, units = eager != ours, 4 if dtype == torch.float32 else 2
    step = torch.finfo(dtype).eps * eager.float().abs() + torch.finfo(dtype).smallest_normal
    assert ((eager.float() - ours.float()).abs() <= units * step).all()
    assert different.float().mean() <= (0.5 if dtype == torch.float32 else 1e-3)
    exact = reference(gate.double(), up.double())
    assert (ours - exact).norm() <= 1.05 * (eager - exact).norm()


# ---- the op in PyTorch


@pytest.mark.parametrize("needs", ["gu", "g", "u"])
def test_opcheck(needs: str) -> None:
    ops = torch.ops.mmfast
    gate, up = some(3, 40)
    torch.library.opcheck(ops.swiglu_fwd.default, (gate, up, "cpu"))
    torch.library.opcheck(ops.swiglu_bwd.default, (gate, gate, up, "g" in needs, "u" in needs, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["cpu", None])
def test_compiles_as_one_graph(dynamic: bool, backend: str | None) -> None:
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        gate, up = some(rows, 40)
        torch.testing.assert_close(run(compiled, gate, up, backend=backend), run(swiglu, gate, up, backend=backend))


@pytest.mark.parametrize(("needs", "kept"), [("gu", "gu"), ("g", "gu"), ("u", "g")])
def test_saves_inputs_only(needs: str, kept: str) -> None:
    gate, up = some(3, 40)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        swiglu(gate.requires_grad_("g" in needs), up.requires_grad_("u" in needs), backend="cpu")
    assert [x.data_ptr() for x in saved] == [{"g": gate, "u": up}[name].data_ptr() for name in kept]


def test_no_gradient_where_none_is_wanted() -> None:
    gate, up = some(3, 40)
    assert not swiglu(gate, up, backend="cpu").requires_grad
    with torch.no_grad():
        assert not swiglu(gate.requires_grad_(), up, backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    gate, up = some(3, 40)
    output = swiglu(gate.requires_grad_(), up, backend="cpu")
    (gradient,) = torch.autograd.grad(output, gate, torch.ones_like(output).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference", None])
def test_autocast_keeps_the_dtype(backend: str | None) -> None:
    gate, up = some(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = swiglu(gate, up, backend=backend)
    torch.testing.assert_close(output, reference(gate, up))


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def sized(count: int, trained: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Operands that take no memory."""
    gate = torch.zeros((), dtype=dtype).requires_grad_(trained).expand(1, count)
    return gate, gate


WITHOUT, WITH = LEAST["forward"], LEAST["backward"]


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "chosen"),
    [
        (sized(WITHOUT), Machine("cpu"), None, "cpu"),
        (sized(WITHOUT - 1), Machine("cpu"), None, "reference"),
        (sized(WITH, True), Machine("cpu"), None, "cpu"),
        (sized(WITH - 1, True), Machine("cpu"), None, "reference"),
        (sized(8), Machine("cpu"), "cpu", "cpu"),
        (sized(WITHOUT, dtype=torch.float64), Machine("cpu"), None, "reference"),
        (sized(WITHOUT), Machine("cpu", no_extension="not built"), None, "reference"),
        (sized(8), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (sized(8), H200, None, "triton"),
        (sized(8, dtype=torch.float64), H200, None, "reference"),
        (sized(8), Machine("cuda", (7, 5)), None, "reference"),
        (sized(8), Machine("mps"), None, "reference"),
    ],
)
def test_selection(arguments: tuple[Tensor, Tensor], on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(*arguments), on, request_) == chosen


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "reason"),
    [
        (sized(8, dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (sized(8), H200, "cpu", "the tensors are on cuda"),
        (sized(8), Machine("cuda", (7, 5)), "triton", "compute capability 7.5 is below 8.0"),
    ],
)
def test_impossible_request(arguments: tuple[Tensor, Tensor], on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"swiglu: backend '{request_}' cannot .*{reason}"):
        OP.select(check(*arguments), on, request_)


def test_explain() -> None:
    assert explain(swiglu, *some(2, 8)).splitlines() == [
        "swiglu runs on: reference",
        f"  cpu: gate has 16 elements; below {LEAST['packed forward']} the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = module._FWD, module.reference
    monkeypatch.setattr(module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    swiglu(*some(2, 8), backend=backend)
    with use_backend(backend):
        swiglu(*some(2, 8))
    assert ran == [backend, backend]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16411,), (128, 128), (3, 13, 433)])
@pytest.mark.parametrize("needs", ["gu", "g", "u", ""])
def test_packed_calls_run_the_kernel_at_once(
    dtype: torch.dtype, shape: tuple[int, ...], needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, up = some(*shape, dtype=dtype)
    expected = run(swiglu, gate, up, needs, backend="cpu")
    grad = torch.randn(shape).to(dtype)
    exact = run(reference, gate.double(), up.double(), needs, grad)
    eager = run(reference, gate, up, needs, grad)
    assert explain(swiglu, gate.requires_grad_(bool(needs)), up).startswith("swiglu runs on: cpu\n")
    module = sys.modules[OP.check.__module__]
    for name in ("check", "_FWD", "_BWD"):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("the general path"))
    found = run(swiglu, gate, up, needs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[0].is_contiguous()
    for ours, baseline, wanted in zip(run(swiglu, gate, up, needs, grad), eager, exact, strict=True):
        assert_as_near(ours, baseline, wanted, dtype)
    with torch.no_grad():
        output = swiglu(gate.requires_grad_(), up)
    assert torch.equal(output, found[0]) and not output.requires_grad


class _Listener(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(str(op))
        return op(*args, **(kwargs or {}))


def test_packed_calls_whose_gradients_take_the_general_path() -> None:
    """A gradient that is not packed, or that somebody listens to; what a hook has moved; a graph of the gradients."""
    gate, up = (x.requires_grad_() for x in some(128, 128))
    grad = torch.randn(128, 128)
    expected = torch.autograd.grad(swiglu(gate, up, backend="cpu"), (gate, up), grad)

    def same(found: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    assert same(torch.autograd.grad(swiglu(gate, up), (gate, up), grad.t().contiguous().t()))
    output = swiglu(gate, up)
    with _Listener() as listener:
        assert same(torch.autograd.grad(output, (gate, up), grad))
    assert "mmfast.swiglu_bwd.default" in listener.heard
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.double(), lambda x: x.float().t().contiguous().t()):
        output = swiglu(gate, up)
    assert same(torch.autograd.grad(output, (gate, up), grad))
    output = torch.utils.checkpoint.checkpoint(swiglu, gate, up, use_reentrant=False)
    assert same(torch.autograd.grad(output, (gate, up), grad))
    output = swiglu(gate, up)
    (gradient,) = torch.autograd.grad(output, gate, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_calls_that_are_not_packed_do_as_explain_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = some(64, 128)
    monkeypatch.setattr(sys.modules[OP.check.__module__], "_fwd_packed", lambda *arguments: pytest.fail("the kernel"))

    def refers(gate: Tensor, up: Tensor) -> bool:
        return torch.equal(swiglu(gate, up), F.silu(gate) * up) and "runs on: reference" in explain(swiglu, gate, up)

    for trained in (False, True):
        gate.requires_grad_(trained)
        assert refers(*torch.cat((gate, up), 1).chunk(2, 1))
        assert refers(gate.double(), up.double())
        assert refers(gate[:1, :16], up[:1, :16])
        with use_backend("reference"):
            assert refers(gate, up)
    gate.requires_grad_(False)
    assert torch.equal(torch.func.vmap(swiglu)(gate, up), F.silu(gate) * up)
    torch.testing.assert_close(
        torch.func.grad(lambda x: swiglu(x, up).sum())(gate), torch.func.grad(lambda x: reference(x, up).sum())(gate)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(gate, torch.ones_like(gate))
        tangent = torch.autograd.forward_ad.unpack_dual(swiglu(dual, up)).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(F.silu, (gate,), (torch.ones_like(gate),))[1] * up)


def test_small_calls_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[OP.check.__module__]
    gate, up = some(2, 8)
    expected = F.silu(gate) * up
    monkeypatch.setattr(module, "check", lambda *arguments: pytest.fail("checked"))
    assert torch.equal(swiglu(gate, up), expected)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.zeros(1, 3)), ValueError, r"gate is \[2, 3\] and up is \[1, 3\]; expected one shape \[..., F\]"),
        ((torch.zeros(()), torch.zeros(())), ValueError, r"gate is \[\] and up is \[\]"),
        ((X.long(), X.long()), TypeError, "gate is torch.int64; expected one of torch.float32"),
        ((X.half(), X), TypeError, "gate is torch.float16 and up is torch.float32; expected one dtype; cast one"),
        ((X, X.to("meta")), ValueError, "up is on meta but gate on cpu; move one"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"swiglu: {message}"):
        swiglu(*arguments)


def test_cpp_checks_what_it_is_given() -> None:
    kernels, view = extension.module(), extension.view
    x = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"up is float32\[3, 5\]; expected \[3, 4\] with stride 1"):
        kernels.swiglu_fwd_cpu(view(x), view(torch.zeros(3, 5)), view(x), 1)
    with pytest.raises(ValueError, match="out is float16; expected float32"):
        kernels.swiglu_fwd_cpu(view(x), view(x), view(x.half()), 1)
    with pytest.raises(ValueError, match=r"gate is float32.*; expected two dimensions"):
        kernels.swiglu_fwd_cpu(view(x[:, 0]), view(x), view(x), 1)
    with pytest.raises(ValueError, match=r"up is float32\[3, 4\]; expected \[1, 4\]"):
        kernels.swiglu_fwd_cpu(x[0], x, x, 1)
    with pytest.raises(ValueError, match="grad_gate and up come together"):
        kernels.swiglu_bwd_cpu(view(x), view(x), None, view(x), None, 1)
    with pytest.raises(ValueError, match="no gradient is asked for"):
        kernels.swiglu_bwd_cpu(view(x), view(x), None, None, None, 1)
    with pytest.raises(ValueError, match="no kernel for float64"):
        kernels.swiglu_fwd_cpu(*[view(x.double())] * 3, 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.swiglu")
    cases = kernels.compile_cases()
    assert {case["fn"] for case in cases} == {kernels._fwd_kernel, kernels._bwd_kernel}
    absent = [{k for k, v in c["constexprs"].items() if v is None} for c in cases if c["fn"] is kernels._bwd_kernel]
    assert all(form in absent for form in (set(), {"grad_up"}, {"up", "grad_gate"}))
    assert {case["num_warps"] for case in cases} == {kernels.TILE["num_warps"]}


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 33), (2048, 512), (4, 1000), (16, 1)])
def test_gpu_close_to_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    operands = some(*shape, dtype=dtype, device="cuda")
    assert_close("triton", *operands)
    first, second = (run(swiglu, *operands, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same bits every time"


@pytest.mark.gpu
def test_gpu_sanitizer() -> None:
    assert_close("triton", *some(300, 72, dtype=torch.float16, device="cuda"))
