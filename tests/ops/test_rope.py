"""rope: every backend against the reference in float64, and against transformers' apply_rotary_pos_emb."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BACKENDS, DEVICES, DTYPES, INTERPRETED_DTYPES, KERNELS, assert_as_near, case, dtypes_of
from torch import Tensor

from mmfast.ops import BackendUnavailable, explain, rope, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.rope import LEAST, OP, _is_small, check, reference


def some(
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    length: int = 5,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    angles: torch.dtype | None = None,
    device: str = "cpu",
    shared: bool = False,
) -> list[Tensor]:
    """q and k as transposed views of what linears give; cos and sin whose halves differ."""
    q, k = (torch.randn(batch, length, n, width, device=device).to(dtype).transpose(1, 2) for n in heads)
    theta = torch.rand(1 if shared else batch, length, width, device=device) * 7
    return [q, k, theta.cos().to(angles or dtype), theta.sin().to(angles or dtype)]


def run(
    function: Any, arguments: list[Tensor], needs: str = "qk", outputs: str = "qk", **options: Any
) -> dict[str, Tensor]:
    """The outputs, and the gradients that are needed, for fixed gradients of the outputs that are named."""
    q, k, cos, sin = arguments
    leaves = {"q": q.detach().requires_grad_("q" in needs), "k": k.detach().requires_grad_("k" in needs)}
    results = dict(zip("qk", function(*leaves.values(), cos, sin, **options), strict=True))
    generator = torch.Generator().manual_seed(1)
    # Exact in every dtype, so that float64 sees the same gradients.
    grads = {name: torch.randn(y.shape, generator=generator).bfloat16() for name, y in results.items()}
    kept = [name for name in outputs if results[name].requires_grad]
    if kept:
        torch.autograd.backward([results[name] for name in kept], [grads[name].to(results[name]) for name in kept])
    found = {f"output {name}": y.detach() for name, y in results.items()}
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            assert leaf.grad.dtype == leaf.dtype
            found[f"grad {name}"] = leaf.grad
    return found


def assert_close(backend: str, arguments: list[Tensor], **options: Any) -> None:
    exact = run(reference, [tensor.double() for tensor in arguments], **options)
    eager = run(reference, arguments, **options)
    ours = run(rope, arguments, **options, backend=backend)
    dtype = max((arguments[0].dtype, arguments[2].dtype), key=lambda dtype: -torch.finfo(dtype).bits)
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        assert ours[name].dtype == eager[name].dtype
        assert_as_near(ours[name], eager[name], wanted, dtype)


# ---- the equation


def test_reference_by_hand() -> None:
    q = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    cos, sin = torch.tensor([[[1.0, 0.0, 2.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 1.0, 2.0]]])
    turned, _ = reference(q, q, cos, sin)
    assert turned.flatten().tolist() == [1.0, -4.0, 6.0 + 1.0, 4.0 + 4.0]


def test_gradcheck_of_the_reference() -> None:
    tensors = [tensor.double().requires_grad_() for tensor in some(2, (2, 1), 3, 4)]
    assert torch.autograd.gradcheck(reference, tensors)
    assert torch.autograd.gradgradcheck(reference, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", DTYPES)
@pytest.mark.parametrize("length", [1, 9])
def test_the_bits_of_llama(dtype: torch.dtype, angles: torch.dtype, length: int) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    arguments = some(2, (8, 2), length, 128, dtype, angles)
    expected = llama.apply_rotary_pos_emb(*arguments)
    for backend in ("cpu", "reference"):
        for found, wanted in zip(rope(*arguments, backend=backend), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_what_llama_passes(dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(hidden_size=64, num_attention_heads=4)
    positions = torch.arange(7)[None]
    q, k, *_ = some(3, (4, 2), 7, 16, dtype)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    found = rope(q, k, cos, sin, backend="cpu")
    for y, wanted in zip(found, llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(y, wanted)
        assert y.transpose(1, 2).is_contiguous(), "as its input lies"


# ---- the kernels


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
@pytest.mark.parametrize("size", [(1, (1, 1), 1, 2), (2, (4, 2), 5, 16), (1, (33, 3), 3, 70), (2, (4, 4), 2, 256)])
@pytest.mark.parametrize("shared", [False, True])
def test_close_to_float64(backend: str, dtype: torch.dtype, size: Any, shared: bool) -> None:
    assert_close(backend, some(*size, dtype=dtype, shared=shared))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "angles"), list(itertools.permutations(DTYPES, 2)))
def test_angles_of_another_dtype(backend: str, dtype: torch.dtype, angles: torch.dtype) -> None:
    if backend == "triton" and torch.bfloat16 in (dtype, angles):
        pytest.skip("the interpreter truncates to bfloat16")
    assert_close(backend, some(dtype=dtype, angles=angles))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    arguments = some()
    everything = run(rope, arguments, backend=backend)
    for needs, outputs in itertools.product(("", "q", "k", "qk"), ("q", "k", "qk")):
        found = run(rope, arguments, needs, outputs, backend=backend)
        assert {name[-1] for name in found if "grad" in name} == set(needs) & set(outputs)
        assert all(torch.equal(value, everything[name]) for name, value in found.items())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, (4, 2), 5, 16), (2, (0, 2), 5, 16), (2, (4, 0), 5, 16), (2, (4, 2), 0, 16)])
def test_any_size_may_be_zero(backend: str, size: Any) -> None:
    arguments = some(*size)
    torch.testing.assert_close(run(rope, arguments, backend=backend), run(reference, arguments))


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_stride_and_dtype(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(0)
    batch, length, width = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20)))
    heads = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 3)))
    dtype = data.draw(st.sampled_from(INTERPRETED_DTYPES if backend == "triton" else DTYPES))

    def strided(*shape: int) -> Tensor:
        order, step = data.draw(st.permutations(range(len(shape)))), data.draw(st.sampled_from([1, 2]))
        storage = torch.randn([shape[i] * step for i in order]).to(dtype)
        view = storage.permute([order.index(i) for i in range(len(shape))])
        return view[tuple(slice(None, None, step) for _ in shape)]

    q, k = (strided(batch, n, length, 2 * width) for n in heads)
    rows = data.draw(st.sampled_from([1, batch]))
    arguments = [q, k, *(strided(rows, length, 2 * width) for _ in range(2))]
    before = [tensor.clone() for tensor in arguments]
    assert_close(backend, arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_lie_as_their_inputs(backend: str) -> None:
    q, k, cos, sin = some(2, (4, 4), 5, 16)
    fused = torch.randn(2, 5, 3 * 64)
    part = fused[..., :64].view(2, 5, 4, 16).transpose(1, 2)
    for x in (q, q.contiguous(), part):
        turned, _ = rope(x, k, cos, sin, backend=backend)
        torch.testing.assert_close(turned, reference(x, k, cos, sin)[0])
        assert turned.stride() == torch.empty_like(x).stride()
    expanded = torch.ones(()).expand(2, 4, 5, 16)
    torch.testing.assert_close(rope(expanded, k, cos, sin, backend=backend)[0], reference(expanded, k, cos, sin)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_any_stride(backend: str) -> None:
    q, k, cos, sin = some()
    found = []
    for function, options in ((rope, {"backend": backend}), (reference, {})):
        leaf = q.detach().requires_grad_()
        function(leaf, k, cos, sin, **options)[0].sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    arguments, threads, results = some(2, (16, 4), 40, 64, dtype), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(rope, arguments, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other[name], value) for other in results[1:] for name, value in results[0].items())


# ---- the op in PyTorch


@pytest.mark.parametrize("adjoint", [False, True])
def test_opcheck(adjoint: bool) -> None:
    q, k, cos, sin = some()
    for tensors in ([q, k], [q.contiguous()]):
        for dtype in (torch.float32, torch.float16):
            if adjoint or dtype == torch.float32:
                arguments = (tensors, cos, sin, dtype, adjoint, "cpu")
                torch.library.opcheck(torch.ops.mmfast.rope_rotate.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    compiled = torch.compile(rope, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5):
        arguments = some(length=length)
        ours = run(compiled, arguments, backend="cpu")
        torch.testing.assert_close(ours, run(rope, arguments, backend="cpu"))


def test_saves_cos_and_sin_alone() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        q, k, cos, sin = some()
        rope(q.requires_grad_(), k, cos, sin, backend="cpu")
    assert [x.data_ptr() for x in saved] == [cos.data_ptr(), sin.data_ptr()]


def test_no_gradient_where_none_is_wanted() -> None:
    q, k, cos, sin = some()
    with torch.no_grad():
        assert not any(y.requires_grad for y in rope(q.requires_grad_(), k, cos, sin, backend="cpu"))


def test_gradients_of_cos_and_sin_come_from_the_reference() -> None:
    found = []
    q, k, *angles = some()
    for function in (rope, reference):
        cos, sin = (x.detach() for x in angles)
        cos.requires_grad_()
        sum(y.square().sum() for y in function(q, k, cos, sin)).backward()
        found.append(cos.grad)
    assert torch.equal(*found)


def test_second_derivative_is_refused() -> None:
    q, k, cos, sin = some()
    y, _ = rope(q.requires_grad_(), k, cos, sin, backend="cpu")
    (gradient,) = torch.autograd.grad(y, q, torch.ones_like(y, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_keeps_the_dtype(backend: str) -> None:
    arguments = some()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run(rope, arguments, backend=backend)
    torch.testing.assert_close(inside, run(rope, arguments, backend=backend))


# ---- the choice of a backend


def meta(dtype: torch.dtype = torch.bfloat16, angles: torch.dtype | None = None) -> list[Tensor]:
    shapes = ((2, 4, 5, 16), (2, 2, 5, 16), (2, 5, 16), (2, 5, 16))
    return [torch.empty(shape, dtype=dtype if len(shape) == 4 else angles or dtype, device="meta") for shape in shapes]


def trained_angles() -> list[Tensor]:
    q, k, cos, sin = meta()
    return [q, k, cos, sin.requires_grad_()]


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "chosen"),
    [
        (meta(), Machine("cpu"), None, "cpu"),
        (meta(torch.float64), Machine("cpu"), None, "reference"),
        (meta(angles=torch.float64), Machine("cpu"), None, "reference"),
        (trained_angles(), Machine("cpu"), None, "reference"),
        (meta(), Machine("cpu", no_extension="not built"), None, "reference"),
        (meta(), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (meta(), Machine("cuda", (9, 0)), None, "triton"),
        (meta(), Machine("cuda", (7, 5)), None, "reference"),
        (meta(), Machine("mps"), None, "reference"),
    ],
)
def test_selection(arguments: list[Tensor], on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(*arguments), on, request_) == chosen


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "reason"),
    [
        (meta(torch.float64), Machine("cpu"), "cpu", "there is no float64 kernel"),
        (trained_angles(), Machine("cpu"), "cpu", "cos or sin wants a gradient, which only the reference gives"),
        (meta(), Machine("cuda", (7, 5)), "triton", "compute capability 7.5 is below 8.0"),
    ],
)
def test_impossible_request(arguments: list[Tensor], on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"rope: backend '{request_}' cannot .*{reason}"):
        OP.select(check(*arguments), on, request_)


def test_explain() -> None:
    assert "triton: the Triton interpreter is for tests" in explain(rope, *some())
    assert "cpu: q and k have 960 elements of fp16; below" in explain(rope, *(x.half() for x in some()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, LEAST["float16 backward"] // 64, LEAST["float16 forward"] // 64])
@pytest.mark.parametrize("trained", [False, True])
def test_small_calls_take_the_reference_as_selection_says(dtype: torch.dtype, length: int, trained: bool) -> None:
    q, k, angles = (torch.zeros(1, dtype=dtype).expand(1, n, length, 16) for n in (3, 1, 1))
    arguments = q.requires_grad_(trained), k, angles[0], angles[0]
    assert _is_small(*arguments, None) == (OP.select(check(*arguments), Machine("cpu")) == "reference")
    with use_backend("cpu"):
        assert not _is_small(*arguments, None)
    assert not _is_small(*arguments, "cpu")
    assert not _is_small(q, k[:, :, :, :8], *arguments[2:], None)
    assert not _is_small(q, k, angles[0, ..., :8], angles[0, ..., :8], None)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = sys.modules[OP.check.__module__], []
    rotate, ref = module._ROTATE, module.reference
    monkeypatch.setattr(module, "_ROTATE", lambda *arguments: ran.append(arguments[-1]) or rotate(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    rope(*some(), backend=backend)
    with use_backend(backend):
        rope(*some())
    assert ran == [backend, backend]


Q, K, COS, SIN = some()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (Q[0], K, COS, SIN),
            ValueError,
            r"q is \[4, 5, 16\] and k is \[2, 2, 5, 16\]; expected \[B, num_heads, L, D\]",
        ),
        ((Q, K[:, :, :3], COS, SIN), ValueError, r"k is \[2, 2, 3, 16\]"),
        (
            (Q, K, COS[:, :4], SIN),
            ValueError,
            r"cos is \[2, 4, 16\] and sin is \[2, 5, 16\]; expected \[B or 1, L, D\]",
        ),
        (
            (Q, K, COS[..., :8], SIN[..., :8]),
            ValueError,
            "cos has 8 elements a token and q heads of 16; .* partial rotary",
        ),
        ((Q[..., :15], K[..., :15], COS[..., :15], SIN[..., :15]), ValueError, "heads of 15; expected one even"),
        ((Q.int(), K, COS, SIN), TypeError, "q is torch.int32; expected one of torch.float32"),
        ((Q, K, COS.int(), SIN), TypeError, "cos is torch.int32; expected one of torch.float32"),
        ((Q, K.half(), COS, SIN), TypeError, "q is torch.float32 and k is torch.float16; expected one dtype"),
        ((Q, K, COS, SIN.half()), TypeError, "cos is torch.float32 and sin is torch.float16; expected one dtype"),
        ((Q, K, COS.to("meta"), SIN), ValueError, "cos is on meta but q on cpu"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"rope: .*{message}"):
        rope(*arguments)


def test_cpp_checks_what_it_is_given() -> None:
    from mmfast.ops import extension

    q, k, cos, sin = map(extension.view, (Q, K, COS, SIN))
    with pytest.raises(ValueError, match=r"rope: a tensor is float32\[2, 2, 5, 16\]; expected"):
        extension.module().rope_cpu([q], cos, sin, [k], False, 1)
    with pytest.raises(ValueError, match="rope: no kernel for int64"):
        extension.module().rope_cpu([q], cos, sin, [extension.view(Q.long())], False, 1)


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.rope")
    listed = {(c["constexprs"]["BLOCK_H"], c["constexprs"]["BLOCK_D"]) for c in kernels.compile_cases()}
    for width in (64, 96, 128, 256):
        shape = kernels.launch(width)
        assert (shape["BLOCK_H"], shape["BLOCK_D"]) in listed


# ---- on a GPU


@pytest.mark.parametrize(("backend", "size"), [case("triton", (2, (32, 8), 9, 128))])
def test_triton_where_it_is_at_home(backend: str, size: Any) -> None:
    for dtype in dtypes_of(backend):
        assert_close(backend, some(*size, dtype=dtype, device=DEVICES[backend]))
