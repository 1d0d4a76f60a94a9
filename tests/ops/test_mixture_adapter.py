"""mixture_adapter: every backend against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_adapter_cases import FORMS, NAMES, Form, Tensors, double, run, some
from op_cases import BACKENDS, DEVICES, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near, dtypes_of
from torch import Tensor

from mmfast.ops import dropout as dropouts
from mmfast.ops import mixture_adapter
from mmfast.ops.dropout import Dropout
from mmfast.ops.merged_experts import merge
from mmfast.ops.mixture_adapter import ACTIVATIONS, reference


def eager(*tensors: Tensor | None, **named: Any) -> Tensor:
    """What one writes in PyTorch: LaVIN's lines as linears, all in the dtype of x."""
    x, down, down_bias, up, up_bias, router = (None if t is None else t.to(tensors[0].dtype) for t in tensors[:6])  # type: ignore[union-attr]
    scale, dropout, activation = tensors[6:]
    h = ACTIVATIONS[activation](F.linear(x, down.flatten(0, -2), None if down_bias is None else down_bias.flatten()))  # type: ignore
    if dropout is not None:
        h = dropouts.reference(h, dropout).to(h.dtype)
    hs = h.unflatten(-1, (-1, down.shape[-2]))  # type: ignore[union-attr]
    y = x
    for k in range(up.shape[0]):  # type: ignore[union-attr]
        parts = hs[..., min(k, hs.shape[-2] - 1), :].split(up.shape[2], -1)  # type: ignore[union-attr]
        matrices = up[k].chunk(len(parts))  # type: ignore[index]
        update = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)], -1)
        update = update if up_bias is None else update + up_bias[k]
        y = y + scale * (update if router is None else update * router[:, k].view(-1, *[1] * (x.dim() - 1)))  # type: ignore
    return y  # type: ignore[return-value]


def assert_close(
    backend: str, tensors: Tensors, form: Form, needs: tuple[str, ...] = NAMES, scale: float = 0.7, p: float = 0.0
) -> None:
    dtype, device = tensors["x"].dtype, tensors["x"].device  # type: ignore[union-attr]
    dropout = Dropout(torch.tensor([123], device=device), dropouts.threshold(p)) if p else None
    settings = scale, dropout, form.activation
    exact, plain = run(reference, double(tensors), needs, *settings), run(eager, tensors, needs, *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropouts, "draw_seed", lambda device: torch.tensor([123], device=device))
        ours = run(mixture_adapter, tensors, needs, scale, p, form.activation, backend=backend)
    assert ours.keys() == exact.keys()
    for name, found in ours.items():
        assert_as_near(found, plain[name], exact[name], dtype)


# ---- the equation


def test_reference_by_hand() -> None:
    # Two ranks in two groups: the first two channels see the first rank, the others the second.
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    down, down_bias = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), torch.tensor([1.0, -5.0])
    up = torch.tensor([[1.0, 10.0, 100.0, 1000.0], [0.0, 0.0, 1.0, 0.0]])[..., None]
    up_bias, router = torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), torch.tensor([[0.5, 2.0]])
    # h = (2, -1); expert 0 gives (2.5, 20, -100, -1000), expert 1 (0, 1, -1, 0).
    wanted = x + 2 * (0.5 * torch.tensor([2.5, 20.0, -100.0, -1000.0]) + 2 * torch.tensor([0.0, 1.0, -1.0, 0.0]))
    assert torch.equal(reference(x, down, down_bias, up, up_bias, router, 2.0), wanted)
    relu = reference(x, down, down_bias, up, None, router, 1.0, None, "relu")
    assert torch.equal(relu, x + torch.tensor([1.0, 10.0, 0.0, 0.0]))


def test_reference_is_lavin_s_convolutions() -> None:
    form = FORMS[0]
    x, down, down_bias, up, up_bias, router = (t for t in double(some(form)).values() if t is not None)
    h = F.conv1d(x.transpose(1, 2), down[..., None], down_bias)
    y = x.transpose(1, 2)
    for k in range(2):
        y = y + F.conv1d(h, up[k][..., None], up_bias[k], groups=2) * 0.3 * router[:, k, None, None]
    torch.testing.assert_close(reference(x, down, down_bias, up, up_bias, router, 0.3), y.transpose(1, 2))


def test_reference_weights_of_tokens() -> None:
    tensors = double(some(FORMS[0]))
    x, router = tensors["x"], tensors["router"]
    assert x is not None
    assert router is not None
    of_tokens = tensors | {"router": router[:, None].expand(*x.shape[:2], 2)}
    torch.testing.assert_close(run(reference, of_tokens, ()), run(reference, tensors, ()))
    each = torch.rand(*x.shape[:2], 2, dtype=torch.float64)
    alone = [reference(x[:, t], *list(tensors.values())[1:5], each[:, t]) for t in range(x.shape[1])]
    torch.testing.assert_close(reference(x, *list(tensors.values())[1:5], each), torch.stack(alone, 1))


def test_reference_swapping_experts_with_their_weights_changes_nothing() -> None:
    tensors = double(some(FORMS[1]))
    swapped = {
        name: t.flip(-1 if name == "router" else 0) if t is not None and name != "x" else t
        for name, t in tensors.items()
    }
    torch.testing.assert_close(run(reference, swapped, ()), run(reference, tensors, ()))


@pytest.mark.parametrize(
    "form", [Form((2, 3, 8), 4, 2, 2), Form((2, 3, 6), 4, 3, 1, False, "gelu"), Form((2, 6), 2, 1, 1, True, "silu")]
)
def test_gradcheck_of_the_reference(form: Form) -> None:
    tensors = [t if t is None else t.requires_grad_() for t in double(some(form)).values()]
    settings = 0.7, Dropout(torch.tensor([3]), dropouts.threshold(0.3)), form.activation
    assert torch.autograd.gradcheck(lambda *t: reference(*t, *settings), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: reference(*t, *settings), tensors)


def test_merge_is_the_sum_of_the_experts() -> None:
    for form in FORMS:
        tensors = double(some(form))
        x, down, down_bias, up, up_bias, router = tensors.values()
        downs = 1 if form.shared else form.experts
        merged = merge(up, up_bias, router, 0.7, downs).double()  # type: ignore[arg-type]
        h = ACTIVATIONS[form.activation](F.linear(x, down.flatten(0, -2), down_bias.flatten()))  # type: ignore
        h = h.unflatten(-1, (downs, form.groups, -1)).transpose(-3, -2).flatten(-2)  # [B, T, G, P]
        rows = merged[:, :-1].unflatten(-1, (form.groups, -1))  # [B, P, G, H / G]
        y = (
            x
            + torch.einsum("btgp,bpgo->btgo", h, rows.expand(h.shape[0], *rows.shape[1:])).flatten(-2)
            + merged[:, -1:]
        )
        wanted = reference(*tensors.values(), 0.7, None, form.activation)  # type: ignore[arg-type]
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_close_to_float64(backend: str, dtype: torch.dtype, form: Form) -> None:
    assert_close(backend, some(form, dtype), form)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("form", FORMS[:4], ids=str)
def test_dropout_is_the_reference_s(backend: str, dtype: torch.dtype, form: Form) -> None:
    assert_close(backend, some(form, dtype), form, p=0.3)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_generator_alone_decides_what_is_dropped(backend: str) -> None:
    tensors, found = some(FORMS[0]), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(mixture_adapter(*tensors.values(), 1.0, 0.5, backend=backend))  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_ranks_drop_on_a_cpu_what_the_definition_drops(dtype: torch.dtype) -> None:
    """PyTorch's products then, with our kernel between them; unless the reference is asked for."""
    form = Form((2, 70, 96), ranks=40, experts=1, groups=1, activation="relu")
    tensors, found = some(form, dtype), []
    for name in ("x", "up_weight"):
        tensors[name].requires_grad_()  # type: ignore[union-attr]
    for backend in (None, "reference"):
        torch.manual_seed(3)
        y = mixture_adapter(*tensors.values(), 1.0, 0.4, "relu", backend=backend)  # type: ignore[arg-type]
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [tensors["x"], tensors["up_weight"]])])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_does_not_count_whatever_it_holds(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropouts, "draw_seed", lambda device: torch.tensor([5]))
    kept = dropouts.kept(Dropout(torch.tensor([5]), dropouts.threshold(0.5)), 1, 8)[0]
    tensors = some(Form((1, 1, 64)))
    tensors["down_bias"] = torch.where(kept, 1.0, float("inf"))
    output = mixture_adapter(*tensors.values(), 1.0, 0.5, backend=backend)  # type: ignore[arg-type]
    assert output.isfinite().all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [FORMS[1], FORMS[2]._replace(shape=(1, 20, 33), activation="identity")], ids=str)
def test_only_the_gradients_that_are_asked_for(backend: str, form: Form) -> None:
    tensors = some(form)
    names = [name for name in NAMES if tensors[name] is not None]
    everything = run(mixture_adapter, tensors, NAMES, 0.7, 0.0, form.activation, backend=backend)
    for count in range(len(names)):
        for needs in itertools.combinations(names, count):
            found = run(mixture_adapter, tensors, needs, 0.7, 0.0, form.activation, backend=backend)
            assert found.keys() == {"y", *needs}
            torch.testing.assert_close(found, {name: everything[name] for name in found})


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("missing", [("down_bias",), ("up_bias",), ("down_bias", "up_bias")])
def test_without_biases(backend: str, missing: tuple[str, ...]) -> None:
    for form in FORMS[:3]:
        assert_close(backend, some(form) | dict.fromkeys(missing), form)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", INTERPRETED_DTYPES)
def test_any_size_of_x_may_be_zero(backend: str, dtype: torch.dtype) -> None:
    for shape in ((0, 3, 8), (2, 0, 8), (0, 8), (2, 3, 0, 8)):
        for form in (Form(shape), Form(shape, 4, 1, 1)):
            tensors = some(form, dtype)
            ours, wanted = run(mixture_adapter, tensors, backend=backend), run(reference, tensors)
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 48), (2, 3, 4, 48)])
def test_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    for form in (Form(shape), Form(shape, 4, 1, 1)):
        assert_close(backend, some(form), form)


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    groups, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lead = data.draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    # Wide enough for the floor of 1.5 times eager's error to mean something.
    features = groups * data.draw(st.integers(12, 40))
    ranks = groups * data.draw(st.integers(1, 6))
    activation, shared = data.draw(st.sampled_from(sorted(ACTIVATIONS))), data.draw(st.booleans())
    form = Form((*lead, features), ranks, experts, groups, shared, activation)
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    tensors = some(form, dtype, data.draw(st.sampled_from([torch.float32, dtype])))
    order = data.draw(st.permutations(range(len(form.shape))))
    steps = data.draw(st.lists(st.sampled_from([1, 1, 2]), min_size=len(order), max_size=len(order)))
    storage = torch.randn([form.shape[i] * steps[i] for i in order]).to(dtype)
    x = storage.permute([order.index(i) for i in range(len(order))])[tuple(slice(None, None, s) for s in steps)]
    tensors["x"] = x
    for name in ("down_weight", "up_weight"):
        weight = tensors[name]
        if weight is not None and data.draw(st.booleans()):
            tensors[name] = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    before = x.clone()
    assert_close(backend, tensors, form, p=data.draw(st.sampled_from([0.0, 0.4])))
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_stride(backend: str) -> None:
    form = FORMS[1]
    tensors = some(form)
    batch, tokens, features = form.shape
    for grad in (torch.ones(()).expand(form.shape), torch.randn(features, tokens, batch).permute(2, 1, 0)):
        before = grad.clone()
        ours = run(mixture_adapter, tensors, NAMES, 0.7, 0.0, form.activation, grad=grad, backend=backend)
        wanted = run(reference, tensors, NAMES, 0.7, None, form.activation, grad=grad)
        torch.testing.assert_close(ours, wanted)
        assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form", [Form((3, 700, 512)), Form((40, 33, 1024), 8, 3, 2, False, "gelu"), Form((1, 900, 1024), 16, 1, 1)]
)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, form: Form) -> None:
    tensors, threads, results = some(form, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(mixture_adapter, tensors, NAMES, 0.7, 0.0, form.activation, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, wanted in results[0].items():
            assert torch.equal(other[name], wanted), name


def test_backward_twice_gives_the_same(backend: str) -> None:
    for dtype in dtypes_of(backend):
        tensors = some(FORMS[0], dtype, device=DEVICES[backend])
        leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
        y = mixture_adapter(*leaves, 1.0, 0.3, backend=backend)  # type: ignore[arg-type]
        grad = torch.randn_like(y)
        first, second = (torch.autograd.grad(y, leaves, grad, retain_graph=True) for _ in range(2))  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str) -> None:
    # Address space only: 6 GiB of which a few pages are touched.
    storage = torch.empty(3 * 2**30, dtype=torch.float16)
    x = storage.as_strided((3, 1, 32), (2**30 + 32, 32, 1))
    for i in range(3):
        x[i] = i + 1
    down, up = torch.full((1, 32), 1 / 32, requires_grad=True), torch.ones(1, 32, 1)
    y = mixture_adapter(x, down, None, up, None, None, backend=backend)
    y.sum().backward()
    assert y[:, 0, 3].tolist() == [2.0, 4.0, 6.0]
    assert down.grad is not None
    assert down.grad[0, 5].item() == 32 * 6


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*FORMS, Form((4, 2048, 1024)), Form((2, 500, 512), 64, 1, 1, True, "relu")], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gpu_close_to_float64(dtype: torch.dtype, form: Form, p: float) -> None:
    tensors = some(form, dtype, device="cuda")
    assert_close("triton", tensors, form, p=p)
    options = NAMES, 0.7, 0.0, form.activation
    first, second = (run(mixture_adapter, tensors, *options, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "the same bits every time"
