"""gated_cross_attention: every backend against the reference in float64, the reference against OpenFlamingo's form."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    BACKENDS,
    DTYPES,
    INTERPRETED_DTYPES,
    KERNELS,
    TOLERANCE,
    assert_as_near,
    dtypes_of,
    error,
)
from torch import Tensor

from mmfast.ops import BackendUnavailable, explain, extension, gated_cross_attention, products, text_times, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.gated_cross_attention import OP, check, reference

# The module, which the function of the same name hides as an attribute of mmfast.ops.
op_module = importlib.import_module("mmfast.ops.gated_cross_attention")

# B, H, L, T, media_length, D
SHAPES = [
    (2, 3, 37, 4, 9, 17),
    (1, 1, 140, 2, 64, 64),  # several tiles of tokens of one time
    (1, 1, 70, 2, 150, 32),  # several tiles of keys of one medium
    (2, 1, 40, 7, 5, 96),  # several media in a tile of keys
    (3, 2, 1, 2, 8, 16),  # decoding
    (1, 1, 65, 2, 70, 128),
]
MODES = [True, False]
EVERY_BACKEND = [*BACKENDS, "reference"]
Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """query, and keys and values that are halves of one projection's output, as a module has them."""
    batch, heads, length, media, media_length, dim = shape
    query = torch.randn(batch, length, heads, dim, device=device).to(dtype).transpose(1, 2)
    joint = torch.randn(batch, media * media_length, 2, heads, dim, device=device).to(dtype)
    key, value = (half.transpose(1, 2) for half in joint.unbind(2))
    return query, key, value


def some_times(batch: int, length: int, media: int, ordered: bool = True) -> Tensor:
    """Times from 0, before the first medium, to T + 1, which does not exist; the first sample has none at all."""
    times = torch.randint(0, media + 2, (batch, length), generator=torch.Generator().manual_seed(0))
    times[: batch // 2] = 0
    return times.sort(1).values if ordered else times


def run(function: Any, tensors: Any, *arguments: Any, grad: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The output and the gradients of all tensors, for a fixed gradient of the output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = function(*leaves, *arguments, **options)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(output, leaves, grad.to(output))
    assert all(x.dtype == output.dtype and x.shape == y.shape for x, y in zip(grads, leaves, strict=True))
    return [output.detach(), *grads]


def assert_close(backend: str, tensors: Any, *arguments: Any, **options: Any) -> None:
    """Output and gradients are as near to the float64 reference as they must be, and no worse than eager's."""
    exact = run(reference, [x.double() for x in tensors], *arguments, **options)
    eager = run(reference, tensors, *arguments, **options)
    ours = run(gated_cross_attention, tensors, *arguments, backend=backend, **options)
    for found, baseline, wanted in zip(ours, eager, exact, strict=True):
        assert_as_near(found, baseline, wanted, found.dtype)


# ---- the definition


def open_flamingo(
    query: Tensor, key: Tensor, value: Tensor, times: Tensor, media_length: int, only_latest: bool
) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:186-233, between its projections."""
    scores = torch.einsum("bhid,bhjd->bhij", query * query.size(-1) ** -0.5, key)
    media_time = (torch.arange(key.size(2) // media_length) + 1).repeat_interleave(media_length)
    seen = (torch.eq if only_latest else torch.ge)(times[:, None, :, None], media_time)
    scores = scores.masked_fill(~seen, -torch.finfo(scores.dtype).max)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1)
    if only_latest:
        weights = weights.masked_fill((times == 0)[:, None, :, None], 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, value)


@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_leak_is_open_flamingos_form(backend: str, only_latest: bool) -> None:
    tensors, times = inputs((2, 1, 37, 4, 9, 17)), some_times(2, 37, 4)
    exact = run(open_flamingo, [x.double() for x in tensors], times, 9, only_latest)
    double = run(reference, [x.double() for x in tensors], times, 9, only_latest=only_latest, leak=True)
    for found, wanted in zip(double, exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    options = {"only_latest": only_latest, "leak": True, "backend": backend}
    for found, wanted in zip(run(gated_cross_attention, tensors, times, 9, **options), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("only_latest", MODES)
def test_without_leak_it_differs_in_the_rows_that_see_nothing_alone(only_latest: bool) -> None:
    tensors, times = [x.double() for x in inputs((2, 3, 37, 4, 9, 17))], some_times(2, 37, 4)
    ours, theirs = (
        reference(*tensors, times, 9, only_latest=only_latest),
        open_flamingo(*tensors, times, 9, only_latest),
    )
    leaking = times > 4 if only_latest else times == 0
    assert leaking.any() and not leaking.all()
    differs = (ours - theirs).abs().amax((1, 3)) > 1e-12
    assert torch.equal(differs, leaking)
    uniform = tensors[2].mean(2)[:, None].expand(-1, 37, -1, -1)[leaking]
    torch.testing.assert_close(theirs.transpose(1, 2)[leaking], uniform, rtol=1e-12, atol=1e-14)


def test_gradcheck_of_the_reference() -> None:
    times = torch.tensor([[0, 1, 2, 3], [2, 2, 2, 1]])
    tensors = [x.double().requires_grad_() for x in inputs((2, 1, 4, 2, 2, 2))]
    for only_latest, leak in itertools.product(MODES, MODES):
        options = {"only_latest": only_latest, "leak": leak}
        assert torch.autograd.gradcheck(lambda *t, o=options: reference(*t, times, 2, 0.7, **o), tensors)


def test_text_times() -> None:
    locations = torch.tensor([[False, True, False, True, False], [False] * 5])
    times = text_times(locations)
    assert times.dtype == torch.int32
    assert times.tolist() == [[0, 1, 1, 2, 2], [0] * 5]
    # Decoding: the prefix counts, and so does a medium that arrives later.
    past = times[:, -1]
    assert text_times(torch.tensor([[False], [True]]), past).tolist() == [[2], [1]]


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "media_locations is torch.int64; expected torch.bool", (torch.zeros(2, 3, dtype=torch.long),)),
        (ValueError, r"media_locations is \[3\]; expected \[B, L\]", (torch.zeros(3, dtype=torch.bool),)),
        (TypeError, "past is torch.float32; expected an integer", (torch.zeros(2, 3).bool(), torch.zeros(2))),
        (ValueError, r"past is \[3\]; expected \[B\] = \[2\]", (torch.zeros(2, 3).bool(), torch.zeros(3).int())),
    ],
)
def test_bad_locations(kind: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(kind, match=f"text_times: {message}"):
        text_times(*arguments)


# ---- what a token sees


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_who_sees_nothing_gives_zero_and_no_gradient(backend: str, only_latest: bool) -> None:
    tensors, options = inputs((2, 1, 40, 3, 9, 8)), {"only_latest": only_latest, "backend": backend}
    for time in (0, -1, *([4, 2**31 - 1] if only_latest else [])):
        times = torch.full((2, 40), time)
        for found in run(gated_cross_attention, tensors, times, 9, **options):
            assert found.count_nonzero() == 0
    # Beyond the last medium there is all of them to see.
    found = run(gated_cross_attention, tensors, torch.full((2, 40), 2**31 - 1), 9, only_latest=False, backend=backend)
    wanted = run(torch.nn.functional.scaled_dot_product_attention, tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_medium_changes_the_tokens_that_see_it_alone(backend: str, only_latest: bool) -> None:
    (query, key, value), times = inputs((2, 1, 37, 3, 9, 8)), some_times(2, 37, 3, ordered=False)
    options = {"only_latest": only_latest, "backend": backend}
    before = gated_cross_attention(query, key, value, times, 9, **options)
    of_second = slice(9, 18)
    key, value = key.clone(), value.clone()
    key[:, :, of_second], value[:, :, of_second] = torch.randn(2, 1, 9, 8), torch.randn(2, 1, 9, 8)
    differs = (gated_cross_attention(query, key, value, times, 9, **options) - before).abs().amax((1, 3)) > 0
    assert torch.equal(differs, times == 2 if only_latest else times >= 2)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_order_within_a_medium_does_not_matter(backend: str) -> None:
    (query, key, value), times = inputs((1, 2, 40, 2, 70, 16)), some_times(1, 40, 2)
    order = torch.cat([torch.arange(70), 70 + torch.randperm(70)])
    shuffled = gated_cross_attention(query, key[:, :, order], value[:, :, order], times, 70, backend=backend)
    torch.testing.assert_close(shuffled, gated_cross_attention(query, key, value, times, 70, backend=backend))


@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_trailing_media_that_nobody_sees_change_nothing(backend: str, only_latest: bool) -> None:
    tensors, times = inputs((2, 2, 37, 3, 9, 8)), some_times(2, 37, 2).clamp(max=3)
    options = {"only_latest": only_latest, "backend": backend}
    padded = [tensors[0], *(torch.nn.functional.pad(x, (0, 0, 0, 18)) for x in tensors[1:])]
    alone, more = (run(gated_cross_attention, x, times, 9, **options) for x in (tensors, padded))
    more = [more[0], more[1], *(x[:, :, :27] for x in more[2:])]
    torch.testing.assert_close(alone, more, rtol=0, atol=0)


@pytest.mark.parametrize("only_latest", MODES)
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_token_by_token_is_all_at_once(backend: str, only_latest: bool) -> None:
    (query, key, value), options = inputs((2, 1, 12, 3, 9, 8)), {"only_latest": only_latest, "backend": backend}
    locations = torch.zeros(2, 12, dtype=torch.bool)
    locations[0, [1, 4, 9]] = locations[1, [0, 6]] = True
    whole = gated_cross_attention(query, key, value, text_times(locations), 9, **options)
    for token in range(12):
        times = text_times(locations[:, token : token + 1], locations[:, :token].sum(1))
        step = gated_cross_attention(query[:, :, token : token + 1], key, value, times, 9, **options)
        torch.testing.assert_close(step, whole[:, :, token : token + 1])


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("only_latest", MODES)
def test_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], only_latest: bool) -> None:
    batch, _, length, media, media_length, _ = shape
    assert_close(backend, inputs(shape, dtype), some_times(batch, length, media), media_length, only_latest=only_latest)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrower_vectors(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "VECTOR_BITS", bits)
    for only_latest in MODES:
        assert_close("cpu", inputs((2, 3, 37, 4, 9, 17), dtype), some_times(2, 37, 4), 9, only_latest=only_latest)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("empty", range(4))
def test_any_size_but_that_of_a_head_may_be_zero(backend: str, empty: int) -> None:
    shape = [2, 3, 4, 2, 6, 8]
    shape[empty] = 0
    tensors, times = inputs(tuple(shape)), some_times(shape[0], shape[2], 2)
    for only_latest, leak in itertools.product(MODES, MODES):
        options = {"only_latest": only_latest, "leak": leak}
        found = run(gated_cross_attention, tensors, times, 6, backend=backend, **options)
        torch.testing.assert_close(found, run(reference, tensors, times, 6, **options))
        assert shape[3] > 0 or not any(x.any() for x in found)


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_dtype_and_times(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    # With one key, and in 16 bits with few dimensions, gradients of query and key are nothing but rounding.
    length, media, media_length = data.draw(st.tuples(st.integers(8, 70), st.integers(1, 4), st.integers(4, 40)))
    dim = data.draw(st.integers(1 if dtype == torch.float32 else 8, 40))

    def tensor(rows: int) -> Tensor:
        order = data.draw(st.permutations(range(3)))
        sizes = [(batch, heads, rows)[i] for i in order]
        steps = data.draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 3))
        storage = torch.randn(*(n * step for n, step in zip(sizes, steps, strict=True)), dim + 3).to(dtype)
        strided = storage[:: steps[0], :: steps[1], :: steps[2], 2 : 2 + dim]
        return strided.permute(*(order.index(i) for i in range(3)), 3)

    tensors = tensor(length), tensor(media * media_length), tensor(media * media_length)
    times = some_times(batch, length, media, ordered=data.draw(st.booleans()))
    times = times.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    if data.draw(st.booleans()):
        times = times.t().contiguous().t()
    before = [x.clone() for x in (*tensors, times)]
    scale = data.draw(st.sampled_from([None, 0.0, 0.3, -0.5]))
    options = {"only_latest": data.draw(st.booleans()), "leak": data.draw(st.booleans())}
    exact = run(reference, [x.double() for x in tensors], times, media_length, scale, **options)
    ours = run(gated_cross_attention, tensors, times, media_length, scale, backend=backend, **options)
    for found, wanted in zip(ours, exact, strict=True):
        assert error(found, wanted) <= TOLERANCE[dtype]
    assert all(torch.equal(x, y) for x, y in zip((*tensors, times), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    (query, *keys), times = inputs((1, 1, 9, 2, 50, 16)), some_times(1, 9, 2)
    assert_close(backend, (query * 4, *keys), times, 50)
    # Weights of 0 and 1, sums of exponentials far beyond fp32; so in backward where a token does not see a key.
    huge = (query * 1000, *keys)
    for only_latest in MODES:
        output, *grads = run(gated_cross_attention, huge, times, 50, backend=backend, only_latest=only_latest)
        torch.testing.assert_close(output, reference(*huge, times, 50, only_latest=only_latest), rtol=1e-3, atol=1e-3)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_stride(backend: str) -> None:
    tensors, times = inputs((2, 3, 4, 2, 9, 8)), some_times(2, 4, 2)
    ones = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 8)
    transposed = torch.randn(2, 3, 8, 4, dtype=torch.float64).transpose(2, 3)
    for grad in (ones, transposed):
        ours = run(gated_cross_attention, tensors, times, 9, grad=grad, backend=backend)
        torch.testing.assert_close(ours, run(reference, tensors, times, 9, grad=grad))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(3))
def test_frozen_inputs_get_no_gradient(backend: str, wanted: int) -> None:
    tensors, times = inputs((2, 1, 40, 3, 9, 8)), some_times(2, 40, 3)
    for only_latest in MODES:
        options = {"only_latest": only_latest, "backend": backend}
        everything = run(gated_cross_attention, tensors, times, 9, **options)
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors)]
        output = gated_cross_attention(*leaves, times, 9, **options)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        output.backward(grad.float())
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]
        assert torch.equal(leaves[wanted].grad, everything[1 + wanted])


@pytest.mark.parametrize("only_latest", MODES)
def test_threads_do_not_change_a_bit(only_latest: bool) -> None:
    tensors, times = inputs((2, 4, 300, 5, 64, 40)), some_times(2, 300, 5)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(gated_cross_attention, tensors, times, 64, only_latest=only_latest, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str) -> None:
    # Address space only: 6 GiB of which a few pages are touched.
    storage = torch.empty(3 * 2**30, dtype=torch.float16)
    key = storage.as_strided((1, 1, 3, 16), (16, 16, 2**30 + 32, 1))
    value = storage[16:].as_strided((1, 1, 3, 16), (16, 16, 2**30 + 32, 1))
    for n in range(3):
        key[:, :, n], value[:, :, n] = float(n), 1.0 + n
    query, times = torch.ones(1, 1, 2, 16, dtype=torch.float16), torch.tensor([[1, 3]])
    for only_latest in MODES:
        arguments: dict[str, Any] = {"text_time": times, "media_length": 1, "scale": 0.1, "only_latest": only_latest}
        found = gated_cross_attention(query, key, value, **arguments, backend=backend)
        torch.testing.assert_close(found, reference(query, key.contiguous(), value.contiguous(), **arguments))


# ---- the op in PyTorch


@pytest.mark.parametrize("only_latest", MODES)
def test_opcheck(only_latest: bool) -> None:
    (query, key, value), times = inputs((2, 2, 4, 2, 9, 8)), some_times(2, 4, 2).int()
    ops, keys = torch.ops.mmfast, (key, value, times, 9, 0.3, only_latest)
    torch.library.opcheck(ops.gated_cross_attention_fwd.default, (query, *keys, "cpu"))
    out, lse = ops.gated_cross_attention_fwd(query, *keys, "cpu")
    arguments = (torch.randn_like(out), query, out, lse, *keys, [True, False, True], "cpu")
    torch.library.opcheck(ops.gated_cross_attention_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(gated_cross_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, leak in ((9, False), (12, True)):
        tensors, times = inputs((2, 2, length, 3, 9, 8)), some_times(2, length, 3)
        options = {"leak": leak, "backend": "cpu"}
        torch.testing.assert_close(
            run(compiled, tensors, times, 9, **options), run(gated_cross_attention, tensors, times, 9, **options)
        )


def test_saves_inputs_output_and_one_number_a_token() -> None:
    saved: list[Tensor] = []
    tensors, times = [x.requires_grad_() for x in inputs((2, 3, 4, 2, 9, 8))], some_times(2, 4, 2).int()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = gated_cross_attention(*tensors, times, 9, backend="cpu")
    known = {x.data_ptr() for x in (*tensors, times, output)}
    extra = [x for x in saved if x.data_ptr() not in known]
    assert [(x.shape, x.dtype) for x in extra] == [((2, 3, 4), torch.float32)]


def test_no_gradient_where_none_is_wanted() -> None:
    tensors, times = inputs((2, 1, 4, 2, 9, 8)), some_times(2, 4, 2)
    assert not gated_cross_attention(*tensors, times, 9, backend="cpu").requires_grad
    with torch.no_grad():
        leaves = [x.requires_grad_() for x in tensors]
        assert not gated_cross_attention(*leaves, times, 9, backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    tensors = [x.requires_grad_() for x in inputs((1, 1, 2, 2, 3, 4))]
    output = gated_cross_attention(*tensors, torch.tensor([[1, 2]]), 3, backend="cpu")
    grad = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, tensors[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_as_attention_does(backend: str) -> None:
    tensors, times = inputs((2, 2, 4, 2, 9, 8)), some_times(2, 4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gated_cross_attention(*tensors, times, 9, backend=backend)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, gated_cross_attention(*(x.bfloat16() for x in tensors), times, 9, backend=backend))


def test_outputs_lie_as_projections_take_them() -> None:
    for found in run(gated_cross_attention, inputs((2, 3, 4, 2, 9, 8)), some_times(2, 4, 2), 9, backend="cpu"):
        assert found.transpose(1, 2).is_contiguous()


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def call(
    dim: int = 64, dtype: torch.dtype = torch.bfloat16, stride: int = 1, length: int = 100, media_length: int = 16,
    grad: bool = False,
) -> Any:  # fmt: skip
    """A call on 128 rows of media whose tensors take no memory."""
    query, key = (torch.empty(64, dtype=dtype).as_strided((2, 8, n, dim), (0, 0, 0, stride)) for n in (length, 128))
    return check(query.requires_grad_(grad), key, key, torch.zeros(2, length, dtype=torch.int32), media_length)


@pytest.fixture
def matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has some, which the kernels do not know."""
    monkeypatch.setattr(products, "_has_products", lambda dtype: True)
    monkeypatch.setattr(extension, "has_amx", lambda: False)


@pytest.mark.usefixtures("matrix_instructions")
@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        (call(length=1), "cpu"),
        (call(length=1, media_length=128), "reference"),  # a token in the place of 32
        (call(length=1, media_length=128, dtype=torch.float32, grad=True), "reference"),
        (call(length=320, media_length=128), "reference"),  # one medium, so that nothing is saved
        (call(length=320, media_length=128, grad=True), "cpu"),
        (call(length=320, media_length=128, dtype=torch.float32), "cpu"),
        (call(length=640), "cpu"),
    ],
)
def test_the_reference_runs_where_the_kernel_saves_nothing(asked: Any, chosen: str) -> None:
    assert OP.select(asked, Machine("cpu")) == chosen


@pytest.mark.usefixtures("matrix_instructions")
def test_kernels_in_tiles_do_not_yield_to_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "has_amx", lambda: True)
    asked = call(length=320, media_length=128)
    assert OP.select(asked, Machine("cpu")) == "cpu"
    half = call(length=320, media_length=128, dtype=torch.float16)
    assert OP.select(half, Machine("cpu")) == "reference"


@pytest.mark.parametrize(
    ("asked", "on", "request_", "chosen"),
    [
        (call(), Machine("cpu"), None, "cpu"),
        (call(dtype=torch.float64), Machine("cpu"), None, "reference"),
        (call(dim=257, stride=0), Machine("cpu"), None, "reference"),
        (call(stride=0), Machine("cpu"), None, "reference"),
        (call(), Machine("cpu"), "reference", "reference"),
        (call(), Machine("cpu", no_extension="not built"), None, "reference"),
        (call(), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (call(), H200, None, "triton"),
        (call(dim=129, stride=0), H200, None, "reference"),
        (call(dtype=torch.float64), H200, None, "reference"),
        (call(), Machine("cuda", (7, 5)), None, "reference"),
        (call(), Machine("mps"), None, "reference"),
    ],
)
def test_selection(asked: Any, on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(asked, on, request_) == chosen


@pytest.mark.parametrize(
    ("asked", "on", "request_", "reason"),
    [
        (call(dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (call(dim=257, stride=0), Machine("cpu"), "cpu", "D is 257; the kernel takes at most 256"),
        (call(stride=0), Machine("cpu"), "cpu", "the last dimension of query has stride 0; the kernel needs 1"),
        (call(), Machine("cpu"), "triton", "TRITON_INTERPRET is not set"),
        (call(dim=129, stride=0), H200, "triton", "D is 129; the kernel takes at most 128"),
        (call(), H200, "cuda", "has no 'cuda' backend"),
    ],
)
def test_impossible_request(asked: Any, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"gated_cross_attention: .*{reason}"):
        OP.select(asked, on, request_)


def test_explain() -> None:
    tensors = [x.double() for x in inputs((1, 1, 2, 1, 3, 4))]
    assert explain(gated_cross_attention, *tensors, torch.tensor([[0, 1]]), 3).splitlines() == [
        "gated_cross_attention runs on: reference",
        "  cpu: there is no float64 kernel",
        "  triton: there is no float64 kernel",
    ]


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    fwd = op_module._FWD
    monkeypatch.setattr(op_module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(op_module, "reference", lambda *a, **b: ran.append("reference") or reference(*a, **b))
    tensors, times = inputs((2, 1, 3, 2, 2, 8)), some_times(2, 3, 2)
    gated_cross_attention(*tensors, times, 2, backend=backend)
    with use_backend(backend):
        gated_cross_attention(*tensors, times, 2)
    assert ran == [backend, backend]


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (ValueError, r"query is \[3, 4, 8\]; expected", {"query": torch.zeros(3, 4, 8)}),
        (ValueError, r"query is \[2, 3, 4, 0\]; expected .* D > 0", {"query": torch.zeros(2, 3, 4, 0)}),
        (ValueError, r"key is \[2, 1, 6, 8\], value .* = \[2, 3, T · 3, 8\]", {"key": torch.zeros(2, 1, 6, 8)}),
        (ValueError, r"value \[2, 3, 5, 8\]", {"value": torch.zeros(2, 3, 5, 8)}),
        (ValueError, "media_length is 4 and key .* a divisor of the 6 rows", {"media_length": 4}),
        (ValueError, "media_length is 0", {"media_length": 0}),
        (TypeError, "text_time is torch.float32; expected torch.int32", {"text_time": torch.zeros(2, 4)}),
        (ValueError, r"text_time is \[2, 5\] .* = \[2, 4\]", {"text_time": torch.zeros(2, 5).int()}),
        (TypeError, "query is torch.int64; expected one of", {"query": torch.zeros(2, 3, 4, 8).long()}),
        (TypeError, "query is torch.float32 and value is torch.float16", {"value": torch.zeros(2, 3, 6, 8).half()}),
        (ValueError, "text_time is on meta but query on cpu", {"text_time": torch.zeros(2, 4).int().to("meta")}),
    ],
)
def test_bad_arguments(kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    query, key, value = inputs((2, 3, 4, 2, 3, 8))
    arguments = {"query": query, "key": key, "value": value, "text_time": some_times(2, 4, 2), "media_length": 3}
    with pytest.raises(kind, match=f"gated_cross_attention: .*{message}"):
        gated_cross_attention(**(arguments | change))


def test_cpp_checks_what_it_is_given() -> None:
    tensors = (*inputs((1, 2, 3, 2, 4, 8)), torch.zeros(1, 3, dtype=torch.int32))
    settings_, out, lse = (4, 1.0, True), torch.empty(1, 2, 3, 8), torch.empty(1, 2, 3)

    def refuses(message: str, position: int, wrong: Tensor) -> None:
        given = [extension.view(x) for x in (*tensors, out, lse)]
        given[position] = extension.view(wrong)
        with pytest.raises(ValueError, match=message):
            extension.module().gated_cross_attention_fwd_cpu(*given[:4], *settings_, *given[4:], 512, 1)

    refuses(r"lse is float32\[1, 2, 4\]; expected float32\[1, 2, 3\]", 5, torch.empty(1, 2, 4))
    refuses(r"value is float32\[1, 2, 8, 7\]; expected float32\[1, 2, 8, 8\]", 2, tensors[2][..., :7])
    refuses(r"text_time is int64\[1, 3\]; expected int32\[1, 3\]", 3, tensors[3].long())
    refuses(r"key is float32\[1, 2, 7, 8\], of media of 4", 1, tensors[1][:, :, :7])


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.gated_cross_attention")
    blocks = "BLOCK_M", "BLOCK_N", "BLOCK_D", "ONLY_LATEST"
    listed = {
        (case["fn"].__name__, *(case["constexprs"][name] for name in blocks), case["num_warps"], case["num_stages"])
        for case in kernels.compile_cases()
    }
    for length, dim, size, only_latest in itertools.product((1, 33, 300), (1, 33, 64, 100, 128), (2, 4), MODES):
        backward = kernels.backward_tile(dim, size)
        for name, tile in (
            ("_fwd_kernel", kernels.forward_tile(length, dim, size)),
            ("_bwd_query_kernel", backward),
            ("_bwd_key_kernel", backward),
        ):
            launched = tile.queries, tile.keys, kernels.padded(dim), only_latest, tile.num_warps, tile.num_stages
            assert (name, *launched) in listed


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dtypes_of("triton"))
@pytest.mark.parametrize("shape", [*SHAPES, (8, 8, 2048, 8, 64, 64)])
@pytest.mark.parametrize("only_latest", MODES)
def test_gpu_close_to_float64(dtype: torch.dtype, shape: tuple[int, ...], only_latest: bool) -> None:
    batch, _, length, media, media_length, _ = shape
    arguments = inputs(shape, dtype, "cuda"), some_times(batch, length, media).cuda(), media_length
    assert_close("triton", *arguments, only_latest=only_latest)
    options = {"only_latest": only_latest, "backend": "triton"}
    first, second = (run(gated_cross_attention, *arguments, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same bits every time"


@pytest.mark.gpu
def test_gpu_sanitizer() -> None:
    for only_latest in MODES:
        tensors = inputs((2, 2, 90, 3, 50, 72), torch.float16, "cuda")
        assert_close("triton", tensors, some_times(2, 90, 3).cuda(), 50, only_latest=only_latest)
