"""mixture_adapter: how a call reaches an implementation, what it saves, what it refuses."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from mixture_adapter_cases import FORMS, NAMES, Form, Tensors, double, run, some
from op_cases import BACKENDS
from torch import Tensor

from mmfast.ops import BackendUnavailable, explain, extension, merged_experts, mixture_adapter, products, use_backend
from mmfast.ops.backends import Machine
from mmfast.ops.mixture_adapter import (
    CPU_RANKS,
    CPU_TOKENS,
    LEAST,
    OP,
    TRITON_RANKS,
    _product_dtype,
    check,
    reference,
)

FORM = Form((2, 5, 32))


def call(tensors: Tensors, *options: Any) -> Any:
    return check(*tensors.values(), *options)  # type: ignore[arg-type]


# ---- the op in PyTorch


@pytest.mark.parametrize(("activation", "seed"), [("identity", None), ("gelu", torch.tensor([3]))])
def test_opcheck(activation: str, seed: Tensor | None) -> None:
    ops = torch.ops.mmfast
    x, down, up = torch.randn(2, 5, 24), torch.randn(8, 24), torch.randn(2, 5, 24)
    settings = 2, 1, activation, 20000 if seed is not None else 0, seed
    for keep in (False, True):
        torch.library.opcheck(ops.mixture_adapter_fwd.default, (x, down, torch.randn(8), up, *settings, keep, "cpu"))
    arguments = torch.randn(2, 5, 24), x, torch.randn(10, 8), down, up, *settings
    for needs in ((True, True, True, True), (True, False, False, False), (False, True, False, True)):
        torch.library.opcheck(ops.mixture_adapter_bwd.default, (*arguments, *needs, "cpu"))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", [FORM, Form((2, 5, 32), 4, 1, 1, True, "relu")])
def test_compiles_as_one_graph(form: Form, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(mixture_adapter, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 7):
        tensors = some(form._replace(shape=(2, tokens, 32)))
        options = NAMES, 0.7, 0.0, form.activation
        for backend in ("cpu", "reference"):
            ours = run(compiled, tensors, *options, backend=backend)
            torch.testing.assert_close(ours, run(mixture_adapter, tensors, *options, backend=backend))


@pytest.mark.parametrize(
    ("needs", "activation", "saved_matrices"),
    [
        (NAMES, "identity", {"x", "z"}),
        (("x",), "identity", set()),
        (("x",), "gelu", {"z"}),
        (("down_weight",), "identity", {"x"}),
        (("down_bias",), "identity", set()),
        (("up_weight",), "identity", {"z"}),
        (("router",), "identity", {"z"}),
        (("up_bias",), "relu", {"z"}),
    ],
)
def test_saved_bytes(needs: tuple[str, ...], activation: str, saved_matrices: set[str]) -> None:
    # Many rows: what does not grow with them (merged experts, parameters) is told apart by its size.
    rows, form = 4000, Form((2, 2000, 16))
    tensors = some(form, torch.bfloat16)
    for name in needs:
        tensors[name].requires_grad_()  # type: ignore[union-attr]
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.setdefault(x.data_ptr(), x), lambda x: x):
        mixture_adapter(*tensors.values(), 1.0, 0.2, activation, backend="cpu")  # type: ignore[arg-type]
    large = sorted(x.nbytes for x in saved.values() if x.numel() >= rows)
    assert large == sorted({"x": 2 * 16 * rows, "z": 4 * 8 * rows}[name] for name in saved_matrices)


def test_no_gradient_where_none_is_wanted() -> None:
    tensors = some(FORM)
    tensors["x"].requires_grad_()  # type: ignore[union-attr]
    with torch.no_grad():
        assert not mixture_adapter(*tensors.values(), backend="cpu").requires_grad  # type: ignore[arg-type]
    tensors["x"] = tensors["x"].detach()  # type: ignore[union-attr]
    assert not mixture_adapter(*tensors.values(), backend="cpu").requires_grad  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_refused(name: str) -> None:
    tensors = some(FORM)
    leaf = tensors[name].requires_grad_()  # type: ignore[union-attr]
    output = mixture_adapter(*tensors.values(), backend="cpu")  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones_like(output, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference", None])
@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_autocast_changes_nothing(backend: str | None, form: Form) -> None:
    options = NAMES, 0.7, 0.0, form.activation
    tensors = some(form)
    wanted = run(mixture_adapter, tensors, *options, backend=backend)

    def under_autocast(*arguments: Any, **named: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mixture_adapter(*arguments, **named)

    found = run(under_autocast, tensors, *options, backend=backend)
    # Another reference may stand behind a small call: to rounding.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))
CPU = Machine("cpu")


def sized(
    *shape: int, ranks: int = 8, experts: int = 2, dtype: torch.dtype = torch.float32, per_token: bool = False
) -> Tensors:
    """Arguments without memory."""
    zero, single = torch.zeros((), dtype=dtype), torch.zeros(())
    features = shape[-1]
    router = single.expand(*(shape[:-1] if per_token else shape[:1]), experts)
    return {
        "x": zero.expand(shape),
        "down_weight": single.expand(ranks, features),
        "down_bias": single.expand(ranks),
        "up_weight": single.expand(experts, features, ranks // 2),
        "up_bias": single.expand(experts, features),
        "router": router if experts > 1 else None,
    }


def trained(tensors: Tensors) -> Tensors:
    return tensors | {"up_bias": tensors["up_bias"].detach().requires_grad_()}  # type: ignore[union-attr]


BF16 = torch.bfloat16
ROWS = LEAST["32-bit forward"] // 128
ROWS_TRAINED = LEAST["32-bit backward"] // 128
ROWS_16 = LEAST["16-bit backward"] // 128


@pytest.mark.parametrize(
    ("tensors", "options", "on", "request_", "chosen"),
    [
        (sized(1, ROWS, 128), (), CPU, None, "cpu"),
        (sized(1, ROWS - 1, 128), (), CPU, None, "reference"),
        (trained(sized(1, ROWS_TRAINED, 128)), (), CPU, None, "cpu"),
        (trained(sized(1, ROWS_TRAINED - 1, 128)), (), CPU, None, "reference"),
        (trained(sized(1, ROWS_16, 128, dtype=BF16)), (), CPU, None, "cpu"),
        (trained(sized(1, ROWS_16 - 1, 128, dtype=BF16)), (), CPU, None, "reference"),
        (sized(1, ROWS - 1, 128), (1.0, 0.1), CPU, None, "cpu"),
        (sized(1, 3, 128, ranks=CPU_RANKS), (1.0, 0.1), CPU, None, "cpu"),
        (sized(1, ROWS, 128, ranks=CPU_RANKS + 2), (1.0, 0.1), CPU, None, "reference"),
        (sized(2, 3, 128), (), CPU, "cpu", "cpu"),
        (sized(ROWS, CPU_TOKENS, 128), (), CPU, None, "cpu"),
        (sized(2 * ROWS, CPU_TOKENS - 1, 128), (), CPU, None, "reference"),
        (sized(2 * ROWS, 1, 128, experts=1), (), CPU, None, "cpu"),
        (sized(1, ROWS, 128, ranks=CPU_RANKS), (), CPU, None, "cpu"),
        (sized(1, ROWS, 128, ranks=CPU_RANKS + 2), (), CPU, None, "reference"),
        (sized(1, ROWS, 128, per_token=True), (), CPU, None, "reference"),
        (sized(1, ROWS, 128, dtype=torch.float64), (), CPU, None, "reference"),
        (sized(1, ROWS, 128), (), Machine("cpu", no_extension="not built"), None, "reference"),
        (sized(2, 3, 128), (), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (sized(2, 3, 128), (), H200, None, "triton"),
        (sized(2, 3, 128, ranks=TRITON_RANKS + 2), (), H200, None, "reference"),
        (sized(2, 3, 128, per_token=True), (), H200, None, "reference"),
        (sized(2, 3, 128), (), Machine("cuda", (7, 5)), None, "reference"),
    ],
)
def test_selection(tensors: Tensors, options: tuple[Any, ...], on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(call(tensors, *options), on, request_) == chosen


@pytest.mark.parametrize(
    ("tensors", "on", "request_", "reason"),
    [
        (sized(2, 3, 128, dtype=torch.float64), CPU, "cpu", "there is no float64 kernel"),
        (sized(2, 3, 128, per_token=True), CPU, "cpu", "the router has a weight for each token"),
        (sized(2, 3, 128, ranks=130), H200, "triton", "there are 130 ranks; a program holds up to 128"),
        (sized(2, 3, 128), H200, "cpu", "the tensors are on cuda"),
    ],
)
def test_impossible_request(tensors: Tensors, on: Machine, request_: str, reason: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"mixture_adapter: backend '{request_}' cannot .*{reason}"):
        OP.select(call(tensors), on, request_)


def test_products_of_many_ranks_are_made_in_16_bits_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one_row = torch.zeros(1, 512, 128, dtype=BF16), torch.zeros(1, 2, 128, dtype=BF16)
    monkeypatch.setattr(products, "_has_products", lambda dtype: True)
    assert _product_dtype(x, 64, False) == BF16
    assert _product_dtype(x, 8, False) == _product_dtype(one_row, 64, False) == torch.float32
    assert _product_dtype(x.double(), 64, False) == torch.float64
    monkeypatch.setattr(products, "_has_products", lambda dtype: dtype == torch.float32)
    assert _product_dtype(x, 64, False) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 70, 32), (5, 32), (90, 3, 32)])
def test_one_expert_of_many_ranks_gives_what_the_reference_gives(
    dtype: torch.dtype, scale: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = some(Form(shape, CPU_RANKS + 4, 1, 1, activation="relu"), dtype)
    before = tensors["x"].clone()  # type: ignore[union-attr]
    wanted = run(mixture_adapter, tensors, NAMES, scale, 0.0, "relu", backend="reference")
    small = sys.modules[OP.check.__module__]
    monkeypatch.setitem(small.LEAST, "32-bit forward", 0)
    monkeypatch.setitem(small.LEAST, "32-bit backward", 0)
    monkeypatch.setattr(small, "check", None)  # the call goes by it
    found = run(mixture_adapter, tensors, NAMES, scale, 0.0, "relu")
    assert found.keys() == wanted.keys()
    with torch.no_grad():
        without = mixture_adapter(*tensors.values(), scale, 0.0, "relu")  # type: ignore[arg-type]
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    # Rounded once instead of twice, it is no further from the truth.
    exact = reference(*double(tensors).values(), scale, None, "relu")  # type: ignore[arg-type]
    assert without.dtype == dtype
    assert (without - exact).norm() <= 1.01 * (wanted["y"] - exact).norm()
    assert torch.equal(tensors["x"], before)  # type: ignore[arg-type]


def test_explain() -> None:
    assert explain(mixture_adapter, *some(FORM).values()).splitlines() == [
        "mixture_adapter runs on: reference",
        f"  cpu: x has 320 elements; below {LEAST['32-bit forward']} the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = merged_experts.FWD, module.reference
    monkeypatch.setattr(merged_experts, "FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    arguments = some(FORM).values()
    mixture_adapter(*arguments, backend=backend)  # type: ignore[arg-type]
    with use_backend(backend):
        mixture_adapter(*arguments)  # type: ignore[arg-type]
    assert ran == [backend, backend]


@pytest.mark.parametrize("form", [*FORMS, Form((3, 24)), Form((2, 3, 2, 24), 4, 1, 1)], ids=str)
def test_a_small_call_gives_what_a_large_one_would(form: Form) -> None:
    tensors = some(form)
    options = NAMES, 0.7, 0.0, form.activation
    torch.testing.assert_close(
        run(mixture_adapter, tensors, *options),
        run(reference, double(tensors), NAMES, 0.7, None, form.activation),
        rtol=1e-4,
        atol=1e-4,
        check_dtype=False,
    )


@pytest.mark.parametrize("name", NAMES[1:5])
def test_a_small_call_of_one_expert_takes_parameters_of_any_dtype(name: str) -> None:
    tensors = some(Form((1, 3, 32), 4, 1, 1, activation="relu"))
    tensors[name] = tensors[name].bfloat16()  # type: ignore[union-attr]
    found, wanted = (
        run(mixture_adapter, tensors, NAMES, 0.7, 0.0, "relu", backend=backend) for backend in (None, "reference")
    )
    torch.testing.assert_close(found, wanted)


# ---- what is refused

X, DOWN, UP, ROUTER = torch.zeros(2, 3, 8), torch.zeros(4, 8), torch.zeros(2, 8, 2), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, (1.0, 0.0, "tanh"), ValueError, "activation is 'tanh'; use one of identity, relu, gelu, silu"),
        ({}, (1.0, 1.0), ValueError, r"dropout is 1.0; expected a probability in \[0, 1\)"),
        ({"x": X[0, 0]}, (), ValueError, r"x is \[8\]; expected \[B, ..., H\]; add a batch dimension"),
        ({"x": X.long()}, (), TypeError, "x is torch.int64; expected one of torch.float32"),
        ({"down_weight": torch.zeros(4, 7)}, (), ValueError, r"down_weight is \[4, 7\] but x has 8 features"),
        ({"down_weight": torch.zeros(8)}, (), ValueError, r"down_weight is \[8\] but x has 8 features"),
        ({"down_weight": torch.zeros(3, 4, 8)}, (), ValueError, "down_weight has 3 experts and up_weight 2"),
        ({"up_weight": torch.zeros(2, 7, 2)}, (), ValueError, r"up_weight is \[2, 7, 2\], down_weight \[4, 8\]"),
        ({"up_weight": torch.zeros(8, 2)}, (), ValueError, r"up_weight is \[8, 2\], down_weight \[4, 8\]"),
        ({"up_weight": torch.zeros(2, 8, 3)}, (), ValueError, "R = 4 and groups that divide both"),
        ({"down_weight": torch.zeros(6, 8)}, (), ValueError, "H = 8, R = 6 and groups that divide both"),
        ({"router": None}, (), ValueError, "there are 2 experts but no router"),
        ({"router": torch.zeros(2, 3)}, (), ValueError, r"router is \[2, 3\]; .* \[2, 2\] or \[2, 3, 2\]"),
        ({"router": torch.zeros(1, 2)}, (), ValueError, r"router is \[1, 2\]"),
        ({"down_bias": torch.zeros(1)}, (), ValueError, r"down_bias is \[1\]; expected \[4\], after down_weight"),
        ({"up_bias": torch.zeros(1, 8)}, (), ValueError, r"up_bias is \[1, 8\]; expected \[2, 8\], after up_weight"),
        ({"up_weight": UP.long()}, (), TypeError, "up_weight is torch.int64; expected a floating dtype"),
        ({"router": ROUTER.to("meta")}, (), ValueError, "router is on meta but x on cpu; move one"),
    ],
)
def test_errors(changes: dict[str, Any], options: tuple[Any, ...], error: type[Exception], message: str) -> None:
    tensors: Tensors = {
        "x": X,
        "down_weight": DOWN,
        "down_bias": torch.zeros(4),
        "up_weight": UP,
        "up_bias": torch.zeros(2, 8),
        "router": ROUTER,
    }
    with pytest.raises(error, match=f"mixture_adapter: .*{message}"):
        mixture_adapter(*(tensors | changes).values(), *options)


def test_cpp_checks_what_it_is_given() -> None:
    module, view = extension.module(), extension.view
    x, down, up, y = torch.zeros(2, 3, 64), torch.zeros(8, 64), torch.zeros(2, 5, 64), torch.zeros(2, 3, 64)

    def forward(x: Tensor, down: Tensor, up: Tensor, y: Tensor, activation: str = "identity") -> None:
        module.mixture_adapter_fwd_cpu(view(x), view(down), None, view(up), 2, 1, activation, None, 0, view(y), None, 1)

    forward(x, down, up, y)
    with pytest.raises(ValueError, match=r"up is float32\[2, 4, 64\]; expected float32\[2, 5, 64\]"):
        forward(x, down, up[:, :4].contiguous(), y)
    with pytest.raises(ValueError, match="groups and 1 downs do not divide"):
        forward(x, down[:7], up, y)
    with pytest.raises(ValueError, match=r"y is float16\[2, 3, 64\]; expected float32"):
        forward(x, down, up, y.half())
    with pytest.raises(ValueError, match="activation is tanh"):
        forward(x, down, up, y, "tanh")
    with pytest.raises(ValueError, match="no kernel for float64"):
        forward(x.double(), down, up, y.double())

    def backward(x: Tensor | None, z: Tensor | None, **gradients: Tensor) -> None:
        outputs = [gradients.get(name) for name in ("x", "down", "bias", "up")]
        views = map(extension.optional_view, outputs)
        module.mixture_adapter_bwd_cpu(
            view(y), extension.optional_view(x), extension.optional_view(z), view(down), view(up), 2, 1, "identity",
            None, 0, *views, 1,
        )  # fmt: skip

    with pytest.raises(ValueError, match="grad_down needs x"):
        backward(None, None, down=torch.empty_like(down))
    with pytest.raises(ValueError, match="z is missing"):
        backward(x, None, up=torch.empty_like(up))


# ---- how the Triton kernels are launched


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched() -> None:
    kernels = pytest.importorskip("mmfast.kernels.mixture_adapter")
    cases = kernels.compile_cases()
    assert {case["fn"] for case in cases} == {kernels._fwd_kernel, kernels._bwd_rows_kernel, kernels._outer_kernel}
    compiled = {(case["fn"], *(case["constexprs"][f"BLOCK_{letter}"] for letter in "MNR")) for case in cases}
    for ranks, size in itertools.product((1, 8, 16, 20, 40, 64, 100, TRITON_RANKS), (2, 4)):
        for fn, tile in (
            (kernels._fwd_kernel, kernels.row_tile(ranks, size)),
            (kernels._outer_kernel, kernels.outer_tile(ranks, size)),
        ):
            assert tile.ranks >= ranks
            assert (fn, *tile[:3]) in compiled


def test_chunks_of_rows_cover_all_and_every_processor_has_work() -> None:
    kernels = pytest.importorskip("mmfast.kernels.mixture_adapter")
    for tokens, batch, columns in itertools.product((1, 300, 2048, 16384), (1, 8, 64), (1024, 4096)):
        tile = kernels.outer_tile(8, 2)
        blocks = -(-columns // tile.columns)
        rows = kernels.chunk(tokens, batch, blocks, tile.rows, 132)
        assert rows % tile.rows == 0
        assert rows >= kernels.LEAST_ROWS
        if tokens * batch * blocks >= 264 * kernels.LEAST_ROWS and rows > kernels.LEAST_ROWS:
            assert batch * blocks * -(-tokens // rows) >= 132
