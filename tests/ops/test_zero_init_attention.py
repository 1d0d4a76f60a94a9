"""zero_init_attention: the equation, the op in PyTorch, the choice of a backend, errors."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import BACKENDS
from torch import Tensor
from zero_init_cases import NAMES, double, run, some

from mmfast.ops import BackendUnavailable, explain, use_backend, zero_init_attention
from mmfast.ops.backends import Machine
from mmfast.ops.zero_init_attention import LEAST, MOST_TRITON_DIM_FP32, OP, check, reference

# ---- the equation


def official(tensors: dict[str, Tensor], mask: Tensor, activation: Any = torch.tanh) -> Tensor:
    """The training code of LLaMA-Adapter: one matrix of scores, prompts first, and two softmaxes."""
    query, key, value, prompt_key, prompt_value, gate = tensors.values()
    batch, heads, prompts = query.shape[0], query.shape[1], prompt_key.shape[1]
    key, value = (
        torch.cat([few.expand(batch, *few.shape), many], 2) for few, many in ((prompt_key, key), (prompt_value, value))
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    scores = torch.cat([scores[..., :prompts], scores[..., prompts:] + mask], -1)
    of_prompts, of_words = scores[..., :prompts].softmax(-1), scores[..., prompts:].softmax(-1)
    return torch.cat([activation(gate).view(-1, heads, 1, 1) * of_prompts, of_words], -1) @ value


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_reference_is_the_official_code(activation: str) -> None:
    tensors = double(some(length=7))
    mask = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)
    act = torch.tanh if activation == "tanh" else lambda gate: gate
    exact = run(lambda *a: official(dict(zip(NAMES, a, strict=True)), mask, act), tensors)
    found = run(reference, tensors, is_causal=True, gate_activation=activation)
    for name, wanted in exact.items():
        torch.testing.assert_close(found[name], wanted)


def test_reference_by_hand() -> None:
    one = torch.ones(1, 1, 1, 1)
    keys = torch.tensor([[[math.log(3.0)], [0.0]]])  # weights 3/4 and 1/4
    values = torch.tensor([[[8.0], [4.0]]])
    out = reference(one, one, 5 * one, keys, values, torch.tensor(2.0), gate_activation="identity")
    assert out.item() == pytest.approx(5 + 2 * 7)
    assert reference(one, one, one, keys, values, torch.tensor(0.5)).item() == pytest.approx(1 + 7 * math.tanh(0.5))
    per_head = reference(one, one, one, keys, values, torch.tensor([2.0]), scale=0.0, gate_activation="identity")
    assert per_head.item() == pytest.approx(1 + 2 * 6)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_gradcheck_of_the_reference(activation: str, per_sample: bool) -> None:
    tensors = [x.requires_grad_() for x in double(some(2, 2, 3, 4, 3, key_heads=1, per_sample=per_sample)).values()]
    assert torch.autograd.gradcheck(lambda *a: reference(*a, gate_activation=activation), tensors)


def test_the_order_of_the_prompts_does_not_matter() -> None:
    tensors = double(some(prompts=7))
    order = torch.randperm(7)
    shuffled = tensors | {name: tensors[name][:, order] for name in ("prompt_key", "prompt_value")}
    torch.testing.assert_close(reference(*shuffled.values()), reference(*tensors.values()))


# ---- the op in PyTorch


@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(per_sample: bool) -> None:
    ops = torch.ops.mmfast
    query, key, value, prompt_key, prompt_value, gate = some(heads=4, key_heads=2, per_sample=per_sample).values()
    words = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    arguments = query, prompt_key, prompt_value, gate, 0.25
    torch.library.opcheck(ops.zero_init_attention_fwd.default, (words, *arguments, "cpu"))
    for needs in ((True, True, True, True), (False, True, False, True), (True, False, False, False)):
        torch.library.opcheck(ops.zero_init_attention_bwd.default, (words, *arguments, *needs, "cpu"))
    lse = torch.zeros(query.shape[:3])
    for needs in ([True] * 6, [False, True, False, False, True, False], [True, False, False, True, False, True]):
        torch.library.opcheck(
            ops.zero_init_attention_both_bwd.default,
            (words, words, lse, query, prompt_key, prompt_value, gate, key, value, True, 0.25, needs, "cpu"),
        )


@pytest.mark.parametrize("backend", ["cpu", None])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, backend: str | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(zero_init_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (3, 5, 1100):
        tensors = some(1, 2, length, 16)
        found, wanted = (run(f, tensors, is_causal=True, backend=backend) for f in (compiled, zero_init_attention))
        torch.testing.assert_close(found, wanted)


def test_saved_bytes() -> None:
    tensors = some(1, 2, 256, 16, dtype=torch.bfloat16)
    for x in tensors.values():
        x.requires_grad_()
    words = F.scaled_dot_product_attention(*list(tensors.values())[:3])
    by_words, by_all = ({}, {})
    for saved, function in (
        (by_words, lambda: F.scaled_dot_product_attention(*list(tensors.values())[:3])),
        (by_all, lambda: zero_init_attention(*tensors.values(), backend="cpu")),
    ):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.setdefault(x.data_ptr(), x), lambda x: x
        ):
            function()
    existing = {x.data_ptr() for x in tensors.values()}
    extra = [x.nbytes for address, x in by_all.items() if address not in existing]
    plain = [x.nbytes for address, x in by_words.items() if address not in existing]
    assert sum(extra) - sum(plain) <= 2 * 4 * tensors["gate"].numel()
    assert sum(plain) >= words.nbytes


def test_layout_of_the_output_and_of_the_gradient() -> None:
    tensors = some(2, 4, 6, 16)
    tensors["query"].requires_grad_()
    out = zero_init_attention(*tensors.values(), backend="cpu")
    words = F.scaled_dot_product_attention(*list(tensors.values())[:3])
    assert out.stride() == words.stride()
    assert out.transpose(1, 2).is_contiguous()


def test_no_gradient_where_none_is_wanted() -> None:
    tensors = some()
    tensors["gate"].requires_grad_()
    with torch.no_grad():
        assert not zero_init_attention(*tensors.values(), backend="cpu").requires_grad
    assert not zero_init_attention(*(x.detach() for x in tensors.values()), backend="cpu").requires_grad


@pytest.mark.parametrize("name", ["prompt_value", "value"])
def test_second_derivative_is_refused(name: str) -> None:
    tensors = some()
    tensors[name].requires_grad_()
    out = zero_init_attention(*tensors.values(), backend="cpu")
    (gradient,) = torch.autograd.grad(out, tensors[name], torch.ones_like(out, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_autocast_as_in_plain_attention(backend: str) -> None:
    tensors = some(length=20)
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    leaves = [x.requires_grad_() for x in tensors.values()]
    with torch.autocast("cpu", dtype=dtype):
        output = zero_init_attention(*leaves, backend=backend)
        plain = F.scaled_dot_product_attention(*leaves[:3])
    assert output.dtype == plain.dtype == dtype
    output.backward(torch.ones_like(output))
    exact = run(reference, double(tensors), grad=torch.ones_like(output))
    torch.testing.assert_close(output.double(), exact["output"], rtol=3e-2, atol=3e-2)
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - exact[f"grad {name}"]).norm() <= 2e-2 * exact[f"grad {name}"].norm() + 1e-2


# ---- the choice of a backend

H200 = Machine("cuda", (9, 0))


def sized(length: int, dim: int = 64, prompts: int = 10, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Arguments without memory, of one head."""
    zero = torch.zeros((), dtype=dtype)
    words, few = zero.expand(1, 1, length, dim), torch.zeros(1, dtype=dtype).expand(1, prompts, dim)
    query = torch.empty((1, 1, length, dim), dtype=dtype, device="cpu")
    return [query, words, words, few, few, torch.zeros(1)]


def decoding(batch: int, per_sample: bool = False) -> list[Tensor]:
    """One row of many heads for each sample."""
    query, few = torch.empty(batch, 128, 1, 128), torch.zeros(1).expand(128, 10, 128)
    few = few.expand(batch, 128, 10, 128) if per_sample else few
    return [query, query, query, few, few, torch.zeros(1)]


LARGE = LEAST["elements"] // 64


@pytest.mark.parametrize(
    ("arguments", "on", "request_", "chosen"),
    [
        (sized(LARGE), Machine("cpu"), None, "cpu"),
        (sized(LARGE - 1), Machine("cpu"), None, "reference"),
        (sized(3), Machine("cpu"), "cpu", "cpu"),
        (decoding(LEAST["rows"]), Machine("cpu"), None, "cpu"),
        (decoding(LEAST["rows"] - 1), Machine("cpu"), None, "reference"),
        (decoding(LEAST["rows"], per_sample=True), Machine("cpu"), None, "reference"),
        (sized(LARGE, prompts=33), Machine("cpu"), None, "reference"),
        (sized(LARGE, dim=257), Machine("cpu"), None, "reference"),
        (sized(LARGE, dtype=torch.float64), Machine("cpu"), None, "reference"),
        (sized(LARGE), Machine("cpu", no_extension="not built"), None, "reference"),
        (sized(3), Machine("cpu", triton_interpreted=True), "triton", "triton"),
        (sized(3), H200, None, "triton"),
        (sized(3, dim=256, dtype=torch.bfloat16), H200, None, "triton"),
        (sized(3, dim=MOST_TRITON_DIM_FP32 + 1), H200, None, "reference"),
        (sized(3, prompts=33), H200, None, "reference"),
        (sized(3), Machine("cuda", (7, 5)), None, "reference"),
        (sized(3), Machine("mps"), None, "reference"),
    ],
)
def test_selection(arguments: list[Tensor], on: Machine, request_: str | None, chosen: str) -> None:
    assert OP.select(check(*arguments), on, request_) == chosen


@pytest.mark.parametrize(
    ("arguments", "request_", "reason"),
    [
        (sized(3, dtype=torch.float64), "cpu", "there is no float64 kernel"),
        (sized(3, prompts=40), "cpu", "there are 40 prompts of 64 numbers; the kernel holds 32 of 256"),
        (sized(3, dim=65), "triton", "head_dim is 65; in float32 the kernel holds 64"),
        ([sized(64)[0].transpose(2, 3), *sized(64)[1:]], "cpu", "the last dimension of query has stride 64"),
    ],
)
def test_impossible_request(arguments: list[Tensor], request_: str, reason: str) -> None:
    on = Machine("cpu", triton_interpreted=True)
    with pytest.raises(BackendUnavailable, match=f"zero_init_attention: backend '{request_}' cannot .*{reason}"):
        OP.select(check(*arguments), on, request_)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("backend", [None, *BACKENDS, "reference"])
def test_words_that_are_given_are_taken(backend: str | None, strided: bool) -> None:
    tensors = some(key_heads=2)
    words = torch.randn_like(tensors["query"])
    words = words.mT.contiguous().mT if strided else words.transpose(1, 2).contiguous().transpose(1, 2)

    def ours(words: Tensor, **rest: Tensor) -> Tensor:
        return zero_init_attention(*rest.values(), is_causal=True, words=words, backend=backend)

    def added(words: Tensor, **rest: Tensor) -> Tensor:
        return (
            words + reference(*rest.values()) - reference(*(rest | {"gate": torch.zeros_like(rest["gate"])}).values())
        )

    tensors = {"words": words, **tensors}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    out, expected = ours(**leaves), added(**exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for name in ("words", "query", "prompt_key", "prompt_value", "gate"):
        torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)
    assert leaves["key"].grad is None and leaves["value"].grad is None


def test_explain() -> None:
    assert explain(zero_init_attention, *sized(2)).splitlines() == [
        "zero_init_attention runs on: reference",
        f"  cpu: query has 128 elements; below {LEAST['elements']} the reference is faster",
        "  triton: the Triton interpreter is for tests; ask for it by name",
    ]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_the_backend_asked_for_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, ran = sys.modules[OP.check.__module__], []
    fwd, ref = module._FWD, module.reference
    monkeypatch.setattr(module, "_FWD", lambda *arguments: ran.append(arguments[-1]) or fwd(*arguments))
    monkeypatch.setattr(module, "reference", lambda *arguments: ran.append("reference") or ref(*arguments))
    tensors = some()
    zero_init_attention(*tensors.values(), backend=backend)
    with use_backend(backend):
        zero_init_attention(*tensors.values())
    assert ran == [backend, backend]


def test_a_small_call_takes_the_reference_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[OP.check.__module__]
    monkeypatch.setattr(module, "check", lambda *arguments: pytest.fail("checked"))
    for sizes in ({}, {"key_heads": 2}, {"per_sample": True}, {"gate": ()}):
        tensors = some(**sizes)
        assert torch.equal(zero_init_attention(*tensors.values()), reference(*tensors.values()))


Q, P, G = torch.zeros(2, 4, 3, 8), torch.zeros(4, 5, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0], Q, Q, P, P, G), ValueError, r"query is \[4, 3, 8\]; expected \[B, H, L, D\]"),
        ((Q, Q[:1], Q[:1], P, P, G), ValueError, r"key is \[1, 4, 3, 8\] and value \[1, 4, 3, 8\] but query"),
        ((Q, Q, Q[:, :2], P, P, G), ValueError, r"key is \[2, 4, 3, 8\] and value \[2, 2, 3, 8\]"),
        ((Q, Q[:, :3], Q[:, :3], P[:3], P[:3], G), ValueError, "query has 4 heads and key 3; expected a multiple"),
        ((Q, Q, Q, P[:1], P[:1], G), ValueError, r"prompt_key is \[1, 5, 8\] .*\[Hkv, P, D\] = \[4, P, 8\]"),
        ((Q, Q, Q, P[:, :0], P[:, :0], G), ValueError, r"prompt_key is \[4, 0, 8\] .*P > 0"),
        ((Q, Q, Q, P.expand(1, 4, 5, 8), P.expand(1, 4, 5, 8), G), ValueError, r"prompt_key is \[1, 4, 5, 8\]"),
        ((Q, Q, Q, P, P[:, :4], G), ValueError, r"prompt_key is \[4, 5, 8\] and prompt_value \[4, 4, 8\]"),
        ((Q, Q, Q, P, P, G[:3]), ValueError, r"gate is \[3\]; expected one number, \[\] or \[1\], .* \[H\] = \[4\]"),
        ((Q, Q, Q, P, P, G.long()), TypeError, "gate is torch.int64; expected a floating dtype"),
        ((Q, Q, Q, P, P, G, None, False, None, "relu"), ValueError, "gate_activation is 'relu'; use one of tanh, id"),
        ((Q, Q, Q, P.half(), P.half(), G), TypeError, "query is torch.float32 and prompt_key is torch.float16"),
        ((Q, Q.half(), Q, P, P, G), TypeError, "query is torch.float32 and key is torch.float16; expected one dtype"),
        ((Q.long(), Q.long(), Q.long(), P.long(), P.long(), G), TypeError, "query is torch.int64; expected one of"),
        ((Q, Q, Q, P, P.to("meta"), G), ValueError, "prompt_value is on meta but query on cpu; move one"),
        (
            (Q, Q, Q, P, P, G, None, False, None, "tanh", Q[:1]),
            ValueError,
            r"words is \[1, 4, 3, 8\]; expected the shape",
        ),
        (
            (Q, Q, Q, P, P, G, None, False, None, "tanh", Q.half()),
            TypeError,
            "query is .*32 and words is torch.float16",
        ),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"zero_init_attention: {message}"):
        zero_init_attention(*arguments)
