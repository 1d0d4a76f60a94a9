"""spatio_temporal_pool: every backend against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DTYPES, FLOOR, INTERPRETED_DTYPES, KERNELS, TOLERANCE
from torch import Tensor

from mmfast.ops import BackendUnavailable, crossovers, explain, spatio_temporal_pool, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.spatio_temporal_pool import OP, check, reference


def run(function: Any, features: Tensor, *arguments: Any, grad: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The output and the gradient of the features, for a fixed gradient of the output."""
    features = features.detach().requires_grad_()
    output = function(features, *arguments, **options)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output))
    assert features.grad is not None
    assert output.dtype == features.grad.dtype == features.dtype
    return [output.detach(), features.grad]


def assert_close(backend: str, features: Tensor, rows: int | None = None, mask: Tensor | None = None) -> None:
    """Output and gradient are as near to the float64 reference as they must be, and no worse than eager's."""
    dtype = features.dtype
    exact = run(reference, features.double(), rows, mask)
    eager = run(reference, features, rows, mask)
    ours = run(spatio_temporal_pool, features, rows, mask, backend=backend)
    for name, found, baseline, wanted in zip(("output", "gradient"), ours, eager, exact, strict=True):
        assert found.shape == wanted.shape
        for measure in (torch.linalg.vector_norm, lambda x: x.abs().amax() if x.numel() else x.sum()):
            size = measure(wanted).item()
            error = measure(found.double() - wanted).item()
            allowed = 1.5 * measure(baseline.double() - wanted).item() + FLOOR[dtype] * size
            assert error <= allowed, f"{name}: error {error}, allowed {allowed}, size {size}"
            assert error <= TOLERANCE[dtype] * size


def some_mask(batch: int, frames: int) -> Tensor:
    """The first sample has no real frame, the second only real ones."""
    mask = torch.rand(batch, frames) < 0.6
    mask[:1] = False
    mask[1:2] = True
    return mask


# ---- the equation


def test_reference_by_hand() -> None:
    features = torch.arange(12.0).view(1, 2, 3, 2)
    expected = [[2, 3], [8, 9], [0, 0], [3, 4], [5, 6], [7, 8]]
    assert reference(features, 3).tolist() == [expected]
    masked = [[2, 3], [0, 0], [0, 1], [2, 3], [4, 5]]
    assert reference(features, None, torch.tensor([[True, False]])).tolist() == [masked]


def test_reference_has_the_invariants_of_video_chatgpt() -> None:
    features = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    temporal, spatial = reference(features).split([5, 7], 1)
    torch.testing.assert_close(temporal.mean(1), spatial.mean(1))
    frames, patches = torch.randperm(5), torch.randperm(7)
    shuffled = torch.cat([temporal[:, frames], spatial[:, patches]], 1)
    torch.testing.assert_close(reference(features[:, frames][:, :, patches]), shuffled)


def test_gradcheck_of_the_reference() -> None:
    features = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    for mask in (None, some_mask(2, 3)):
        assert torch.autograd.gradcheck(lambda x, m=mask: reference(x, 5, m), features)
        assert torch.autograd.gradgradcheck(lambda x, m=mask: reference(x, 5, m), features)


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((2, 5, 7, 33), None),
        ((3, 9, 20, 64), 12),
        ((1, 20, 260, 70), 21),  # several patch blocks and chunks of rows
        ((1, 9, 256, 64), None),
        ((1, 1, 1, 1), None),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_close_to_float64(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], rows: int | None, masked: bool
) -> None:
    mask = some_mask(*shape[:2]) if masked else None
    assert_close(backend, (torch.randn(shape) + 0.5).to(dtype), rows, mask)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", range(4))
def test_any_size_may_be_zero(backend: str, empty: int) -> None:
    shape = [2, 3, 4, 8]
    shape[empty] = 0
    for rows, masked in itertools.product((None, 5), (False, True)):
        features = torch.randn(shape)
        mask = some_mask(*shape[:2]) if masked else None
        ours = run(spatio_temporal_pool, features, rows, mask, backend=backend)
        assert all(x.isfinite().all() for x in ours)
        torch.testing.assert_close(ours, run(reference, features, rows, mask))


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_dtype_and_mask(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 21), st.integers(1, 70)))
    order = data.draw(st.permutations(range(4 if backend == "triton" else 3)))
    steps = data.draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 3))
    expand = data.draw(st.sampled_from([None, None, 0, 1, 2]))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))
    order = [*order, *range(len(order), 4)]
    storage = torch.randn([shape[i] * [*steps, 1][i] for i in order]).to(dtype)
    features = storage.permute([order.index(i) for i in range(4)])[:: steps[0], :: steps[1], :: steps[2]]
    if expand is not None:
        features = features.narrow(expand, 0, 1).expand(shape)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    rows = shape[1] + data.draw(st.integers(0, 3))
    before = features.clone()
    assert_close(backend, features, rows, data.draw(st.sampled_from([None, mask.view(shape[:2])])))
    assert torch.equal(features, before)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_masked_frames_leak_nowhere(backend: str, garbage: float) -> None:
    features, mask = torch.randn(3, 6, 5, 16), some_mask(3, 6)
    clean = run(spatio_temporal_pool, features, 8, mask, backend=backend)
    features[~mask] = garbage
    dirty = run(spatio_temporal_pool, features, 8, mask, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    output, gradient = clean
    assert not output[0].any(), "a sample without real frames"
    assert not output[:, :6][~mask].any()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_stride(backend: str) -> None:
    features = torch.randn(2, 3, 4, 8)
    ones = torch.ones((), dtype=torch.float64).expand(2, 7, 8)
    transposed = torch.randn(2, 8, 7, dtype=torch.float64).transpose(1, 2)
    for grad in (ones, transposed):
        ours = run(spatio_temporal_pool, features, grad=grad, backend=backend)
        torch.testing.assert_close(ours, run(reference, features, grad=grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    features, threads = torch.randn(3, 10, 40, 513).to(dtype), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(spatio_temporal_pool, features, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend: str) -> None:
    # Address space only: 6 GiB of which two pages are touched.
    storage = torch.empty(3 * 2**30, dtype=torch.float16)
    features = storage.as_strided((2, 2, 1, 16), (2**30 + 64, 2**30 + 32, 16, 1))
    for index in itertools.product(range(2), range(2)):
        features[index] = 1.0 + sum(index)
    output = spatio_temporal_pool(features, backend=backend)
    assert torch.equal(output[:, :, 0], torch.tensor([[1, 2, 1.5], [2, 3, 2.5]], dtype=torch.float16))


# ---- the op in PyTorch


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    mask = some_mask(2, 3) if masked else None
    ops = torch.ops.mmfast
    torch.library.opcheck(ops.spatio_temporal_pool_fwd.default, (torch.randn(2, 3, 4, 8), mask, 5, "cpu"))
    torch.library.opcheck(ops.spatio_temporal_pool_bwd.default, (torch.randn(2, 9, 8), mask, 3, 4, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(spatio_temporal_pool, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for frames in (3, 5):
        features, mask = torch.randn(2, frames, 4, 8), some_mask(2, frames)
        torch.testing.assert_close(
            run(compiled, features, 6, mask, backend="cpu"),
            run(spatio_temporal_pool, features, 6, mask, backend="cpu"),
        )


def test_saves_nothing_but_the_mask() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mask = some_mask(2, 3)
        spatio_temporal_pool(torch.randn(2, 3, 4, 8, requires_grad=True), None, mask, backend="cpu")
        spatio_temporal_pool(torch.randn(2, 3, 4, 8, requires_grad=True), backend="cpu")
    assert [x.data_ptr() for x in saved] == [mask.data_ptr()]


def test_no_gradient_where_none_is_wanted() -> None:
    features = torch.randn(2, 3, 4, 8, requires_grad=True)
    assert not spatio_temporal_pool(features.detach(), backend="cpu").requires_grad
    with torch.no_grad():
        assert not spatio_temporal_pool(features, backend="cpu").requires_grad


def test_second_derivative_is_refused() -> None:
    features = torch.randn(1, 2, 3, 4, requires_grad=True)
    output = spatio_temporal_pool(features, backend="cpu")
    grad = torch.ones_like(output, requires_grad=True)
    (gradient,) = torch.autograd.grad(output, features, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_keeps_the_dtype(backend: str) -> None:
    features = torch.randn(2, 3, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = run(spatio_temporal_pool, features, backend=backend)
    torch.testing.assert_close(output, reference(features))


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def strided() -> Tensor:
    return meta(2, 8, 4, 16).transpose(1, 3)


LEAST = crossovers.CPU.cpu("spatio_temporal_pool")["float32 backward"]


@pytest.mark.parametrize(
    ("features", "on", "request_", "chosen"),
    [
        (meta(2, 4, 8, 16), Machine("cpu"), None, "cpu"),
        (meta(2, 4, 8, 16, dtype=torch.float64), Machine("cpu"), None, "reference"),
        (strided(), Machine("cpu"), None, "reference"),
        (meta(2, 4, 8, 16), Machine("cpu", no_extension="not built"), None, "reference"),
        (meta(2, 4, 8, 16), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (meta(2, 4, 8, 16).requires_grad_(), Machine("cpu"), None, "cpu"),
        (meta(2, 4, 8, 16, dtype=torch.float32).requires_grad_(), Machine("cpu"), None, "reference"),
        (meta(2, 4, 8, 16, dtype=torch.float32).requires_grad_(), Machine("cpu"), "cpu", "cpu"),
        (meta(1, 1, 1, LEAST, dtype=torch.float32).requires_grad_(), Machine("cpu"), None, "cpu"),
        (meta(2, 4, 8, 16), H200, None, "triton"),
        (meta(2, 4, 8, 16), H200, "cuda", "cuda"),
        (meta(2, 4, 8, 16, dtype=torch.float64), H200, None, "reference"),
        (strided(), H200, None, "triton"),
        (meta(2, 4, 8, 16), Machine("cuda", (7, 5)), None, "reference"),
        (meta(2, 4, 8, 16), Machine("mps"), None, "reference"),
    ],
)
def test_selection(features: Tensor, on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(features), on, request_) == chosen


@pytest.mark.parametrize(
    ("features", "on", "request_", "reason"),
    [
        (meta(2, 4, 8, 16, dtype=torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (strided(), Machine("cpu"), "cpu", "the last dimension of features has stride 64; the kernel needs 1"),
        (meta(2, 4, 8, 16), Machine("cpu"), "cuda", "the tensors are on cpu"),
        (meta(2, 4, 8, 15), H200, "cuda", r"must start at a multiple of 16 bytes \(8 elements\)"),
        (meta(2, 4, 8, 16)[..., 4:12], H200, "cuda", "must start at a multiple of 16 bytes"),
        (meta(2, 4, 8, 16), Machine("cuda", (7, 5)), "triton", "compute capability 7.5 is below 8.0"),
    ],
)
def test_impossible_request(features: Tensor, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"spatio_temporal_pool: backend '{request_}' cannot .*{reason}"):
        OP.select(check(features), on, request_)


def test_explain() -> None:
    features = torch.randn(2, 4, 8, 16)
    assert explain(spatio_temporal_pool, features).splitlines() == [
        "spatio_temporal_pool runs on: cpu",
        "  cuda: the tensors are on cpu",
        "  triton: the Triton interpreter is for tests; ask for it by name",
        "  reference: cpu comes first",
    ]
    assert "not measured against Triton" in OP.explain(check(features), H200)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = module._FWD, module.reference
    monkeypatch.setattr(module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    features = torch.randn(2, 4, 8, 16)
    spatio_temporal_pool(features, backend=backend)
    with use_backend(backend):
        spatio_temporal_pool(features)
    assert ran == [backend, backend]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3, 4),), ValueError, r"features has shape \[2, 3, 4\]; expected \[B, T, N, D\]"),
        ((torch.zeros(1, 2, 3, 4, dtype=torch.int64),), TypeError, "features is torch.int64; expected torch.float32"),
        ((torch.zeros(1, 5, 3, 4), 4), ValueError, "num_temporal_tokens is 4 but features has 5 frames"),
        ((torch.zeros(1, 2, 3, 4), 2, torch.ones(1, 2)), TypeError, "frame_mask is torch.float32; expected torch.bool"),
        (
            (torch.zeros(1, 2, 3, 4), 2, torch.ones(2, 2, dtype=torch.bool)),
            ValueError,
            r"frame_mask has shape \[2, 2\] but features \[1, 2, 3, 4\]; expected \[B, T\] = \[1, 2\]",
        ),
        (
            (torch.zeros(1, 2, 3, 4), 2, meta(1, 2, dtype=torch.bool)),
            ValueError,
            "frame_mask is on meta but features on cpu",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"spatio_temporal_pool: {message}"):
        spatio_temporal_pool(*arguments)


def test_cpp_checks_what_it_is_given() -> None:
    from mmfast.ops import extension

    good, bad = torch.zeros(1, 2, 3, 4), torch.zeros(1, 4, 4)
    with pytest.raises(ValueError, match=r"pooled is float32\[1, 4, 4\]; expected \[B, T' \+ N, D\]"):
        extension.module().spatio_temporal_pool_fwd_cpu(extension.view(good), None, extension.view(bad), 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.spatio_temporal_pool")
    listed = {
        (case["constexprs"]["BLOCK_N"], case["num_warps"])
        for case in kernels.compile_cases()
        if "add" not in case["name"]
    }
    for batch, rows, patches, channels, aligned in itertools.product(
        (1, 32), (1, 100), (1, 49, 256, 577), (33, 1024), (0, 1)
    ):
        plan = kernels.plan(batch, rows, patches, channels, bool(aligned), processors=132)
        assert (plan.tile.patches, plan.tile.num_warps) in listed
        assert plan.patch_blocks * plan.tile.patches >= patches
        assert plan.channel_blocks * plan.tile.channels >= channels
        assert (plan.chunks - 1) * plan.chunk_rows < rows <= plan.chunks * plan.chunk_rows


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 20, 64), (1, 100, 256, 1024), (3, 17, 577, 128), (2, 4, 7, 33)])
@pytest.mark.parametrize("masked", [False, True])
def test_gpu_close_to_float64(backend: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool) -> None:
    if backend == "cuda" and shape[-1] % 8:
        pytest.skip("rows are not aligned")
    mask = some_mask(*shape[:2]).cuda() if masked else None
    features = (torch.randn(shape, device="cuda") + 0.5).to(dtype)
    assert_close(backend, features, shape[1] + 3, mask)
    first, second = (run(spatio_temporal_pool, features, None, mask, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the same bits every time"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_sanitizer(backend: str) -> None:
    assert_close(backend, torch.randn(2, 9, 300, 72, device="cuda", dtype=torch.float16), 11, some_mask(2, 9).cuda())
