"""lora_linear and lora_linear_group: every backend against the reference in float64, and what else they promise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import DEVICES, TOLERANCE, case, dtypes_of, error, skip_if_lacking
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmfast.benchmarks.harness import allocated_bytes
from mmfast.ops import (
    BackendUnavailable,
    explain,
    extension,
    int8_quantize,
    low_rank,
    nf4_quantize,
    products,
    use_backend,
    weights,
)
from mmfast.ops import dropout as dropouts
from mmfast.ops.backends import Machine
from mmfast.ops.dropout import Dropout
from mmfast.ops.lora_linear import GROUP, OP, check, check_group, lora_linear, lora_linear_group, reference

NAMES = ("y", "grad_x", "grad_weight", "grad_a", "grad_b", "grad_bias")


def example(
    shape: tuple[int, ...] = (3, 7),
    features: int = 24,
    out_features: int = 20,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    backend: str = "cpu",
    seed: int = 0,
    shift: float = 0.0,
) -> list[Tensor]:
    """x, weight, lora_a, lora_b, bias; base and update have about unit variance."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return ((torch.randn(*sizes, generator=generator) + shift) * scale).to(dtype).to(DEVICES[backend])

    scale = max(features, 1) ** -0.5
    return [
        randn(*shape, features),
        randn(out_features, features, scale=scale),
        randn(rank, features, scale=scale, dtype=adapter_dtype),
        randn(out_features, rank, scale=rank**-0.5, dtype=adapter_dtype),
        randn(out_features, dtype=adapter_dtype),
    ]


def results(
    op: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor | None = None, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The output and the gradients of x, weight, lora_a, lora_b and bias."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    bias = inputs[4] if len(inputs) > 4 else None
    y = op(*inputs[:4], 1.5, bias, *args, **kwargs)
    grad = torch.ones_like(y) if grad is None else grad.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def compare(backend: str, tensors: list[Tensor], p: float = 0.0) -> None:
    """Output and gradients on the backend against those of the reference in float64, under the same mask."""
    x, weight, *_ = tensors
    grad = 2 + torch.randn(*x.shape[:-1], weight.shape[0], generator=torch.Generator().manual_seed(1)).to(x.device)
    torch.manual_seed(5)
    actual = results(lora_linear, tensors, grad.to(x.dtype), p, backend=backend)
    torch.manual_seed(5)
    mask = Dropout(dropouts.draw_seed(x.device), dropouts.threshold(p)) if p else None
    exact = results(reference, [tensor.double() for tensor in tensors], grad.to(x.dtype).double(), mask)
    for name, a, e, like in zip(NAMES, actual, exact, [None, *tensors], strict=False):
        assert a.shape == e.shape
        assert a.dtype == (x if like is None else like).dtype
        assert error(a, e) <= max(TOLERANCE[x.dtype], TOLERANCE[a.dtype]), name


# The equation


def test_reference_is_the_equation_and_passes_gradcheck() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in example((2, 3), 5, 4, 2)]
    x, weight, a, b, bias = tensors
    torch.testing.assert_close(reference(x, weight, a, b, 0.5, bias), x @ weight.t() + bias + 0.5 * x @ a.t() @ b.t())
    mask = Dropout(torch.tensor([3]), dropouts.threshold(0.5))
    kept = dropouts.kept(mask, 6, 5).view(x.shape)
    torch.testing.assert_close(
        reference(x, weight, a, b, 0.5, None, mask), x @ weight.t() + 0.5 * (2 * x * kept) @ a.t() @ b.t()
    )
    assert torch.autograd.gradcheck(lambda *t: reference(*t[:4], 0.5, t[4], mask), tensors)


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cpu_agrees_with_the_reference(data: st.DataObject) -> None:
    compare_any("cpu", data)


@pytest.mark.parametrize("backend_name", [case("triton")])
@given(data=st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_triton_agrees_with_the_reference(backend_name: str, data: st.DataObject) -> None:
    skip_if_lacking(backend_name)
    compare_any(backend_name, data)


def compare_any(backend_name: str, data: st.DataObject) -> None:
    tensors = example(
        tuple(data.draw(st.lists(st.integers(0, 6), max_size=3), label="shape")),
        features=data.draw(st.integers(1, 70), label="features"),
        out_features=data.draw(st.integers(1, 70), label="out_features"),
        rank=data.draw(st.integers(1, 40), label="rank"),
        dtype=data.draw(st.sampled_from(dtypes_of(backend_name)), label="dtype"),
        adapter_dtype=data.draw(st.sampled_from([torch.float32, torch.float16]), label="adapter_dtype"),
        backend=backend_name,
        seed=data.draw(st.integers(0, 99), label="seed"),
        shift=2.0,  # a sum of few terms that cancel would be judged by what is left of it
    )
    if not data.draw(st.booleans(), label="bias"):
        tensors = tensors[:4]
    compare(backend_name, tensors, data.draw(st.sampled_from([0.0, 0.1, 0.5]), label="dropout"))


@pytest.mark.parametrize(
    ("backend_name", "dtype"), [case(backend, dtype) for backend in DEVICES for dtype in dtypes_of(backend)]
)
def test_is_as_accurate_as_eager(backend_name: str, dtype: torch.dtype) -> None:
    skip_if_lacking(backend_name)
    tensors = example((48,), 96, 64, 8, dtype, dtype, backend=backend_name)
    grad = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    exact = results(reference, [tensor.double() for tensor in tensors], grad.double())
    eager = results(reference, tensors, grad)
    found = results(lora_linear, tensors, grad, backend=backend_name)
    floor = torch.finfo(dtype).eps
    for name, ours, theirs, e in zip(NAMES, found, eager, exact, strict=True):
        assert error(ours, e) <= 1.5 * error(theirs, e) + 0.1 * floor, name
        largest, allowed = (ours.double() - e).abs().max(), (theirs.double() - e).abs().max()
        assert largest <= 1.5 * allowed + floor * e.abs().max(), name


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_are_taken_in_chunks(dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CHUNK_ROWS", 16)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 100)
    monkeypatch.setattr(products, "_has_products", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(low_rank, "DROPOUT_ROWS", 7)
    compare("cpu", example((3, 15), dtype=dtype), p)


def test_machine_with_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_products", lambda dtype: True)
    for dtype in (torch.bfloat16, torch.float16):
        compare("cpu", example((2, 15), dtype=dtype), 0.25)


def test_strides(backend: str) -> None:
    x, *rest = example((4, 6), backend=backend)
    compare(backend, [x.transpose(0, 1), *rest])
    compare(backend, [x[:, ::2], *rest], 0.5)
    compare(backend, [x[:1].expand(4, 6, 24), *rest])
    compare(backend, [torch.cat([x, x], -1)[..., ::2], *rest], 0.5)
    weight, a, b, bias = rest
    compare(backend, [x, weight.t().contiguous().t(), a.t().contiguous().t(), b.t().contiguous().t(), bias])
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, a, b)]
    ones = torch.autograd.grad(lora_linear(*inputs, 1.0, backend=backend).sum(), inputs)  # a gradient of stride 0
    expected = torch.autograd.grad(reference(*inputs, 1.0).sum(), inputs)
    for found, e in zip(ones, expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_element(backend: str) -> None:
    for shape in ((0,), (1,), (35,)):
        compare(backend, example(shape, 33, 17, 3, backend=backend), 0.3)


@pytest.mark.parametrize("quantize", [nf4_quantize, int8_quantize])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_weight(backend: str, quantize: Callable[..., Any], dtype: torch.dtype) -> None:
    if dtype not in dtypes_of(backend):
        pytest.skip("the interpreter has no bfloat16")
    for rows in (1, 40):
        x, weight, a, b, bias = example((rows,), 128, 24, dtype=dtype, backend=backend)
        quantised = quantize(weight)
        grad = torch.randn(rows, 24, generator=torch.Generator().manual_seed(1)).to(x)

        def run(
            op: Callable[..., Tensor], weight: Any, tensors: list[Tensor], grad: Tensor, **kwargs: Any
        ) -> list[Tensor]:
            inputs = [tensor.detach().requires_grad_() for tensor in tensors]
            y = op(inputs[0], weight, *inputs[1:3], 1.5, inputs[3], **kwargs)
            return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

        found = run(lora_linear, quantised, [x, a, b, bias], grad, backend=backend)
        dense = weights.dense(quantised, torch.float64)
        exact = run(reference, dense, [t.double() for t in (x, a, b, bias)], grad.double())
        for actual, e in zip(found, exact, strict=True):
            assert error(actual, e) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend_name", [case("triton")])
def test_one_kernel_runs_where_the_table_says_so(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_if_lacking(backend_name)
    kernels = importlib.import_module("mmfast.kernels.lora_linear_fused")
    ran, fused = [], kernels.fused
    monkeypatch.setattr(kernels, "fused", lambda *args: (ran.append(args[0].shape[0]), fused(*args))[1])
    device = torch.device(DEVICES[backend_name])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for table, expected in (((), []), ((low_rank.Faster(name, torch.float32, 20, 24, 20),), [35])):
        monkeypatch.setattr(low_rank, "FUSED_FASTER", table)
        for rows in (19, 35):
            compare(backend_name, example((rows,), backend=backend_name), 0.25)
        assert ran == expected
    ran.clear()
    x, weight, a, b, _ = example((35,), backend=backend_name)
    lora_linear(x, weight.t().contiguous().t(), a, b, 1.0, backend=backend_name)  # not row by row: two steps
    assert ran == []


def test_without_an_update_the_base_is_unchanged(backend: str) -> None:
    x, weight, a, b, bias = example(backend=backend)
    y = lora_linear(x, weight, a, torch.zeros_like(b), 2.0, bias, backend=backend)
    torch.testing.assert_close(y, F.linear(x, weight, bias), rtol=1e-6, atol=1e-6)


# Siblings and stacks


def siblings(
    backend: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Any], list[Tensor], list[Tensor], list[float], list[Any]]:
    sizes = [(20, 4), (9, 1), (33, 18)]
    made = [example((5, 3), 24, n, r, dtype, backend=backend, seed=i) for i, (n, r) in enumerate(sizes)]
    columns = list(zip(*made, strict=True))
    biases = [columns[4][0], None, columns[4][2]]
    return made[0][0], list(columns[1]), list(columns[2]), list(columns[3]), [0.5, 2.0, 1.0], biases


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_group_equals_its_siblings_alone(backend: str, p: float) -> None:
    x, *lists = siblings(backend)
    trained = [x, *(t for tensors in lists[:3] for t in tensors), lists[4][0], lists[4][2]]
    for tensor in trained:
        tensor.requires_grad_()
    grads = [torch.randn(5, 3, w.shape[0], device=x.device) for w in lists[0]]
    torch.manual_seed(2)
    outputs = lora_linear_group(x, *lists, p, backend=backend)
    found = torch.autograd.grad(outputs, trained, grads)
    torch.manual_seed(2)
    mask = Dropout(dropouts.draw_seed(x.device), dropouts.threshold(p)) if p else None
    alone = [reference(x, *sibling, mask) for sibling in zip(*lists, strict=True)]
    expected = torch.autograd.grad(alone, trained, grads)
    assert isinstance(outputs, tuple)
    for actual, e in zip([*outputs, *found], [*alone, *expected], strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-4)


def test_group_with_an_output_that_is_not_used(backend: str) -> None:
    x, *lists = siblings(backend)
    a = lists[1][1].requires_grad_()
    b = lists[2][0].requires_grad_()
    outputs = lora_linear_group(x, *lists, backend=backend)
    outputs[0].sum().backward()
    assert a.grad is not None and not a.grad.any()
    expected = torch.autograd.grad(reference(x, *(part[0] for part in lists)).sum(), b)[0]
    torch.testing.assert_close(b.grad, expected, rtol=1e-4, atol=1e-4)


def test_group_of_different_formats(backend: str) -> None:
    x, _, *lists = siblings(backend)
    x = torch.randn(6, 64, device=x.device)
    mixed = [torch.randn(n, 64, device=x.device) for n in (20, 9, 33)]
    mixed = [mixed[0], nf4_quantize(mixed[1]), int8_quantize(mixed[2])]
    lists[0] = [torch.randn(r, 64, device=x.device).requires_grad_() for r in (4, 1, 18)]
    outputs = lora_linear_group(x, mixed, *lists, backend=backend)
    dense = [weights.dense(weight, x.dtype) for weight in mixed]
    expected = lora_linear_group(x, dense, *lists, backend="reference")
    for actual, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-4)
    for actual, e in zip(
        torch.autograd.grad([y.sum() for y in outputs], lists[0]),
        torch.autograd.grad([y.sum() for y in expected], lists[0]),
        strict=True,
    ):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-4)


def test_stacked_adapters_add_up(backend: str) -> None:
    x, weight, a, b, bias = example(backend=backend)
    _, _, other_a, other_b, _ = example(rank=7, backend=backend, seed=9)
    factors = [tensor.requires_grad_() for tensor in (a, other_a, b, other_b)]
    y = lora_linear(x, weight, [a, other_a], [b, other_b], [0.5, 3.0], bias, backend=backend)
    expected = x @ weight.t() + bias + 0.5 * x @ a.t() @ b.t() + 3.0 * x @ other_a.t() @ other_b.t()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for actual, e in zip(
        torch.autograd.grad(y.square().sum(), factors),
        torch.autograd.grad(expected.square().sum(), factors),
        strict=True,
    ):
        torch.testing.assert_close(actual, e, rtol=1e-4, atol=1e-3)


# Dropout


def test_dropout_is_the_same_on_every_backend(backend: str) -> None:
    tensors = example(backend=backend)
    torch.manual_seed(11)
    first = lora_linear(*tensors[:4], 1.0, None, 0.5, backend=backend)
    torch.manual_seed(11)
    second = lora_linear(*tensors[:4], 1.0, None, 0.5, backend="reference")
    third = lora_linear(*tensors[:4], 1.0, None, 0.5, backend=backend)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, third, rtol=1e-3, atol=1e-3)


def test_checkpointing_repeats_the_mask(backend: str) -> None:
    tensors = example(backend=backend)

    def run(through: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        torch.manual_seed(4)
        y = through(lambda x, w, a, b, bias: lora_linear(x, w, a, b, 1.0, bias, 0.5, backend=backend), *inputs)
        return torch.autograd.grad(y.square().sum(), inputs)

    plain = run(lambda op, *inputs: op(*inputs))
    repeated = run(lambda op, *inputs: checkpoint(op, *inputs, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, repeated, strict=True))


# Gradients and what is kept for them


@pytest.mark.parametrize("needed", range(1, 32))
def test_gradients_that_are_needed(needed: int) -> None:
    tensors = example((2, 5))
    expected = results(reference, tensors)[1:]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(needed >> i & 1))
    lora_linear(*tensors[:4], 1.5, tensors[4], backend="cpu").sum().backward()
    for i, (tensor, e) in enumerate(zip(tensors, expected, strict=True)):
        if needed >> i & 1:
            torch.testing.assert_close(tensor.grad, e)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("train", ["both", "a", "b", "neither"])
def test_saves_x_and_the_low_rank_product_only(backend: str, dtype: torch.dtype, p: float, train: str) -> None:
    if dtype not in dtypes_of(backend):
        pytest.skip("the interpreter has no bfloat16")
    x, weight, a, b, bias = example((64,), 32, 48, 4, dtype, backend=backend)
    x.requires_grad_()
    a.requires_grad_(train in ("both", "a")), b.requires_grad_(train in ("both", "b"))
    exist_anyway = {tensor.data_ptr() for tensor in (weight, a, b, bias)}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in exist_anyway:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = lora_linear(x, weight, a, b, 1.0, bias, p, backend=backend)
    expected = a.requires_grad * x.nbytes + b.requires_grad * 64 * 4 * dtype.itemsize + 8 * bool(p)
    assert sum(tensor.nbytes for tensor in saved) == expected
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in saved if tensor.shape == x.shape)
    y.sum().backward()


def test_nothing_that_is_saved_is_written_to(backend: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in example(backend=backend)]
    before = [tensor.detach().clone() for tensor in tensors]
    y = lora_linear(*tensors[:4], 1.5, tensors[4], 0.3, backend=backend)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    kept_grad = grad.clone()
    first = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    second = torch.autograd.grad(y, tensors, grad)
    assert torch.equal(grad, kept_grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_second_derivative_is_refused() -> None:
    x, weight, a, b, _ = example()
    y = lora_linear(x.requires_grad_(), weight, a, b, 1.0, backend="cpu")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_of_a_slow_16_bit_machine_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 exist a chunk of x and of y and a block of the weight, never all of one."""
    monkeypatch.setattr(products, "_has_products", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(products, "CHUNK_ROWS", 32)
    monkeypatch.setattr(products, "BLOCK_ELEMENTS", 2**12)
    x, weight, a, b, _ = example((1024,), 256, 256, 4, torch.bfloat16)
    lora_linear(x, weight, a, b, 1.0, backend="cpu")
    peak, kept = allocated_bytes(lambda: lora_linear(x, weight, a, b, 1.0, backend="cpu"))
    assert peak <= kept + 3 * 4 * 32 * 256 + 2**16 < 2 * kept


def test_is_deterministic(backend: str) -> None:
    tensors = example((64,), 40, 30, 8, backend=backend)
    first, second = (results(lora_linear, tensors, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# PyTorch around it


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_compiles_into_one_graph(p: float) -> None:
    tensors = example()

    def run(op: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        return results(op, tensors, None, p, backend="cpu")

    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(compiled), run(lora_linear), strict=True))


def test_group_compiles_into_one_graph() -> None:
    x, *lists = siblings("cpu")
    a = lists[1][0].requires_grad_()
    compiled = torch.compile(lora_linear_group, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(sum(y.sum() for y in op(x, *lists, backend="cpu")), a)[0]
        for op in (compiled, lora_linear_group)
    ]
    assert torch.equal(*grads)


def test_compiles_with_a_quantised_weight() -> None:
    x, weight, a, b, _ = example((3, 5), 64)
    quantised = nf4_quantize(weight)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(x, quantised, a, b, 1.0, backend="cpu"), lora_linear(x, quantised, a, b, 1.0, backend="cpu")
    )


def test_opcheck(backend: str) -> None:
    x, *lists = siblings(backend)
    frozen, a, b, scalings, biases = lists
    sizes, seed = [1, 1, 1], torch.tensor([5], device=x.device)
    ops = torch.ops.mmfast
    forward = (x, frozen, sizes, a, b, biases, scalings, 3277, seed, backend)
    torch.library.opcheck(ops.lora_linear_fwd.default, forward)
    *outputs, s = ops.lora_linear_fwd.default(*forward)
    common = ([torch.ones_like(y) for y in outputs], x, s, frozen, sizes, a, b, scalings, 3277, seed)
    some = [True, False, True]
    torch.library.opcheck(ops.lora_linear_bwd.default, (*common, True, True, some, some, some, backend))
    none = [False] * 3
    torch.library.opcheck(ops.lora_linear_bwd.default, (*common, False, False, none, none, some, backend))


def test_autocast_casts_x_and_a_dense_weight() -> None:
    tensors = example((20,))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lora_linear, tensors, backend="cpu")
        doubled = lora_linear(*(tensor.double() for tensor in tensors[:4]), 1.0)
        half = lora_linear(tensors[0].bfloat16(), *tensors[1:4], 1.0, backend="cpu")
    cast = [tensor.bfloat16() for tensor in tensors[:2]]
    expected = results(lora_linear, [*cast, *tensors[2:]], backend="cpu")
    assert found[0].dtype == half.dtype == torch.bfloat16
    assert doubled.dtype == torch.float64
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a, e.to(a.dtype))


# Selection and errors


def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name, steps in low_rank.STEPS.items():
        down = lambda *args, name=name, down=steps.down: (ran.append(name), down(*args))[1]  # noqa: E731
        monkeypatch.setitem(low_rank.STEPS, name, steps._replace(down=down))
    tensors = example(backend=backend)
    lora_linear(*tensors[:4], 1.0, backend=backend)
    with use_backend(backend):
        lora_linear_group(tensors[0], *([tensor] for tensor in tensors[1:4]), [1.0])
    assert ran == [backend] * 2


CPU, GPU = Machine("cpu"), Machine("cuda", (9, 0))


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        (CPU, torch.float32, "cpu"),
        (CPU, torch.bfloat16, "cpu"),
        (CPU, torch.float64, "reference"),
        (CPU._replace(no_extension="not built"), torch.float32, "reference"),
        (CPU._replace(triton_interpreted=True), torch.float32, "cpu"),
        (GPU, torch.float32, "triton"),
        (GPU, torch.float16, "triton"),
        (GPU, torch.float64, "reference"),
        (GPU._replace(no_triton="not installed"), torch.bfloat16, "reference"),
        (GPU._replace(capability=(7, 5)), torch.float16, "reference"),
    ],
)
def test_selection(machine: Machine, dtype: torch.dtype, expected: str) -> None:
    x, weight, a, b, _ = example((1024,), 64, 512, dtype=dtype)
    assert OP.select(check(x, weight, a, b, 1.0), machine) == expected
    assert GROUP.select(check_group(x, [weight], [a], [b], [1.0]), machine) == expected


@pytest.mark.parametrize("sgemm", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "trained", "expected", "expected_packed"),
    [
        (32, 4096, True, "reference", "reference"),
        (64, 1024, True, "reference", "cpu"),
        (64, 1024, False, "reference", "cpu"),
        (64, 512, False, "reference", "reference"),
        (512, 256, True, "reference", "cpu"),
        (512, 512, True, "cpu", "cpu"),
        (512, 512, False, "reference", "cpu"),
        (1024, 512, False, "cpu", "cpu"),
    ],
)
def test_small_calls_are_left_to_the_reference(
    rows: int,
    columns: int,
    trained: bool,
    expected: str,
    expected_packed: str,
    sgemm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "has_sgemm", lambda: sgemm)
    monkeypatch.setattr(extension, "has_amx", lambda: False)
    x, weight, a, b, _ = example((rows,), 256, columns)
    a.requires_grad_(trained)
    for matrix, chosen in ((x, expected_packed if sgemm else expected), (torch.cat([x, x], 1)[:, :256], expected)):
        call = check(matrix, weight, a, b, 1.0)
        assert OP.select(call, CPU) == chosen
        assert OP.select(call, CPU, "cpu") == "cpu"
        assert OP.select(call, GPU) == "triton"
        if chosen == "reference":
            assert "the reference is faster" in explain(lora_linear, matrix, weight, a, b, 1.0)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({}, "packed rows per rank"),
        ({"tiles": True}, "tiled rows per rank"),
        ({"dropout": 0.5}, "rows"),
        ({"dtype": torch.float16}, "rows"),
        ({"precision": "bf16"}, "rows"),
        ({"train_weight": True}, "rows"),
    ],
)
def test_what_is_counted_of_a_packed_call(change: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "has_sgemm", lambda: True)
    monkeypatch.setattr(products, "_has_products", lambda dtype: True)
    monkeypatch.setattr(products, "_fp32_precision", lambda: change.get("precision", "none"))
    monkeypatch.setattr(extension, "has_amx", lambda: "tiles" in change)
    monkeypatch.setattr(products, "TILED_F32_ROWS", 64)
    x, weight, a, b, _ = example((64,), 16, 32, dtype=change.get("dtype", torch.float32))
    weight.requires_grad_("train_weight" in change)
    call = check(x, weight, a, b, 1.0, dropout=change.get("dropout", 0.0))
    sizes = {size.key: size.size for size in OP.sizes(call, CPU)}
    assert key in sizes
    if key.endswith("per rank"):
        assert sizes[key] == 64 // len(a) and sizes["packed rows"] == 64
        assert sizes["packed work"] == 64 * 16 * 32 and sizes["packed share"] == 16 * 32 // (len(a) * 48)


def test_where_the_reference_would_be_slow_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, a, b, _ = example((16,), 256, 256, dtype=torch.bfloat16)
    for fast, expected in ((True, "reference"), (False, "cpu")):
        monkeypatch.setattr(products, "_has_products", lambda dtype, fast=fast: fast)
        assert OP.select(check(x, weight, a, b, 1.0), CPU) == expected
        assert OP.select(check(x, nf4_quantize(weight), a, b, 1.0), CPU) == "cpu"
    assert OP.select(check(x[:4], weight, a, b, 1.0), CPU) == "reference"  # dot products, in bfloat16
    assert OP.select(check(x[:15], weight[:200], a, b[:200], 1.0), CPU) == "reference"


def test_impossible_requests() -> None:
    tensors = [tensor.double() for tensor in example()]
    with pytest.raises(BackendUnavailable, match="no float64 kernel"):
        lora_linear(*tensors[:4], 1.0, backend="cpu")
    with pytest.raises(BackendUnavailable, match="has no 'cuda' backend"):
        lora_linear(*tensors[:4], 1.0, backend="cuda")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "x is a scalar"),
        ({"x": torch.ones(3, 24).int()}, TypeError, "x is torch.int32"),
        ({"weight": torch.randn(20, 23)}, ValueError, r"weight is \[20, 23\] but x \[3, 7, 24\]; expected \[N, 24\]"),
        ({"weight": torch.randn(20, 24).half()}, TypeError, "x is torch.float32 and weight is torch.float16"),
        ({"lora_a": torch.randn(4, 23)}, ValueError, r"lora_a is \[4, 23\] but x has 24 features; expected \[R, 24\]"),
        ({"lora_a": torch.randn(0, 24)}, ValueError, "R >= 1"),
        ({"lora_b": torch.randn(20, 5)}, ValueError, r"lora_b is \[20, 5\]; expected \[N, R\] = \[20, 4\]"),
        ({"lora_b": torch.ones(20, 4).int()}, TypeError, "lora_b is torch.int32; expected a floating dtype"),
        ({"lora_b": torch.randn(20, 4, device="meta")}, ValueError, "lora_b is on meta but x on cpu"),
        ({"lora_a": [torch.randn(4, 24)]}, TypeError, "some are lists and some not"),
        (
            {"lora_a": [torch.randn(4, 24)], "lora_b": [torch.randn(20, 4)], "scaling": [1.0, 2.0]},
            ValueError,
            "1 lora_a, 1 lora_b and 2 scalings",
        ),
        ({"bias": torch.randn(19)}, ValueError, r"bias is \[19\]; expected \[N\] = \[20\]"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1\.0; expected a probability in \[0, 1\)"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = (
        dict(zip(("x", "weight", "lora_a", "lora_b", "bias"), example(), strict=True)) | {"scaling": 1.0} | change
    )
    with pytest.raises(kind, match=f"lora_linear: .*{message}"):
        lora_linear(**arguments)


def test_errors_of_a_group() -> None:
    x, weight, a, b, _ = example()
    with pytest.raises(ValueError, match=r"lora_linear_group: there are \[2, 1, 1, 1, 2\] weights"):
        lora_linear_group(x, [weight, weight], [a], [b], [1.0])
    with pytest.raises(ValueError, match=r"lora_linear_group: there are \[0, 0, 0, 0, 0\]"):
        lora_linear_group(x, [], [], [], [])
