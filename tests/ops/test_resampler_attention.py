"""resampler_attention: every backend against the reference in float64, the reference against the published form."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near, dtypes_of
from torch import Tensor

from mmfast.ops import BackendUnavailable, crossovers, explain, extension, products, resampler_attention, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.resampler_attention import LEAST, OP, check, reference

# The module, which the function of the same name hides as an attribute of mmfast.ops.
op_module = importlib.import_module("mmfast.ops.resampler_attention")

# B, H, Q, N, Q2 (None: no latents), D
SHAPES = [
    (2, 3, 5, 37, 4, 17),
    (1, 2, 64, 130, 64, 64),
    (1, 1, 70, 1100, 3, 32),  # several tiles of queries, several parts of the media
    (2, 2, 9, 65, None, 96),  # no latents
    (1, 2, 3, 0, 4, 8),  # no media
    (3, 2, 8, 1, 1, 16),
    (1, 2, 40, 9, 2, 1),
    (1, 1, 33, 200, 70, 128),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def inputs(shape: tuple[Any, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
    """query, and keys and values that are halves of one projection's output, as a module has them."""
    batch, heads, queries, media, latents, dim = shape

    def halves(length: int) -> list[Tensor]:
        joint = torch.randn(batch, length, 2, heads, dim, device=device).to(dtype)
        return [half.transpose(1, 2) for half in joint.unbind(2)]

    query = torch.randn(batch, queries, heads, dim, device=device).to(dtype).transpose(1, 2)
    return (query, *halves(media), *([None, None] if latents is None else halves(latents)))  # type: ignore[return-value]


def some_mask(batch: int, media: int) -> Tensor:
    """Ragged: the first sample has no media at all, the others have holes."""
    mask = torch.rand(batch, media, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:1] = False
    return mask


def run(function: Any, tensors: Any, mask: Tensor | None = None, grad: Tensor | None = None, **options: Any) -> Any:
    """The output and the gradients of all tensors, for a fixed gradient of the output."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    output = function(*leaves, mask, **options)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(output, wanted, grad.to(output))
    assert all(x.dtype == output.dtype and x.shape == y.shape for x, y in zip(grads, wanted, strict=True))
    return [output.detach(), *grads]


def assert_close(backend: str, tensors: Any, mask: Tensor | None = None, **options: Any) -> None:
    """Output and gradients are as near to the float64 reference as they must be, and no worse than eager's."""
    exact = run(reference, [None if x is None else x.double() for x in tensors], mask, **options)
    eager = run(reference, tensors, mask, **options)
    ours = run(resampler_attention, tensors, mask, backend=backend, **options)
    for found, baseline, wanted in zip(ours, eager, exact, strict=True):
        assert_as_near(found, baseline, wanted, found.dtype)


# ---- the definition


def open_flamingo(query: Tensor, *keys: Any) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:41-65, between its projections."""
    media_key, media_value, latent_key, latent_value, *_ = keys
    query = query * query.size(-1) ** -0.5
    key, value = torch.cat((media_key, latent_key), -2), torch.cat((media_value, latent_value), -2)
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def test_reference_is_open_flamingos_form() -> None:
    tensors = [x.double() for x in inputs((2, 3, 5, 37, 4, 17)) if x is not None]
    for found, wanted in zip(run(reference, tensors), run(open_flamingo, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_reference_leaves_masked_media_out() -> None:
    query, *keys = (x.double() for x in inputs((1, 2, 3, 7, 2, 8)) if x is not None)
    mask = torch.tensor([[True, False, True, True, False, False, True]])
    kept = [key[:, :, mask[0]] for key in keys[:2]]
    torch.testing.assert_close(reference(query, *keys, mask), reference(query, *kept, *keys[2:]))


def test_gradcheck_of_the_reference() -> None:
    for latents, masked in itertools.product((None, 2), (False, True)):
        tensors = [None if x is None else x.double().requires_grad_() for x in inputs((2, 1, 2, 3, latents, 2))]
        mask = some_mask(2, 3) if masked else None
        assert torch.autograd.gradcheck(lambda *t, m=mask: reference(*t, m, 0.7), tensors)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_order_of_media_does_not_matter(backend: str) -> None:
    query, key, value, *latents = inputs((1, 2, 6, 80, 5, 16))
    order = torch.randperm(80)
    shuffled = resampler_attention(query, key[:, :, order], value[:, :, order], *latents, backend=backend)
    torch.testing.assert_close(shuffled, resampler_attention(query, key, value, *latents, backend=backend))


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[Any, ...], masked: bool) -> None:
    assert_close(backend, inputs(shape, dtype), some_mask(shape[0], shape[3]) if masked else None)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrower_vectors(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_module, "VECTOR_BITS", bits)
    assert_close("cpu", inputs((1, 2, 70, 130, 33, 40), dtype), some_mask(1, 130))
    assert_close("cpu", inputs((2, 3, 5, 37, 4, 17), dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("empty", range(5))
def test_any_size_but_that_of_a_head_may_be_zero(backend: str, empty: int) -> None:
    shape = [2, 3, 4, 5, 6, 8]
    shape[empty] = 0
    for masked in (False, True):
        mask = some_mask(shape[0], shape[3]) if masked else None
        tensors = inputs(tuple(shape))
        torch.testing.assert_close(
            run(resampler_attention, tensors, mask, backend=backend), run(reference, tensors, mask)
        )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("media", [0, 3, 70])
@pytest.mark.parametrize("latents", [None, 0])
def test_who_sees_nothing_gives_zero_and_no_gradient(backend: str, media: int, latents: int | None) -> None:
    tensors = inputs((2, 2, 5, media, latents, 8))
    mask = torch.zeros(2, media, dtype=torch.bool)
    for found in run(resampler_attention, tensors, mask, backend=backend):
        assert found.count_nonzero() == 0
    if media == 0:
        assert not any(x.any() for x in run(resampler_attention, tensors, backend=backend))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("latents", [None, 4])
def test_masked_media_leak_nowhere(backend: str, garbage: float, latents: int | None) -> None:
    tensors, mask = inputs((3, 2, 5, 150, latents, 16)), some_mask(3, 150)
    mask[1, 64:] = False  # whole tiles of padding
    clean = run(resampler_attention, tensors, mask, backend=backend)
    padding = (~mask)[:, None, :, None]
    dirty_media = [x.masked_fill(padding, garbage) for x in tensors[1:3] if x is not None]
    dirty = run(resampler_attention, (tensors[0], *dirty_media, *tensors[3:]), mask, backend=backend)
    torch.testing.assert_close(clean, dirty, rtol=0, atol=0)
    assert all(not grad.masked_select(padding).any() for grad in clean[2:4])


@settings(derandomize=True, database=None, deadline=None, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_dtype_and_mask(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    batch, heads, dim = (data.draw(st.integers(1, most)) for most in (3, 3, 40))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))

    def tensor(length: int) -> Tensor:
        order = data.draw(st.permutations(range(3)))
        sizes = [(batch, heads, length)[i] for i in order]
        steps = data.draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 3))
        storage = torch.randn(*(n * step for n, step in zip(sizes, steps, strict=True)), dim + 3).to(dtype)
        strided = storage[:: steps[0], :: steps[1], :: steps[2], 2 : 2 + dim]
        return strided.permute(*(order.index(i) for i in range(3)), 3)

    media = data.draw(st.integers(0, 90))
    latents = data.draw(st.none() | st.integers(0, 70))
    query = tensor(data.draw(st.integers(1, 70)))
    if data.draw(st.booleans()):  # learned queries, shared by the batch
        query = query[:1].expand(batch, -1, -1, -1)
    keys = tensor(media), tensor(media), *([None] * 2 if latents is None else [tensor(latents) for _ in range(2)])
    mask = data.draw(st.sampled_from([None, some_mask(batch, media), ~some_mask(batch, media)]))
    before = [None if x is None else x.clone() for x in (query, *keys)]
    assert_close(backend, (query, *keys), mask, scale=data.draw(st.sampled_from([None, 0.0, 0.3, -0.5])))
    assert all(x is None or torch.equal(x, y) for x, y in zip((query, *keys), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores(backend: str) -> None:
    query, *keys = inputs((1, 1, 4, 100, 3, 16))
    assert_close(backend, (query * 4, *keys))
    # Weights of 0 and 1, sums of exponentials far beyond fp32.
    huge = (query * 1000, *keys)
    output, *grads = run(resampler_attention, huge, backend=backend)
    torch.testing.assert_close(output, reference(*huge), rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_stride(backend: str) -> None:
    tensors = inputs((2, 3, 4, 9, 2, 8))
    ones = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 8)
    transposed = torch.randn(2, 3, 8, 4, dtype=torch.float64).transpose(2, 3)
    for grad in (ones, transposed):
        ours = run(resampler_attention, tensors, grad=grad, backend=backend)
        torch.testing.assert_close(ours, run(reference, tensors, grad=grad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", range(5))
def test_frozen_inputs_get_no_gradient(backend: str, wanted: int) -> None:
    tensors = inputs((2, 1, 4, 70, 3, 8))
    everything = run(resampler_attention, tensors, backend=backend)
    leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(tensors) if x is not None]
    output = resampler_attention(*leaves, backend=backend)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.float())
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i == wanted)
    assert torch.equal(leaves[wanted].grad, everything[1 + wanted])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    tensors, threads = inputs((2, 4, 66, 1100, 40, 40), dtype), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(resampler_attention, tensors, some_mask(2, 1100), backend="cpu"))
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
    query = torch.ones(1, 1, 2, 16, dtype=torch.float16)
    output = resampler_attention(query, key, value, scale=0.1, backend=backend)
    torch.testing.assert_close(output, reference(query, key.contiguous(), value.contiguous(), scale=0.1))


# ---- the op in PyTorch


@pytest.mark.parametrize("latents", [None, 3])
def test_opcheck(latents: int | None) -> None:
    tensors, mask = inputs((2, 2, 4, 9, latents, 8)), some_mask(2, 9)
    ops = torch.ops.mmfast
    torch.library.opcheck(ops.resampler_attention_fwd.default, (*tensors, mask, 0.3, "cpu"))
    out, lse = ops.resampler_attention_fwd(*tensors, mask, 0.3, "cpu")
    needs = [x is not None for x in tensors]
    arguments = (torch.randn_like(out), tensors[0], out, lse, *tensors[1:], mask, 0.3, needs, "cpu")
    torch.library.opcheck(ops.resampler_attention_bwd.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(resampler_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for media in (9, 12):
        tensors, mask = inputs((2, 2, 4, media, 3, 8)), some_mask(2, media)
        torch.testing.assert_close(
            run(compiled, tensors, mask, backend="cpu"), run(resampler_attention, tensors, mask, backend="cpu")
        )


def test_saves_inputs_output_and_one_number_a_query() -> None:
    saved: list[Tensor] = []
    tensors = [x.requires_grad_() for x in inputs((2, 3, 4, 9, 5, 8)) if x is not None]
    mask = some_mask(2, 9)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = resampler_attention(*tensors, mask, backend="cpu")
    known = {x.data_ptr() for x in (*tensors, mask, output)}
    extra = [x for x in saved if x.data_ptr() not in known]
    assert [(x.shape, x.dtype) for x in extra] == [((2, 3, 4), torch.float32)]


def test_no_gradient_where_none_is_wanted() -> None:
    tensors = [x for x in inputs((2, 1, 4, 9, 5, 8)) if x is not None]
    assert not resampler_attention(*tensors, backend="cpu").requires_grad
    with torch.no_grad():
        assert not resampler_attention(*(x.requires_grad_() for x in tensors), backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    tensors = [x.requires_grad_() for x in inputs((1, 1, 2, 3, 2, 4)) if x is not None]
    output = resampler_attention(*tensors, backend="cpu")
    grad = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, tensors[0], grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_casts_as_attention_does(backend: str) -> None:
    tensors = inputs((2, 2, 4, 9, 3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = resampler_attention(*tensors, backend=backend)
    assert found.dtype == torch.bfloat16
    half = [None if x is None else x.bfloat16() for x in tensors]
    assert torch.equal(found, resampler_attention(*half, backend=backend))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_without_gradients_the_result_is_the_same(
    shape: tuple[Any, ...], dtype: torch.dtype, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in LEAST:
        monkeypatch.setitem(LEAST, key, 0 if chosen == "cpu" else crossovers.NEVER)
    tensors = inputs(shape, dtype)
    with torch.no_grad():
        expected = [resampler_attention(*tensors, scale=scale, backend=chosen) for scale in (None, 0.3)]
        if tensors[1].numel():
            monkeypatch.setattr(op_module, "check", None)  # the call goes by it
        found = [resampler_attention(*tensors, scale=scale) for scale in (None, 0.3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_without_gradients_nothing_else_is_taken_for_such_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in LEAST:
        monkeypatch.setitem(LEAST, key, 0)
    ran: list[Any] = []
    monkeypatch.setattr(op_module, "_fwd_cpu", lambda *arguments: ran.append(arguments))
    query, key, value, *_ = tensors = inputs((1, 2, 6, 6, None, 8))
    across = key.contiguous().transpose(2, 3).contiguous().transpose(2, 3)  # the last stride is not 1
    resampler_attention(query, across, value)
    resampler_attention(*(None if x is None else x.double() for x in tensors))  # type: ignore[arg-type]
    resampler_attention(*tensors, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        assert resampler_attention(*tensors).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="latent_key is given alone"):
        resampler_attention(query, key, value, key)
    with pytest.raises(ValueError, match="media_key is"):
        resampler_attention(query, key[:, :1], value)
    with pytest.raises(TypeError, match="expected one dtype"):
        resampler_attention(query, key.bfloat16(), value)
    assert ran == []


def test_outputs_lie_as_projections_take_them() -> None:
    tensors = inputs((2, 3, 4, 9, 5, 8))
    for found in run(resampler_attention, tensors, backend="cpu"):
        assert found.transpose(1, 2).is_contiguous()


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def vast(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor that takes no memory."""
    return torch.empty(shape[-1], dtype=dtype).expand(shape)


def call(queries: int = 64, media: int = 600, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    key = vast(2, 8, media, dim, dtype=dtype)
    return check(vast(2, 8, queries, dim, dtype=dtype), key, key)


def strided() -> Any:
    key = vast(2, 8, 64, 600).transpose(2, 3)
    return check(vast(2, 8, 64, 64), key, key)


@pytest.mark.parametrize(
    ("asked", "on", "request_", "chosen"),
    [
        (call(dtype=torch.float32), Machine("cpu"), None, "cpu"),
        (call(dtype=torch.float64), Machine("cpu"), None, "reference"),
        (call(dim=257), Machine("cpu"), None, "reference"),
        (strided(), Machine("cpu"), None, "reference"),
        (call(1, 1, dtype=torch.float32), Machine("cpu"), None, "reference"),
        (call(16, 256, dtype=torch.float32), Machine("cpu"), None, "reference"),
        (call(16, 512, dtype=torch.float32), Machine("cpu"), None, "cpu"),
        (call(1, 1), Machine("cpu"), None, "reference"),
        (call(1, 1), Machine("cpu"), "cpu", "cpu"),
        (call(), Machine("cpu", no_extension="not built"), None, "reference"),
        (call(), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (call(), H200, None, "triton"),
        (call(dim=129), H200, None, "reference"),
        (call(dtype=torch.float64), H200, None, "reference"),
        (call(), Machine("cuda", (7, 5)), None, "reference"),
        (call(), Machine("mps"), None, "reference"),
    ],
)
def test_selection(asked: Any, on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(asked, on, request_) == chosen


@pytest.mark.parametrize("amx", [False, True])
def test_the_reference_keeps_what_its_matrix_instructions_win(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "has_amx", lambda: amx)
    monkeypatch.setattr(products, "multiplies_16_bit", lambda dtype, backend: True)
    for dtype, chosen in ((torch.bfloat16, "cpu" if amx else "reference"), (torch.float16, "reference")):
        assert OP.select(call(media=300, dtype=dtype), Machine("cpu"), None) == chosen
    monkeypatch.setattr(products, "multiplies_16_bit", lambda dtype, backend: False)
    assert OP.select(call(), Machine("cpu"), None) == "cpu"


@pytest.mark.parametrize(
    ("asked", "on", "request_", "reason"),
    [
        (call(dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (call(dim=257), Machine("cpu"), "cpu", "D is 257; the kernel takes at most 256"),
        (strided(), Machine("cpu"), "cpu", "the last dimension of media_key has stride 0; the kernel needs 1"),
        (call(), Machine("cpu"), "triton", "TRITON_INTERPRET is not set"),
        (call(dim=129), H200, "triton", "D is 129; the kernel takes at most 128"),
        (call(), H200, "cuda", "has no 'cuda' backend"),
    ],
)
def test_impossible_request(asked: Any, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"resampler_attention: .*{reason}"):
        OP.select(asked, on, request_)


def test_explain() -> None:
    tensors = inputs((1, 1, 2, 3, None, 4))
    assert explain(resampler_attention, *tensors).splitlines() == [
        "resampler_attention runs on: reference",
        "  cpu: B · H · Q · (N + Q2) · D is 24; below 8388608 the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    fwd = op_module._FWD
    monkeypatch.setattr(op_module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(op_module, "reference", lambda *a: ran.append("reference") or reference(*a))
    tensors = inputs((2, 1, 3, 4, 2, 8))
    resampler_attention(*tensors, backend=backend)
    with use_backend(backend):
        resampler_attention(*tensors)
    assert ran == [backend, backend]


def test_a_small_call_takes_the_reference_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(op_module, "check", lambda *a: checked.append(a) or check(*a))
    small = inputs((2, 1, 3, 4, 2, 8))
    assert torch.equal(resampler_attention(*small), reference(*small))
    assert not checked
    large = inputs((1, 4, 64, 1000, 24, 64))  # 16.8 million products
    resampler_attention(*large)
    assert not checked  # nor does a large one need a check, unless media are masked
    resampler_attention(*large, torch.ones(1, 1000, dtype=torch.bool))
    assert len(checked) == 1


@pytest.mark.parametrize("large", [False, True])
def test_errors(large: bool) -> None:
    heads = 64 if large else 1
    query, key, value, latent_key, latent_value = inputs((2, heads, 16, 40, 3, 32))
    assert latent_key is not None
    assert latent_value is not None

    def refuses(error: type[Exception], message: str, *arguments: Any) -> None:
        with pytest.raises(error, match=f"resampler_attention: {message}"):
            resampler_attention(*arguments)

    refuses(ValueError, r"query is \[16, 32\]; expected \[B, H, Q, D\]", query[0, 0], key, value)
    refuses(ValueError, "latent_key is given alone; give", query, key, value, latent_key)
    refuses(ValueError, "latent_value is given alone; give", query, key, value, None, latent_value)
    refuses(ValueError, r"media_key is .*, 39, 32\], media_value .*, 40, 32\] and", query, key[:, :, 1:], value)
    refuses(ValueError, r"latent_key is \[1, .* expected both \[B, H, Q2", query, key, value, latent_key[:1],
            latent_value[:1])  # fmt: skip
    refuses(TypeError, "query is torch.int64", query.long(), key.long(), value.long())
    refuses(TypeError, "query is torch.float32 and media_key is torch.bfloat16", query, key.bfloat16(), value)
    refuses(TypeError, "media_mask is torch.float32; expected torch.bool", query, key, value, None, None,
            torch.ones(2, 40))  # fmt: skip
    refuses(ValueError, r"media_mask is \[2, 43\] and media_key .* expected \[B, N\] = \[2, 40\]", query, key, value,
            latent_key, latent_value, torch.ones(2, 43, dtype=torch.bool))  # fmt: skip
    refuses(ValueError, "media_value is on meta but query on cpu", query, key, value.to("meta"))


def test_cpp_checks_what_it_is_given() -> None:
    query, key, value, *_ = inputs((1, 2, 3, 4, None, 8))
    out, lse = torch.empty(1, 2, 3, 8), torch.empty(1, 2, 4)
    views = [extension.optional_view(x) for x in (query, key, value, None, None, None)]
    forward = extension.module().resampler_attention_fwd_cpu
    with pytest.raises(ValueError, match=r"lse is float32\[1, 2, 4\]; expected float32\[1, 2, 3\]"):
        forward(*views, 1.0, extension.view(out), extension.view(lse), 512, 1)
    views[2] = extension.view(value[:, :, :, :7])
    with pytest.raises(ValueError, match=r"media_value is float32\[1, 2, 4, 7\]; expected float32\[1, 2, 4, 8\]"):
        forward(*views, 1.0, extension.view(out), extension.view(lse), 512, 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.resampler_attention")
    listed = {
        (case_["name"].split()[0], *(case_["constexprs"].get(n) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_D")),
         case_["num_warps"])
        for case_ in kernels.compile_cases()
    }  # fmt: skip
    for queries, dim, size in itertools.product((1, 31, 33, 64, 300), (1, 33, 64, 100, 128), (2, 4)):
        block_d = kernels.padded(dim)
        for name, tile in (
            ("forward", kernels.forward_tile(queries, dim, size)),
            ("backward", kernels.backward_tile(dim, size)),
        ):
            names = {name, name + ","}
            assert any((n, tile.queries, tile.keys, block_d, tile.num_warps) in listed for n in names)


def test_splits_cover_all_blocks() -> None:
    kernels = pytest.importorskip("mmfast.kernels.resampler_attention")
    for heads, media, latents, processors in itertools.product((1, 8, 512), (0, 257, 16448), (0, 64), (1, 132)):
        cut = kernels.plan(heads, 1, media, latents, 64, processors)
        blocks = cut.media_blocks + cut.latent_blocks
        assert cut.media_blocks * 64 >= media
        assert cut.latent_blocks * 64 >= latents
        assert max(cut.splits - 1, 0) * cut.split_blocks < max(blocks, 1) <= max(cut.splits * cut.split_blocks, 1)
    assert kernels.plan(8, 1, 16448, 64, 64, 132).splits >= 32, "one long video fills a GPU"


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", dtypes_of("triton"))
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 64, 16448, 64, 64), (64, 8, 64, 257, 64, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_close_to_float64(dtype: torch.dtype, shape: tuple[Any, ...], masked: bool) -> None:
    tensors = inputs(shape, dtype, "cuda")
    mask = some_mask(shape[0], shape[3]).cuda() if masked else None
    assert_close("triton", tensors, mask)
    first, second = (run(resampler_attention, tensors, mask, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same bits every time"


@pytest.mark.gpu
def test_gpu_sanitizer() -> None:
    assert_close("triton", inputs((2, 2, 9, 300, 5, 72), torch.float16, "cuda"), some_mask(2, 300).cuda())
