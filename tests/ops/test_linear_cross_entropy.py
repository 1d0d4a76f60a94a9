"""linear_cross_entropy: every backend against the reference in float64, and what it promises beyond the numbers."""

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

from mmfast.benchmarks.harness import peak_extra_bytes
from mmfast.ops import BackendUnavailable, explain, extension, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.linear_cross_entropy import OP, check, linear_cross_entropy, reference

# The module, which the function of the same name hides as an attribute of mmfast.ops.
op_module = importlib.import_module("mmfast.ops.linear_cross_entropy")


def example(
    shape: tuple[int, ...] = (3, 7),
    features: int = 12,
    vocabulary: int = 37,
    labelled: float = 0.5,
    dtype: torch.dtype = torch.float32,
    ignore_index: int = -100,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, labels; the logits have unit variance."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, features, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, features, generator=generator) * features**-0.5).to(dtype)
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) >= labelled] = ignore_index
    return hidden, weight, labels


def results(
    op: Callable[..., Any], hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the gradients of hidden and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = op(hidden, weight, labels, **kwargs)
    gradients = torch.autograd.grad(loss, (hidden, weight), None if grad is None else grad.to(loss.dtype))
    return loss.detach(), *gradients


def on(backend: str, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICES[backend]) for tensor in tensors]


def compare(backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> None:
    """Loss and gradients on the backend against those of the reference in float64."""
    hidden, weight, labels = on(backend, hidden, weight, labels)
    grad = torch.tensor(1.7, device=hidden.device)
    if kwargs.get("reduction") == "none":
        grad = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    actual = results(linear_cross_entropy, hidden, weight, labels, grad, backend=backend, **kwargs)
    exact = results(reference, hidden.double(), weight.double(), labels, grad, **kwargs)
    for name, a, e in zip(("loss", "grad_hidden", "grad_weight"), actual, exact, strict=True):
        assert a.shape == e.shape
        assert error(a, e) <= TOLERANCE[hidden.dtype], name
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == hidden.dtype


# The equation


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cpu_agrees_with_the_reference(data: st.DataObject) -> None:
    compare_any("cpu", data)


@pytest.mark.parametrize("backend_name", [case("triton")])
@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_triton_agrees_with_the_reference(backend_name: str, data: st.DataObject) -> None:
    skip_if_lacking(backend_name)
    compare_any(backend_name, data)


def compare_any(backend_name: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3), label="shape"))
    inputs = example(
        shape,
        features=data.draw(st.integers(8, 40), label="features"),  # fewer may cancel in the gradient
        vocabulary=data.draw(st.integers(1, 600), label="vocabulary"),
        labelled=data.draw(st.sampled_from([0.0, 0.15, 0.5, 1.0]), label="labelled"),
        dtype=data.draw(st.sampled_from(dtypes_of(backend_name)), label="dtype"),
        seed=data.draw(st.integers(0, 99), label="seed"),
    )
    compare(
        backend_name,
        *inputs,
        reduction=data.draw(st.sampled_from(["mean", "sum", "none"]), label="reduction"),
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1, 1.0]), label="smoothing"),
    )


@pytest.mark.parametrize(
    ("backend_name", "dtype"), [case(backend, dtype) for backend in DEVICES for dtype in dtypes_of(backend)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_is_as_accurate_as_eager(backend_name: str, dtype: torch.dtype, reduction: str) -> None:
    """At most 1.5 times the error of eager PyTorch in the same dtype, plus a rounding; largest element included."""
    skip_if_lacking(backend_name)
    hidden, weight, labels = on(backend_name, *example((100,), 64, 1999, 0.5, dtype))
    grad = torch.full((100,) if reduction == "none" else (), 0.7, device=hidden.device)
    kwargs = {"reduction": reduction, "label_smoothing": 0.1}
    actual = results(linear_cross_entropy, hidden, weight, labels, grad, backend=backend_name, **kwargs)
    eager = results(
        lambda h, w, y, **k: F.cross_entropy(F.linear(h, w).float(), y, **k), hidden, weight, labels, grad, **kwargs
    )
    exact = results(reference, hidden.double(), weight.double(), labels, grad, **kwargs)
    for a, e, x in zip(actual, eager, exact, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert error(a, x) <= 1.5 * error(e, x) + eps / 8
        largest = 1.5 * (e - x).abs().max() + eps / 2 * x.abs().max()
        assert (a - x).abs().max() <= largest


def test_reference_gradients() -> None:
    hidden, weight, labels = example((2, 3), 4, 5, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        torch.autograd.gradcheck(
            lambda h, w, reduction=reduction: reference(h, w, labels, reduction=reduction, label_smoothing=0.2),
            (hidden.requires_grad_(), weight.requires_grad_()),
        )


def test_reference_is_cross_entropy_of_linear() -> None:
    hidden, weight, labels = example()
    for reduction in ("mean", "sum", "none"):
        kwargs: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
        expected = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1), labels.flatten(), **kwargs)
        torch.testing.assert_close(reference(hidden, weight, labels, **kwargs).flatten(), expected.flatten())


def test_exponential_is_within_two_ulp() -> None:
    """Through the gradient of a logit x beside a label's logit 0: it is e^x where e^x is too small for the sum."""
    x = torch.linspace(-86.9, -17.5, 20001)
    hidden = torch.stack([x, torch.ones_like(x)], 1).requires_grad_()
    weight = torch.zeros(64, 2)
    weight[1, 0], weight[2:, 1] = 1, -1e4
    labels = torch.zeros(len(x), dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, reduction="sum", backend="cpu").backward()
    exact = x.double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert hidden.grad is not None
    assert ((hidden.grad[:, 0].double() - exact).abs() / ulp).max() <= 2


# Edge cases


def test_without_rows(backend: str) -> None:
    compare(backend, *example((0,)))
    compare(backend, *example((2, 0)), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend_name", [case("cpu"), case("triton"), "reference"])
def test_all_rows_ignored(backend_name: str, reduction: str) -> None:
    skip_if_lacking(backend_name)
    hidden, weight, labels = example(labelled=0.0)
    if backend_name != "reference":
        hidden, weight, labels = on(backend_name, hidden, weight, labels)
    grad = torch.ones(labels.shape if reduction == "none" else (), device=hidden.device)
    found = results(linear_cross_entropy, hidden, weight, labels, grad, reduction=reduction, backend=backend_name)
    for tensor in found:
        assert torch.equal(tensor, torch.zeros_like(tensor))


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (5, 1), (1, 33), (9, 257), (3, 4099)])
def test_odd_sizes(backend: str, rows: int, vocabulary: int) -> None:
    compare(backend, *example((rows,), 5, vocabulary, labelled=1.0), label_smoothing=0.1)


def test_any_strides(backend: str) -> None:
    hidden, weight, labels = example((4, 6), 8, 20)
    compare(backend, hidden[:, :-1], weight, labels[:, 1:])
    compare(backend, hidden.transpose(0, 1), weight, labels.t(), reduction="none")
    compare(backend, hidden[..., ::2], weight[:, ::2], labels)
    compare(backend, hidden[:1].expand(4, 6, 8), weight.t().contiguous().t(), labels.clamp(min=0))


@pytest.mark.parametrize("ignore_index", [-1, 0, 36, 10**9])
def test_other_ignore_index(backend: str, ignore_index: int) -> None:
    compare(backend, *example(ignore_index=ignore_index), ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_where_every_row_has_a_label_none_is_sought(
    backend: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that on CUDA the host does not wait for the device to count them."""
    hidden, weight, labels = on(backend, *example(labelled=1.0))
    grad = torch.rand(labels.shape if reduction == "none" else (), device=hidden.device)
    expected = results(linear_cross_entropy, hidden, weight, labels, grad, backend=backend, reduction=reduction)
    monkeypatch.setattr(Tensor, "nonzero", None)
    options: Any = {"reduction": reduction, "ignore_index": None}
    found = results(linear_cross_entropy, hidden, weight, labels, grad, backend=backend, **options)
    assert all(map(torch.equal, found, expected))
    if backend == "cpu":  # CUDA does not check labels
        with pytest.raises(IndexError):
            linear_cross_entropy(hidden, weight, labels - 101, backend=backend, ignore_index=None)


def test_huge_logits(backend: str) -> None:
    weight = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [9999.0, 0.0], [0.0, 1e4], [0.0, 0.0]])
    hidden, labels = torch.eye(2).repeat(5, 1), torch.arange(10) // 2
    compare(backend, hidden, weight, labels, label_smoothing=0.1)
    compare(backend, hidden, weight, labels, reduction="none")


def test_several_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "WORKSPACE_BYTES", 4 * 13 * 101)
    for dtype in dtypes_of(backend):
        for labelled in (0.5, 1.0):
            compare(backend, *example((3, 11), 9, 101, labelled, dtype))
            compare(backend, *example((3, 11), 9, 101, labelled, dtype), reduction="none")


@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_element(backend: str) -> None:
    for labelled in (0.0, 0.5, 1.0):
        compare(backend, *example((30,), 8, 300, labelled))
        compare(backend, *example((30,), 8, 300, labelled), reduction="none")


def test_label_outside_the_vocabulary() -> None:
    hidden, weight, labels = example(vocabulary=37)
    labels[1, 1] = 37
    with pytest.raises(IndexError, match=r"linear_cross_entropy: label 37 is outside \[0, 37\)"):
        linear_cross_entropy(hidden, weight, labels, backend="cpu")
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, labels, backend="reference")


@pytest.mark.parametrize("backend_name", [case("triton")])
def test_label_outside_the_vocabulary_in_triton(backend_name: str) -> None:
    skip_if_lacking(backend_name)
    hidden, weight, labels = on(backend_name, *example(vocabulary=37, labelled=1.0))
    labels[1, 1], labels[2, 3] = 37, -1
    outside = (labels < 0) | (labels == 37)
    hidden.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend_name)
    losses.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(losses.isnan(), outside)
    assert torch.equal(hidden.grad.isnan().all(-1), outside)


# Accuracy


def test_accuracy_is_that_of_argmax(backend: str) -> None:
    hidden, weight, labels = on(backend, *example((50, 4), 6, 40, 0.7))
    best = F.linear(hidden, weight).argmax(-1)
    labels = torch.where((labels != -100) & (torch.arange(4, device=labels.device) < 2), best, labels)
    found = linear_cross_entropy(hidden.requires_grad_(), weight, labels, return_accuracy=True, backend=backend)
    assert found.correct == ((best == labels) & (labels != -100)).sum() > 50
    assert found.supervised == (labels != -100).sum()
    for count in (found.correct, found.supervised):
        assert count.shape == ()
        assert count.dtype == torch.int64
        assert not count.requires_grad
    expected = reference(hidden, weight, labels, return_accuracy=True)
    assert found[1:] == expected[1:]


def test_accuracy_takes_the_first_of_equal_logits(backend: str) -> None:
    hidden, labels = torch.ones(4, 1), torch.tensor([0, 1, 2, -100])
    weight = torch.tensor([[0.0], [1.0], [1.0]])
    hidden, weight, labels = on(backend, hidden, weight, labels)
    for some in (labels, labels[:3].clone()):
        found = linear_cross_entropy(hidden[: len(some)], weight, some, return_accuracy=True, backend=backend)
        assert found.correct == 1


# Gradients and what is kept for them


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
def test_gradients_that_are_needed(backend: str, needs: tuple[bool, bool], reduction: str) -> None:
    hidden, weight, labels = on(backend, *example())
    ones = torch.ones(labels.shape if reduction == "none" else (), device=hidden.device)
    both = results(reference, hidden, weight, labels, ones, reduction=reduction)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend).sum().backward()
    for tensor, need, expected in zip((hidden, weight), needs, both[1:], strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, expected)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_backward_twice(backend: str, reduction: str) -> None:
    hidden, weight, labels = (tensor.to(DEVICES[backend]) for tensor in example())
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend).sum()
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_second_derivative_is_refused() -> None:
    hidden, weight, labels = example()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, labels, backend="cpu")
    (gradient,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_tied_weight(backend: str) -> None:
    _, weight, labels = on(backend, *example())
    inputs = torch.arange(labels.numel(), device=labels.device).view_as(labels)

    def gradient(op: Callable[..., Tensor], **kwargs: Any) -> Tensor:
        tied = weight.detach().clone().requires_grad_()
        return torch.autograd.grad(op(F.embedding(inputs, tied).tanh(), tied, labels, **kwargs), tied)[0]

    torch.testing.assert_close(gradient(linear_cross_entropy, backend=backend), gradient(reference))


def test_without_gradients_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = []
    compiled = extension.module()

    class Spy:
        @staticmethod
        def linear_cross_entropy_rows(*args: Any) -> None:
            wrote.append(args[4])
            compiled.linear_cross_entropy_rows(*args)

    monkeypatch.setattr(extension, "module", lambda: Spy)
    hidden, weight, labels = example()
    linear_cross_entropy(hidden, weight, labels, backend="cpu")
    hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, backend="cpu").requires_grad
    linear_cross_entropy(hidden, weight, labels, reduction="none", backend="cpu")
    assert wrote == [False, False, False]
    linear_cross_entropy(hidden, weight, labels, backend="cpu")
    assert wrote[3:] == [True]


@pytest.mark.parametrize(("reduction", "trained"), [("mean", False), ("sum", True), ("none", True)])
def test_memory(monkeypatch: pytest.MonkeyPatch, reduction: str, trained: bool) -> None:
    """The logits of all rows never exist, and what stays for backward is the gradient alone."""
    monkeypatch.setattr(op_module, "WORKSPACE_BYTES", 2**17)
    hidden, weight, labels = example((256,), 8, 4096, 1.0)
    hidden.requires_grad_(), weight.requires_grad_(trained)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def step() -> None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend="cpu")
        loss.sum().backward()

    gradients = hidden.nbytes + weight.nbytes * trained
    assert peak_extra_bytes(step) < 2**17 + 3 * gradients + 2**16 < 4 * len(hidden) * len(weight) / 4
    assert sum(tensor.nbytes for tensor in saved) <= gradients + labels.nbytes + 16


def test_is_deterministic(backend: str) -> None:
    hidden, weight, labels = on(backend, *example((64,), 16, 500))
    first, second = (results(linear_cross_entropy, hidden, weight, labels, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# PyTorch around it


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiles_into_one_graph(reduction: str) -> None:
    inputs = example((2, 9), 8, 33)
    grad = torch.full((2, 9) if reduction == "none" else (), 0.5)
    kwargs: dict[str, Any] = {"reduction": reduction, "backend": "cpu"}
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found, expected = (results(op, *inputs, grad, **kwargs) for op in (compiled, linear_cross_entropy))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_opcheck(backend: str) -> None:
    hidden, weight, labels = on(backend, *example())
    grad = torch.rand(labels.shape, device=hidden.device)
    ops = torch.ops.mmfast
    torch.library.opcheck(
        ops.linear_cross_entropy_fwd.default, (hidden, weight, labels, -100, "mean", 0.1, True, False, backend)
    )
    torch.library.opcheck(
        ops.linear_cross_entropy_fwd.default, (hidden, weight, labels, -100, "none", 0.0, False, False, backend)
    )
    torch.library.opcheck(
        ops.linear_cross_entropy_bwd.default, (grad, hidden, weight, labels, -100, 0.1, True, True, backend)
    )


def test_autocast_casts_both() -> None:
    hidden, weight, labels = example()
    with torch.autocast("cpu", torch.bfloat16):
        found = results(linear_cross_entropy, hidden, weight.bfloat16(), labels, backend="cpu")
        doubled = linear_cross_entropy(hidden.double(), weight.double(), labels)
    cast = results(linear_cross_entropy, hidden.bfloat16(), weight.bfloat16(), labels, backend="cpu")
    assert found[1].dtype == torch.float32
    assert doubled.dtype == torch.float64
    for a, b in zip(found, cast, strict=True):
        assert torch.equal(a, b.to(a.dtype))


# Selection and errors


def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    kernels = importlib.import_module("mmfast.kernels.linear_cross_entropy")
    triton_rows = kernels.linear_cross_entropy_rows
    monkeypatch.setattr(kernels, "linear_cross_entropy_rows", lambda *a: (ran.append("triton"), triton_rows(*a)))
    module = extension.module
    monkeypatch.setattr(extension, "module", lambda: (ran.append("cpu"), module())[1])
    inputs = on(backend, *example())
    linear_cross_entropy(*inputs, backend=backend)
    with use_backend(backend):
        linear_cross_entropy(*inputs)
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
    call = check(*example((256,), 64, 1024, dtype=dtype))
    assert OP.select(call, machine) == expected


def test_small_calls_are_left_to_the_reference() -> None:
    hidden, weight, labels = example((20,), 64, 512)
    assert OP.select(check(hidden, weight, labels), CPU) == "reference"
    assert "the reference is faster" in explain(linear_cross_entropy, hidden, weight, labels)
    assert OP.select(check(hidden, weight, labels), CPU, "cpu") == "cpu"
    assert OP.select(check(hidden, weight, labels), GPU) == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("leading", [(20,), (4, 5)])
@pytest.mark.parametrize("labelled", [True, False])
def test_small_calls_give_what_the_reference_gives(
    dtype: torch.dtype, leading: tuple[int, ...], labelled: bool
) -> None:
    hidden, weight, labels = example(leading, 64, 512, dtype=dtype)
    if not labelled:
        labels = torch.full_like(labels, -100)
    elif len(leading) > 1:  # a part of longer rows
        labels = F.pad(labels, (1, 0))[:, 1:]
    ours, expected = (results(function, hidden, weight, labels) for function in (linear_cross_entropy, reference))
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=0 if not labelled else 1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    if not labelled:
        assert not any(found.any() for found in ours)
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, torch.full_like(labels, 512))


def test_what_a_small_call_is_asked() -> None:
    hidden, weight, labels = example((4, 5), 64, 512)
    work = extension.labelled()
    last = torch.full_like(labels, -100)
    last[0, 0] = 3
    assert work(hidden, weight, labels, -100) == work(hidden, weight, last.t().contiguous().t(), -100) == 20 * 512 * 64
    assert work(hidden, weight, last, 3) == 20 * 512 * 64
    assert work(hidden, weight, torch.full_like(labels, 3), 3) == -1  # no row has a label
    assert work(hidden, weight, labels.int(), -100) == work(hidden, weight.double(), labels, -100) == -1
    assert work(hidden, weight, labels.flatten(), -100) == work(hidden, weight[:, 1:], labels, -100) == -1
    with pytest.raises(TypeError):
        work(hidden, weight, labels, "none")


def test_explain_and_impossible_requests() -> None:
    hidden, weight, labels = example((256,), 64, 1024)
    assert "runs on: cpu" in explain(linear_cross_entropy, hidden, weight, labels)
    with pytest.raises(BackendUnavailable, match="no float64 kernel"):
        linear_cross_entropy(hidden.double(), weight.double(), labels, backend="cpu")
    with pytest.raises(BackendUnavailable, match="has no 'cuda' backend"):
        linear_cross_entropy(hidden, weight, labels, backend="cuda")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"hidden": torch.randn(12)}, ValueError, r"hidden is \[12\] and weight is \[37, 12\]"),
        ({"weight": torch.randn(37, 11)}, ValueError, r"weight is \[37, 11\]; expected"),
        ({"weight": torch.randn(0, 12)}, ValueError, "V >= 1"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, ValueError, r"labels is \[3, 6\] but hidden \[3, 7, 12\]"),
        ({"labels": torch.zeros(3, 7)}, TypeError, r"labels is torch.float32; expected torch.int64"),
        ({"labels": torch.zeros(3, 7, dtype=torch.int64, device="meta")}, ValueError, "labels on meta"),
        ({"weight": torch.randn(37, 12).half()}, TypeError, "hidden is torch.float32 and weight is torch.float16"),
        ({"hidden": torch.ones(3, 7, 12).int(), "weight": torch.ones(37, 12).int()}, TypeError, "torch.int32"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'; use one of mean, sum, none"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5; expected 0 to 1"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("hidden", "weight", "labels"), example(), strict=True)) | change
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments)


def test_launches_and_compile_cases() -> None:
    kernels = pytest.importorskip("mmfast.kernels.linear_cross_entropy")
    for vocabulary in (1, 512, 32000, 151936):
        config = kernels.launch_config(vocabulary)
        assert 256 <= config["BLOCK"] <= 4096
        assert config["BLOCK"] == 8 * 32 * config["num_warps"]
    cases = kernels.compile_cases()
    assert len({form["name"] for form in cases}) == len(cases)
    for form in cases:
        assert list(form["signature"]) == form["fn"].arg_names
