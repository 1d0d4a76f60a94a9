"""bias_scale_linear: every backend against the reference in float64."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DTYPES, FLOOR, INTERPRETED_DTYPES, KERNELS, TOLERANCE
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmfast.ops import (
    BackendUnavailable,
    bias_scale_linear,
    explain,
    extension,
    int8_quantize,
    nf4_quantize,
    products,
    use_backend,
    weights,
)
from mmfast.ops.backends import Machine
from mmfast.ops.bias_scale_linear import LEAST, OP, SCALE_ON, STEPS, check, reference

Arguments = tuple[Tensor, Any, Tensor | None, Tensor | None, str]


def some(
    shape: tuple[int, ...],
    columns: int,
    scale_on: str = "output",
    dtype: torch.dtype = torch.float32,
    vectors: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Arguments:
    """x of this shape, a weight with so many rows, bias and scale."""

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    features = shape[-1]
    weight = (randn(columns, features) / max(features, 1) ** 0.5).to(dtype)
    scale = None if scale_on == "none" else randn(features if scale_on == "input" else columns).to(vectors)
    return randn(*shape).to(dtype), weight, randn(columns).to(vectors), scale, scale_on


def run(
    function: Any, arguments: Arguments, needs: str = "xwbs", grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradients that are needed, for a fixed gradient of the output."""
    *tensors, scale_on = arguments
    named = {
        name: tensor.detach().requires_grad_(name in needs) if isinstance(tensor, Tensor) else tensor
        for name, tensor in zip("xwbs", tensors, strict=True)
        if tensor is not None
    }
    output = function(*map(named.get, "xwbs"), scale_on, **options)
    assert output.dtype == named["x"].dtype
    found = {"output": output.detach()}
    if needs:
        if grad is None:
            generator = torch.Generator().manual_seed(1)
            grad = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        output.backward(grad.to(output.dtype))
    for name, tensor in named.items():
        if name in needs:
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
            assert tensor.grad.shape == tensor.shape
            found[f"grad {name}"] = tensor.grad
        elif isinstance(tensor, Tensor):
            assert tensor.grad is None
    return found


def double(arguments: Arguments) -> Any:
    return tuple(x.double() if isinstance(x, Tensor) else x for x in arguments)


def assert_close(backend: str | None, arguments: Arguments, needs: str = "xwbs") -> None:
    """Output and gradients are as near to the float64 reference as they must be, and no worse than eager's."""
    dtype = arguments[0].dtype
    exact = run(reference, double(arguments), needs)
    eager = run(reference, arguments, needs)
    ours = run(bias_scale_linear, arguments, needs, backend=backend)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        assert ours[name].shape == wanted.shape
        for measure in (torch.linalg.vector_norm, lambda x: x.abs().amax() if x.numel() else x.sum()):
            size = measure(wanted).item()
            error = measure(ours[name].double() - wanted).item()
            allowed = 1.5 * measure(eager[name].double() - wanted).item() + FLOOR[dtype] * size
            assert error <= allowed, f"{name}: error {error}, allowed {allowed}, size {size}"
            assert error <= TOLERANCE[dtype] * size, name


# ---- the equation


def test_reference_by_hand() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
    bias = torch.tensor([1.0, 0.0, -1.0])
    assert reference(x, weight, bias, torch.tensor([2.0, 10.0, -1.0]), "output").tolist() == [[8.0, 60.0, -1.0]]
    assert reference(x, weight, bias, torch.tensor([2.0, 10.0]), "input").tolist() == [[23.0, 60.0, 3.0]]
    assert reference(x, weight, bias, None, "none").tolist() == [[4.0, 6.0, 1.0]]
    assert reference(x, weight, None, None, "none").tolist() == [[3.0, 6.0, 2.0]]


def test_reference_folds_into_a_plain_linear() -> None:
    x, weight, bias, scale, _ = double(some((5, 7), 6, "output"))
    folded = F.linear(x, scale[:, None] * weight, scale * bias)
    torch.testing.assert_close(reference(x, weight, bias, scale, "output"), folded)
    x, weight, bias, scale, _ = double(some((5, 7), 6, "input"))
    torch.testing.assert_close(reference(x, weight, bias, scale, "input"), F.linear(x, weight * scale, bias))


@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_gradcheck_of_the_reference(scale_on: str) -> None:
    *tensors, _ = double(some((3, 4), 5, scale_on))
    trained = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, scale_on), trained)
    assert torch.autograd.gradgradcheck(lambda *a: reference(*a, scale_on), trained)


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("scale_on", SCALE_ON)
@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((1, 32), 40),
        ((3, 5, 33), 70),
        ((70, 24), 20),  # several parts of a sum in Triton, and chunks of rows where products are made in fp32
        ((9, 1040), 30),  # several column blocks, in x
        ((9, 30), 1040),  # ... and in the output
    ],
)
def test_close_to_float64(
    backend: str,
    dtype: torch.dtype,
    scale_on: str,
    shape: tuple[int, ...],
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "CHUNK_ROWS", 32)
    assert_close(backend, some(shape, columns, scale_on, dtype))


@pytest.mark.parametrize(("backend", "dtype"), KERNELS[:3])
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_many_rows(backend: str, dtype: torch.dtype, scale_on: str) -> None:
    assert_close(backend, some((1100, 24), 20, scale_on, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS[:3:2] + KERNELS[4:])
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_only_the_gradients_that_are_asked_for(backend: str, dtype: torch.dtype, scale_on: str) -> None:
    arguments = some((8, 33), 24, scale_on, dtype)
    names = "xwb" if scale_on == "none" else "xwbs"
    everything = run(bias_scale_linear, arguments, names, backend=backend)
    for count in range(len(names)):
        for needs in itertools.combinations(names, count):
            found = run(bias_scale_linear, arguments, "".join(needs), backend=backend)
            torch.testing.assert_close(found, {name: everything[name] for name in found})


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_without_a_bias(backend: str, scale_on: str) -> None:
    for dtype in INTERPRETED_DTYPES:
        x, weight, _, scale, _ = some((19, 33), 24, scale_on, dtype)
        assert_close(backend, (x, weight, None, scale, scale_on))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_on", SCALE_ON)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_any_size_may_be_zero(backend: str, scale_on: str, dtype: torch.dtype) -> None:
    for shape, columns in (((0, 8), 5), ((3, 0, 8), 5), ((4, 0), 5), ((4, 8), 0), ((0, 0), 0)):
        arguments = some(shape, columns, scale_on, dtype)
        torch.testing.assert_close(
            run(bias_scale_linear, arguments, backend=backend), run(reference, arguments), rtol=1e-2, atol=1e-3
        )


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    lead = data.draw(st.lists(st.integers(1, 9), max_size=3))
    features, columns = data.draw(st.tuples(st.integers(24, 70), st.integers(24, 70)))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    vectors = data.draw(st.sampled_from([torch.float32, dtype, torch.float64]))
    scale_on = data.draw(st.sampled_from(SCALE_ON))
    shape = (*lead, features)
    _, weight, bias, scale, _ = some(shape, columns, scale_on, dtype, vectors)
    order = data.draw(st.permutations(range(len(shape))))
    steps = data.draw(st.lists(st.sampled_from([1, 1, 2]), min_size=len(shape), max_size=len(shape)))
    storage = torch.randn([shape[i] * steps[i] for i in order]).to(dtype)
    x = storage.permute([order.index(i) for i in range(len(shape))])[tuple(slice(None, None, s) for s in steps)]
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    if data.draw(st.booleans()) and scale is not None:
        scale = scale.repeat_interleave(2)[::2]
    before = x.clone()
    assert_close(backend, (x, weight, bias, scale, scale_on))
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_gradients_of_any_stride(backend: str, scale_on: str) -> None:
    arguments = some((3, 5, 16), 24, scale_on)
    ones = torch.ones(()).expand(3, 5, 24)
    same_in_each_row = torch.randn(24).expand(3, 5, 24)
    transposed = torch.randn(24, 5, 3).transpose(0, 2)
    for grad in (ones, same_in_each_row, transposed):
        ours = run(bias_scale_linear, arguments, grad=grad, backend=backend)
        torch.testing.assert_close(ours, run(reference, arguments, grad=grad))


@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_the_gradient_that_comes_in_is_not_written_to(scale_on: str) -> None:
    arguments, grad = some((7, 16), 24, scale_on), torch.randn(7, 24)
    before = grad.clone()
    run(bias_scale_linear, arguments, grad=grad, backend="cpu")
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, scale_on: str) -> None:
    steps, threads = STEPS["cpu"], torch.get_num_threads()
    grad, z = torch.randn(900, 1500).to(dtype), torch.randn(900, 1500).to(dtype)
    bias, scale = torch.randn(1500), torch.randn(1500)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, grad_bias, grad_scale = torch.empty_like(grad), torch.zeros(1500), torch.zeros(1500)
            steps.read_grad(grad, z, bias, scale, out, grad_bias, grad_scale)
            results.append((out, grad_bias, grad_scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_is_zero_has_its_gradient(backend: str) -> None:
    x, weight, bias, scale, _ = some((9, 16), 24)
    arguments = x, weight, bias, torch.zeros_like(scale), "output"
    assert_close(backend, arguments)
    assert run(bias_scale_linear, arguments, backend=backend)["grad s"].abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_that_cancels_the_product(backend: str) -> None:
    # Σ grad · (z + bias) in one sum: Σ grad · z and bias · Σ grad, each of them large, would leave their roundings.
    steps, grad = STEPS[backend], torch.randn(200, 24)
    z = torch.randn(200, 24) + 1e4
    total = torch.zeros(24)
    steps.read_grad(grad, z, torch.full((24,), -1e4), None, None, None, total)
    exact = (grad.double() * (z.double() - 1e4)).sum(0)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str) -> None:
    # Address space only: 6 GiB of which a few pages are touched.
    storage = torch.empty(3 * 2**30, dtype=torch.float16)
    x = storage.as_strided((3, 16), (2**30 + 32, 1))
    for i in range(3):
        x[i] = i + 1
    scale = torch.full((16,), 0.5, requires_grad=True)
    output = bias_scale_linear(x, torch.eye(16, dtype=torch.float16), None, scale, "input", backend=backend)
    output.sum().backward()
    assert output[:, 3].tolist() == [0.5, 1.0, 1.5]
    assert scale.grad is not None
    assert scale.grad.tolist() == [6.0] * 16


# ---- on a quantised weight


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("quantize", [nf4_quantize, int8_quantize])
def test_quantised_weight(backend: str, dtype: torch.dtype, quantize: Any) -> None:
    for rows, scale_on in itertools.product((1, 40), SCALE_ON):
        x, weight, *rest = some((rows, 128), 24, scale_on, dtype)
        quantised = quantize(weight)
        exact = run(reference, double((x, weights.dense(quantised, torch.float64), *rest)), "xbs")
        found = run(bias_scale_linear, (x, quantised, *rest), "xbs", backend=backend)
        for name, wanted in exact.items():
            error = torch.linalg.vector_norm(found[name].double() - wanted) / torch.linalg.vector_norm(wanted)
            assert error <= TOLERANCE[dtype], name


def test_a_quantised_weight_is_never_left_to_the_reference() -> None:
    x, weight, *rest = some((1, 128), 24)
    assert OP.select(check(x, nf4_quantize(weight), *rest), Machine("cpu")) == "cpu"


def test_compiles_with_a_quantised_weight() -> None:
    torch.compiler.reset()
    compiled = torch.compile(bias_scale_linear, fullgraph=True, backend="aot_eager")
    x, weight, *rest = some((3, 128), 24)
    arguments = x, nf4_quantize(weight), *rest
    torch.testing.assert_close(
        run(compiled, arguments, "xbs", backend="cpu"), run(bias_scale_linear, arguments, "xbs", backend="cpu")
    )


# ---- the op in PyTorch


@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_opcheck(scale_on: str) -> None:
    ops, needs = torch.ops.mmfast, scale_on != "none"
    x, weight, bias, scale, _ = some((2, 3, 8), 5, scale_on)
    for keep_z in (False, True):
        torch.library.opcheck(ops.bias_scale_linear_fwd.default, (x, [weight], bias, scale, scale_on, keep_z, "cpu"))
    z = torch.randn(6, 5) if scale_on == "output" else None
    arguments = torch.randn(2, 3, 5), x, z, [weight], bias, scale, scale_on
    torch.library.opcheck(ops.bias_scale_linear_bwd.default, (*arguments, True, True, True, needs, "cpu"))
    torch.library.opcheck(ops.bias_scale_linear_bwd.default, (*arguments, False, False, True, needs, "cpu"))


@pytest.mark.parametrize("scale_on", SCALE_ON)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, scale_on: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(bias_scale_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 5):
        arguments = some((2, rows, 16), 8, scale_on)
        torch.testing.assert_close(
            run(compiled, arguments, backend="cpu"), run(bias_scale_linear, arguments, backend="cpu")
        )


@pytest.mark.parametrize(
    ("scale_on", "needs", "matrices"),
    [
        ("output", "xbs", {"z": 1}),
        ("output", "xb", {}),
        ("output", "wb", {"x": 1}),
        ("output", "wbs", {"x": 1, "z": 1}),
        ("input", "xbs", {"x": 1}),
        ("input", "xb", {}),
        ("input", "wb", {"x": 1}),
        ("none", "xb", {}),
        ("none", "wb", {"x": 1}),
    ],
)
def test_saved_bytes(scale_on: str, needs: str, matrices: dict[str, int]) -> None:
    rows, features, columns = 512, 24, 40
    *tensors, _ = some((rows, features), columns, scale_on, torch.bfloat16)
    names = dict(zip("xwbs", tensors, strict=True))
    for name in needs:
        names[name].requires_grad_()
    existing = {names[name].data_ptr() for name in "wbs" if names[name] is not None}
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        bias_scale_linear(*tensors, scale_on, backend="cpu")
    extra = sorted(x.nbytes for address, x in saved.items() if address not in existing)
    assert extra == sorted(2 * rows * {"x": features, "z": columns}[name] for name in matrices)
    assert (names["x"].data_ptr() in saved) == ("x" in matrices)


def test_no_gradient_where_none_is_wanted() -> None:
    arguments = some((4, 8), 8)
    arguments[0].requires_grad_()
    with torch.no_grad():
        assert not bias_scale_linear(*arguments, backend="cpu").requires_grad
    assert not bias_scale_linear(arguments[0].detach(), *arguments[1:], backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    x, *rest = some((3, 8), 8)
    x.requires_grad_()
    output = bias_scale_linear(x, *rest, backend="cpu")
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference", None])
@pytest.mark.parametrize("scale_on", SCALE_ON)
def test_autocast_as_in_a_plain_linear(backend: str, scale_on: str) -> None:
    *tensors, _ = some((4, 16), 8, scale_on)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    named = [None if tensor is None else tensor.requires_grad_() for tensor in tensors]
    with torch.autocast("cpu", dtype=dtype):
        output = bias_scale_linear(*named, scale_on, backend=backend)
        plain = F.linear(tensors[0], tensors[1])
    assert output.dtype == plain.dtype == dtype
    output.backward(torch.ones_like(output))
    exact = run(reference, double((*tensors, scale_on)), grad=torch.ones_like(output))
    torch.testing.assert_close(output.double(), exact["output"], rtol=2e-2, atol=2e-2)
    for name, tensor in zip("xwbs", named, strict=True):
        if tensor is not None:
            assert tensor.grad is not None
            assert tensor.grad.dtype == torch.float32
            torch.testing.assert_close(tensor.grad.double(), exact[f"grad {name}"], rtol=2e-2, atol=8e-2)


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bias_scale_linear(*double(some((4, 16), 8))).dtype == torch.float64


@pytest.mark.parametrize("scale_on", SCALE_ON)
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16])
def test_small_calls_have_the_bits_of_the_reference(scale_on: str, vectors: torch.dtype) -> None:
    arguments = some((3, 5, 16), 8, scale_on, vectors=vectors)
    expected, ours = run(reference, arguments), run(bias_scale_linear, arguments)
    before = [x.clone() for x in arguments[:3]]
    with torch.no_grad():
        torch.testing.assert_close(bias_scale_linear(*arguments), expected["output"])
    assert all(torch.equal(x, y) for x, y in zip(arguments[:3], before, strict=True))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_scale_on_the_input_goes_straight_to_the_reference_where_nobody_differentiates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = some((4, 16), 8, "input")
    monkeypatch.setitem(LEAST, "input", 0)
    monkeypatch.setattr(sys.modules[OP.check.__module__], "check", None)
    with torch.no_grad():
        assert torch.equal(bias_scale_linear(*arguments), reference(*arguments))
    with pytest.raises(TypeError, match="not callable"):
        bias_scale_linear(*arguments)


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def sized(*shape: int, scale_on: str = "output", dtype: torch.dtype = torch.float32) -> Arguments:
    """Arguments without memory: shape is that of x, then the columns."""
    *lead, features, columns = shape
    zero, vector = torch.zeros((), dtype=dtype), torch.zeros((), dtype=torch.promote_types(dtype, torch.float32))
    scale = None if scale_on == "none" else vector.expand(features if scale_on == "input" else columns)
    return zero.expand(*lead, features), zero.expand(columns, features), vector.expand(columns), scale, scale_on


def trained(arguments: Arguments) -> Arguments:
    arguments[2].requires_grad_()  # type: ignore[union-attr]
    return arguments


LARGE = LEAST["output"] // 64, 32, 64
LARGE_INPUT = LEAST["input"] // 64, 64, 32


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "chosen"),
    [
        (sized(*LARGE), Machine("cpu"), None, "cpu"),
        (sized(LARGE[0] - 1, *LARGE[1:]), Machine("cpu"), None, "reference"),
        (sized(2, 32, 64), Machine("cpu"), "cpu", "cpu"),
        (sized(*LARGE, dtype=torch.float64), Machine("cpu"), None, "reference"),
        (sized(*LARGE), Machine("cpu", no_extension="not built"), None, "reference"),
        (sized(2, 32, 64), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (sized(*LARGE_INPUT, scale_on="input"), Machine("cpu"), None, "reference"),
        (trained(sized(*LARGE_INPUT, scale_on="input")), Machine("cpu"), None, "cpu"),
        (trained(sized(LARGE_INPUT[0] - 1, 64, 32, scale_on="input")), Machine("cpu"), None, "reference"),
        (sized(*LARGE, scale_on="none"), Machine("cpu"), None, "reference"),
        (trained(sized(*LARGE, scale_on="none")), Machine("cpu"), None, "reference"),
        (sized(2, 32, 64), H200, None, "triton"),
        (sized(2, 32, 64, scale_on="none", dtype=torch.bfloat16), H200, None, "triton"),
        (sized(2, 32, 64, scale_on="none"), H200, None, "reference"),
        (sized(2, 32, 64, scale_on="input"), H200, None, "reference"),
        (trained(sized(2, 32, 64, scale_on="input")), H200, None, "triton"),
        (sized(2, 32, 64, dtype=torch.float64), H200, None, "reference"),
        (sized(2, 32, 64), Machine("cuda", (7, 5)), None, "reference"),
        (sized(2, 32, 64), Machine("mps"), None, "reference"),
    ],
)
def test_selection(arguments: Arguments, on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(*arguments), on, request_) == chosen


@pytest.mark.parametrize("scale_on", ["none", "input"])
def test_selection_where_fp32_products_are_made_in_tiles(scale_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forms whose passes gain nothing; the call itself asks in fewer steps, and finds the same."""
    monkeypatch.setattr(extension, "has_amx", lambda: True)
    monkeypatch.setattr(products, "_fp32_precision", lambda: "none")
    module = sys.modules[OP.check.__module__]
    rows, features = products.TILED_F32_ROWS, 128
    columns = LEAST["32-bit product"] // (rows * features)
    for change, chosen in ((0, "cpu"), (1, "reference")):
        arguments = sized(rows, features, columns - change, scale_on=scale_on)
        with torch.no_grad():
            assert OP.select(check(*arguments), Machine("cpu")) == chosen
            assert module._is_small(*arguments, None) == (chosen == "reference")
    few = sized(rows - 1, features, 2 * columns, scale_on=scale_on)
    quantised = few[0], nf4_quantize(few[1]), *few[2:]
    assert OP.select(check(*few), Machine("cpu")) == "reference"
    assert OP.select(check(*quantised), Machine("cpu")) == "cpu"


@pytest.mark.parametrize("scale_on", ["output", "none", "input"])
def test_fp32_products_in_tiles(scale_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension.has_amx():
        pytest.skip("this CPU has no AMX")
    arguments = some((150, 96), 70, scale_on)
    general = run(bias_scale_linear, arguments, "xbs" if scale_on != "none" else "xb", backend="reference")
    monkeypatch.setitem(LEAST, "32-bit product", 1)
    ran: list[int] = []
    multiply = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *a, **options: ran.append(len(a[1])) or multiply(*a, **options))
    found = run(bias_scale_linear, arguments, "xbs" if scale_on != "none" else "xb")
    assert ran == [150, 150]
    for name, expected in general.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_selection_where_16_bit_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (sized(rows, 32, 64, dtype=torch.bfloat16) for rows in (100, 1024))
    monkeypatch.setattr(products, "_has_products", lambda dtype: dtype == torch.float32)
    assert OP.select(check(*small), Machine("cpu")) == "reference"
    assert OP.select(check(*large), Machine("cpu")) == "cpu"
    monkeypatch.setattr(products, "_has_products", lambda dtype: True)
    assert OP.select(check(*large), Machine("cpu")) == "reference"
    for scale_on in ("output", "none"):
        larger = sized(*LARGE, scale_on=scale_on, dtype=torch.bfloat16)
        assert OP.select(check(*larger), Machine("cpu")) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "reason"),
    [
        (sized(2, 32, 64, dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (sized(2, 32, 64), H200, "cpu", "the tensors are on cuda"),
        (sized(2, 32, 64), Machine("cuda", (7, 5)), "triton", "compute capability 7.5 is below 8.0"),
    ],
)
def test_impossible_request(arguments: Arguments, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"bias_scale_linear: backend '{request_}' cannot .*{reason}"):
        OP.select(check(*arguments), on, request_)


@pytest.mark.parametrize("needs", ["xbs", "x", "b", "s", "bs", ""])
@pytest.mark.parametrize("shape", [(16,), (64, 128), (2, 3, 33), (0, 8)])
@pytest.mark.parametrize("biased", [True, False])
def test_packed_float32_calls_run_the_kernels_at_once(
    needs: str, shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = some(shape, 24)
    if not biased:
        arguments, needs = (*arguments[:2], None, *arguments[3:]), needs.replace("b", "")
    general = run(bias_scale_linear, arguments, needs, backend="cpu")
    assert explain(bias_scale_linear, *arguments).startswith("bias_scale_linear runs on: cpu\n")
    module = sys.modules[OP.check.__module__]
    for name in ("check", "reference", "_FWD", "_BWD"):
        monkeypatch.setattr(module, name, lambda *arguments: pytest.fail("another path"))
    assert_close(None, arguments, needs)
    found = run(bias_scale_linear, arguments, needs)
    for name, expected in general.items():
        torch.testing.assert_close(found[name], expected)


def test_a_plan_picks_what_a_call_picks() -> None:
    """Tensors without memory, against what C++ reads of real ones."""
    module, mode = sys.modules[OP.check.__module__], FakeTensorMode()
    x, weight, bias, scale, _ = some((64, 128), 24)
    cases = [
        (True, (x, weight, bias, scale, "output")),
        (True, (x.clone().requires_grad_(), weight, None, scale, "output")),
        (False, (x.t().contiguous().t(), weight, bias, scale, "output")),
        (False, (x, weight.clone().requires_grad_(), bias, scale, "output")),
        (False, (x, weight, bias.half(), scale, "output")),
        (False, (x, weight, bias, scale.repeat_interleave(2)[::2], "output")),
        (False, some((64, 128), 24, dtype=torch.bfloat16)),
        (False, some((64, 128), 24, "input")),
    ]
    for packed, (*tensors, scale_on) in cases:
        fakes = [None if tensor is None else mode.from_tensor(tensor) for tensor in tensors]
        assert module._is_packed(*tensors, scale_on, None) == packed
        chosen = "cpu" if packed else "reference"
        assert explain(bias_scale_linear, *fakes, scale_on).startswith(f"bias_scale_linear runs on: {chosen}\n")


def test_strided_vectors_take_the_general_path() -> None:
    x, weight, bias, scale, _ = some((4, 8), 24)
    double_spaced = (torch.stack((vector, vector), 1)[:, 0] for vector in (bias, scale))
    torch.testing.assert_close(bias_scale_linear(x, weight, *double_spaced), reference(x, weight, bias, scale))


def test_packed_float32_calls_whose_gradients_are_not() -> None:
    arguments = some((4, 8), 24)
    expected = run(bias_scale_linear, arguments, "xbs", grad=torch.ones(4, 24))
    for grad in (torch.ones(()).expand(4, 24), torch.ones(24, 4).t()):
        leaves = [x.detach().requires_grad_(i != 1) for i, x in enumerate(arguments[:4])]
        output = bias_scale_linear(*leaves)
        found = torch.autograd.grad(output, [leaves[0], *leaves[2:]], grad)
        for ours, name in zip(found, ("grad x", "grad b", "grad s"), strict=True):
            torch.testing.assert_close(ours, expected[name])
    output = bias_scale_linear(*leaves)
    (gradient,) = torch.autograd.grad(output, leaves[0], grad.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "has_amx", lambda: False)
    assert explain(bias_scale_linear, *some((2, 8), 4, dtype=torch.bfloat16)).splitlines() == [
        "bias_scale_linear runs on: reference",
        f"  cpu: rows · N is 8; below {LEAST['output']} the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]
    none = OP.explain(check(*sized(*LARGE, scale_on="none")), Machine("cpu"))
    assert "one call of PyTorch's own linear" in none


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = module._FWD, module.reference
    monkeypatch.setattr(module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    arguments = some((2, 8), 4)
    bias_scale_linear(*arguments, backend=backend)
    with use_backend(backend):
        bias_scale_linear(*arguments)
    assert ran == [backend, backend]


X, W, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, W, B, B, "both"), ValueError, "scale_on is 'both'; use one of output, input, none"),
        ((X, W, B, None), ValueError, "no scale is given and scale_on is 'output'; expected no scale for 'none'"),
        ((X, W, B, B, "none"), ValueError, "a scale is given and scale_on is 'none'"),
        ((torch.zeros(()), W, B, B), ValueError, r"x is \[\] and weight is \[4, 3\]; expected \[..., K\] and \[N, K\]"),
        ((torch.zeros(2, 5), W, B, B), ValueError, r"x is \[2, 5\] and weight is \[4, 3\]"),
        ((X.long(), W.long(), B, B), TypeError, "x is torch.int64; expected one of torch.float32"),
        ((X.half(), W, B, B), TypeError, "x is torch.float16 and weight is torch.float32; expected one dtype"),
        ((X, W, torch.zeros(3), B), ValueError, r"bias is \[3\] but weight \[4, 3\] .*; expected \[N\] = \[4\]"),
        ((X, W, B, torch.zeros(3)), ValueError, r"scale is \[3\] .* scale_on 'output'; expected \[N\] = \[4\]"),
        ((X, W, B, B, "input"), ValueError, r"scale is \[4\] .* scale_on 'input'; expected \[K\] = \[3\]"),
        ((X, W, B.long(), B), TypeError, "bias is torch.int64; expected a floating dtype"),
        ((X, W.to("meta"), B, B), ValueError, "weight is on meta but x on cpu; move one"),
        ((X, W, B.to("meta"), B), ValueError, "bias is on meta but x on cpu; move one"),
        ((X, W, B, B.to("meta")), ValueError, "scale is on meta but x on cpu; move one"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"bias_scale_linear: {message}"):
        bias_scale_linear(*arguments)


def test_cpp_checks_what_it_is_given() -> None:
    apply, read_grad = STEPS["cpu"]
    z, vector, totals = torch.zeros(3, 4), torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match=r"y is float32\[3, 5\]; expected \[3, 4\] with stride 1"):
        apply(z, vector, vector, torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"bias is float32\[3\]; expected float32\[4\]"):
        apply(z, torch.zeros(3), None, z)
    with pytest.raises(ValueError, match=r"z is float16\[3, 4\] and y bfloat16\[3, 4\]; expected one dtype"):
        apply(z.half(), None, vector, z.bfloat16())
    with pytest.raises(ValueError, match="grad_scale and z come together"):
        read_grad(z, z, None, vector, None, None, None)
    with pytest.raises(ValueError, match="grad is float16, z bfloat16 and out float16; expected one dtype"):
        read_grad(z.half(), z.bfloat16(), None, vector, None, None, totals)
    with pytest.raises(ValueError, match="no kernel for float64"):
        apply(z.double(), None, vector, z.double())


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.bias_scale_linear")
    cases = kernels.compile_cases()
    assert {case["fn"] for case in cases} == {
        kernels._apply_kernel,
        kernels._read_grad_kernel,
        kernels._add_parts_kernel,
    }
    for case in cases:
        tile = kernels.ADD_TILE if case["fn"] is kernels._add_parts_kernel else kernels.TILE
        assert case["num_warps"] == tile["num_warps"]
        assert {k: case["constexprs"][k] for k in tile if k != "num_warps"}.items() <= tile.items()
    for rows, columns in itertools.product((1, 63, 1000, 16384), (1, 64, 4096, 11008)):
        chunk_rows = kernels.chunk(rows, columns, processors=132)
        assert chunk_rows % kernels.TILE["BLOCK_M"] == 0
        assert -(-rows // chunk_rows) * -(-columns // kernels.TILE["BLOCK_N"]) <= max(4 * 132, columns) * 2


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_on", SCALE_ON)
@pytest.mark.parametrize(("shape", "columns"), [((3, 5, 33), 70), ((2048, 512), 1024), ((4, 512), 1000), ((16, 64), 1)])
def test_gpu_close_to_float64(dtype: torch.dtype, scale_on: str, shape: tuple[int, ...], columns: int) -> None:
    arguments = some(shape, columns, scale_on, dtype, device="cuda")
    assert_close("triton", arguments)
    first, second = (run(bias_scale_linear, arguments, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "the same bits every time"


@pytest.mark.gpu
def test_gpu_sanitizer() -> None:
    for scale_on in SCALE_ON:
        assert_close("triton", some((300, 72), 264, scale_on, torch.float16, device="cuda"))
