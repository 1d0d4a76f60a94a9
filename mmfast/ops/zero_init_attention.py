"""Attention to words plus gated attention to a few prompts, each with a softmax of its own (LLaMA-Adapter)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from mmfast.ops import backends, crossovers, extension
from mmfast.ops.backends import Backend, Machine, Op, Size

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GATE_ACTIVATIONS = ("tanh", "identity")

# What the kernels hold on chip.
MOST_PROMPTS, MOST_DIM, MOST_TRITON_DIM_FP32 = 32, 256, 64
# Elements of the query, and rows that share a set of prompts (which is packed first), from which the prompts' part is
# faster on a CPU than in the reference.
LEAST = crossovers.CPU.cpu("zero_init_attention")
FLASH = SDPBackend.FLASH_ATTENTION.value


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    gate_activation: str = "tanh",
    words: Tensor | None = None,
) -> Tensor:
    """The definition: zero-initialised attention of LLaMA-Adapter.

        words_h = softmax(query_h key_hᵀ · scale + mask) value_h
        out_h = words_h + act(gate_h) · softmax(query_h prompt_key_hᵀ · scale) prompt_value_h

    Every query attends to every prompt: `attn_mask` and `is_causal` concern the words alone, and so does a rotary
    embedding, which the prompts' keys do not get. Where act(gate_h) is 0, out_h has the bits of words_h, whatever the
    prompts hold (NaN included), and the gate still has its gradient.

    Args:
        query: [B, H, L, D] (fp32, fp16, bf16, fp64; any strides).
        key, value: [B, Hkv, S, D], of the words; H a multiple of Hkv (grouped queries).
        prompt_key, prompt_value: [Hkv, P, D], shared by the batch, or [B, Hkv, P, D], one set for each sample.
        gate: one number ([] or [1]) or one for each head ([H], or [1, H, 1, 1] as in checkpoints); any floating dtype.
        attn_mask, is_causal: as in `F.scaled_dot_product_attention`.
        scale: of both products, default 1 / sqrt(D).
        gate_activation: act, "tanh" (the training code) or "identity" (the paper, the inference code, PEFT, LitGPT).
        words: [B, H, L, D], the words' part, where it has been computed by other means.

    Returns:
        [B, H, L, D] in the dtype of `query` (autocast's under autocast).

    Numerics: act(gate) in fp32, product and sum in fp32, rounded once.

    Source: Zhang et al., "LLaMA-Adapter" (arXiv 2303.16199), equations 6 to 8; OpenGVLab/LLaMA-Adapter,
    alpaca_finetuning_v1/llama/model.py:99-129 (one matrix of scores, two softmaxes) and llama/model.py:135-152.
    """
    if words is None:
        words = _words(query, key, value, attn_mask, is_causal, scale)
    if prompt_key.dim() == 3:
        prompt_key, prompt_value = (x.expand(query.shape[0], *x.shape) for x in (prompt_key, prompt_value))
    prompts = _words(query, prompt_key, prompt_value, None, False, scale)
    act = _activated(gate, query, gate_activation)[:, None, None]
    if torch.is_grad_enabled():
        return _GatedSum.apply(words, prompts, act)
    return _gated_sum(words, prompts, act)


def _words(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        # Asked, not passed on: while torch.compile traces with dynamic sizes, the comparison is no bool.
        enable_gqa=True if key.shape[1] != query.shape[1] else False,  # noqa: SIM210
    )


def _activated(gate: Tensor, query: Tensor, gate_activation: str) -> Tensor:
    """act(gate) [H] in fp32, or fp64 for fp64."""
    gate = gate.reshape(-1).to(torch.float64 if query.dtype == torch.float64 else torch.float32)
    act = gate.tanh() if gate_activation == "tanh" else gate
    return act.expand(query.shape[1])


def _gated_sum(words: Tensor, prompts: Tensor, act: Tensor) -> Tensor:
    return torch.where(act == 0, words, (words + act * prompts).to(words.dtype))


class _GatedSum(torch.autograd.Function):
    """words + act · prompts. Where act is 0, `torch.where` alone would leave it without a gradient."""

    @staticmethod
    def forward(ctx: Any, words: Tensor, prompts: Tensor, act: Tensor) -> Tensor:
        ctx.save_for_backward(prompts, act)
        return _gated_sum(words, prompts, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        prompts, act = ctx.saved_tensors
        _, need_prompts, need_act = ctx.needs_input_grad
        grad_prompts = (grad * act).to(prompts.dtype) if need_prompts else None
        grad_act = (grad.to(act.dtype) * prompts).sum_to_size(act.shape) if need_act else None
        return grad, grad_prompts, grad_act


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    gate: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    gate_activation: str
    words: Tensor | None

    @property
    def device(self) -> torch.device:
        return self.query.device


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    gate_activation: str = "tanh",
    words: Tensor | None = None,
) -> Call:
    """The arguments of `zero_init_attention`, checked."""
    where = "zero_init_attention"
    if gate_activation not in GATE_ACTIVATIONS:
        raise ValueError(f"{where}: gate_activation is {gate_activation!r}; use one of {', '.join(GATE_ACTIVATIONS)}")
    if query.dim() != 4:
        raise ValueError(f"{where}: query is {list(query.shape)}; expected [B, H, L, D]")
    batch, heads, _, dim = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != dim or key.shape != value.shape:
        raise ValueError(
            f"{where}: key is {list(key.shape)} and value {list(value.shape)} but query {list(query.shape)}; expected "
            f"[B, Hkv, S, D] = [{batch}, Hkv, S, {dim}] for both"
        )
    key_heads = key.shape[1]
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"{where}: query has {heads} heads and key {key_heads}; expected a multiple of key's")
    prompts = prompt_key.shape[-2] if prompt_key.dim() > 1 else 0
    shared = (key_heads, prompts, dim)
    if prompts == 0 or prompt_key.shape not in (shared, (batch, *shared)) or prompt_key.shape != prompt_value.shape:
        raise ValueError(
            f"{where}: prompt_key is {list(prompt_key.shape)} and prompt_value {list(prompt_value.shape)}; expected "
            f"[Hkv, P, D] = [{key_heads}, P, {dim}] or [B, Hkv, P, D] = [{batch}, {key_heads}, P, {dim}] for both, "
            "P > 0"
        )
    if gate.shape not in ((), (1,), (heads,), (1, heads, 1, 1)):
        raise ValueError(
            f"{where}: gate is {list(gate.shape)}; expected one number, [] or [1], or one for each head, [H] = "
            f"[{heads}] or [1, H, 1, 1]"
        )
    if not gate.dtype.is_floating_point:
        raise TypeError(f"{where}: gate is {gate.dtype}; expected a floating dtype")
    if words is not None and words.shape != query.shape:
        raise ValueError(f"{where}: words is {list(words.shape)}; expected the shape of query, {list(query.shape)}")
    tensors = {"key": key, "value": value, "prompt_key": prompt_key, "prompt_value": prompt_value, "gate": gate}
    tensors |= {} if words is None else {"words": words}
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{where}: {name} is on {tensor.device} but query on {query.device}; move one")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        prompt_key, prompt_value = prompt_key.to(dtype), prompt_value.to(dtype)
        words = None if words is None else words.to(dtype)
    if query.dtype not in DTYPES:
        raise TypeError(f"{where}: query is {query.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    cast = [("key", key), ("value", value), ("prompt_key", prompt_key), ("prompt_value", prompt_value)]
    cast += [] if words is None else [("words", words)]
    for name, tensor in cast:
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{where}: query is {query.dtype} and {name} is {tensor.dtype}; expected one dtype; cast one, or call "
                "under torch.autocast"
            )
    return Call(query, key, value, prompt_key, prompt_value, gate, attn_mask, is_causal, scale, gate_activation, words)


def _cannot(call: Call, machine: Machine) -> str | None:
    prompts, dim = call.prompt_key.shape[-2:]
    if dim > 1 and call.query.stride(3) != 1:
        return f"the last dimension of query has stride {call.query.stride(3)}; the kernel needs 1"
    if call.query.dtype == torch.float64:
        return "there is no float64 kernel"
    if prompts > MOST_PROMPTS or dim > MOST_DIM:
        return f"there are {prompts} prompts of {dim} numbers; the kernel holds {MOST_PROMPTS} of {MOST_DIM}"
    return None


def _triton_cannot(call: Call, machine: Machine) -> str | None:
    dim = call.query.shape[3]
    if call.query.dtype == torch.float32 and dim > MOST_TRITON_DIM_FP32:
        return f"head_dim is {dim}; in float32 the kernel holds {MOST_TRITON_DIM_FP32}"
    return _cannot(call, machine)


def _rows(query: Tensor, prompt_key: Tensor) -> int:
    """Rows of the query for each set of prompts of one head."""
    sets = prompt_key.shape[:-2].numel()
    return query.shape[:-1].numel() // max(sets, 1)


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    return (
        Size("elements", call.query.numel(), "query has {} elements"),
        Size("rows", _rows(call.query, call.prompt_key), "{} rows of query share a set of prompts"),
    )


OP = Op(
    "zero_init_attention",
    check,
    (Backend("cpu", _cannot), Backend("triton", _triton_cannot), Backend("reference")),
    _sizes,
)


def _is_small(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    gate_activation: str,
    words: Tensor | None,
    backend: str | None,
) -> bool:
    """Whether `OP.select` would take the reference for a call whose mistakes, if it has any, PyTorch's ops find."""
    if not backends.plain((query, key, value, prompt_key, prompt_value, gate, words), backend):
        return False
    if query.dim() != 4 or gate_activation not in GATE_ACTIVATIONS:
        return False
    if query.numel() >= LEAST["elements"] and _rows(query, prompt_key) >= LEAST["rows"]:
        return False
    batch, heads, _, dim = query.shape
    # What broadcasting could let pass is left to the check.
    return (
        key.dim() == 4
        and key.shape[::3] == (batch, dim)
        and key.shape == value.shape
        and prompt_key.dtype == query.dtype
        and prompt_key.numel() > 0
        and prompt_key.shape[-3::2] == (key.shape[1], dim)
        and (prompt_key.dim() == 3 or prompt_key.shape[:-3] == (batch,))
        and prompt_key.shape == prompt_value.shape
        and gate.shape in ((), (1,), (heads,), (1, heads, 1, 1))
        and (words is None or (words.shape == query.shape and words.dtype == query.dtype))
    )


def _fwd_fake(
    words: Tensor, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, act: Tensor, scale: float, backend: str
) -> Tensor:
    return torch.empty_like(words)


def _fwd_cpu(
    words: Tensor, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, act: Tensor, scale: float
) -> Tensor:
    out = torch.empty_like(words)
    tensors = words, query, prompt_key, prompt_value, act
    extension.module().zero_init_attention_fwd_cpu(
        *map(extension.view, tensors), scale, extension.view(out), torch.get_num_threads()
    )
    return out


def _fwd_triton(
    words: Tensor, query: Tensor, prompt_key: Tensor, prompt_value: Tensor, act: Tensor, scale: float
) -> Tensor:
    from mmfast.kernels.zero_init_attention import forward

    with torch.cuda.device_of(words):
        return forward(words, query, prompt_key, prompt_value, act, scale)


def _empty_gradients(query: Tensor, prompt_key: Tensor, act: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of query, prompt_key, prompt_value and act: for those that are needed."""
    need_query, need_key, need_value, need_act = needs
    return [
        torch.empty_like(query) if need_query else None,
        prompt_key.new_empty(prompt_key.shape) if need_key else None,
        prompt_key.new_empty(prompt_key.shape) if need_value else None,
        act.new_empty(act.shape) if need_act else None,
    ]


def _like_where(needs: Sequence[bool], *tensors: Tensor) -> list[Tensor | None]:
    return [torch.empty_like(x) if need else None for x, need in zip(tensors, needs, strict=True)]


def _bwd_fake(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    act: Tensor,
    scale: float,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_act: bool,
    backend: str,
) -> list[Tensor]:
    found = _empty_gradients(query, prompt_key, act, (need_query, need_key, need_value, need_act))
    return [gradient for gradient in found if gradient is not None]


def _bwd_cpu(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    act: Tensor,
    scale: float,
    *needs: bool,
) -> list[Tensor]:
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    found = _empty_gradients(query, prompt_key, act, needs)
    extension.module().zero_init_attention_bwd_cpu(
        *map(extension.view, (grad, query, prompt_key, prompt_value, act)),
        scale,
        *map(extension.optional_view, found),
        torch.get_num_threads(),
    )
    return [gradient for gradient in found if gradient is not None]


def _both_bwd_fake(grad: Tensor, words: Tensor, lse: Tensor, *arguments: Any) -> list[Tensor]:
    query, prompt_key, _, act, key, value, _, _, needs, _ = arguments
    found = _empty_gradients(query, prompt_key, act, needs[:4]) + _like_where(needs[4:], key, value)
    return [gradient for gradient in found if gradient is not None]


def _both_bwd_cpu(
    grad: Tensor,
    words: Tensor,
    lse: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    act: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    found = _bwd_cpu(grad, query, prompt_key, prompt_value, act, scale, *needs[:4])
    of_words = _like_where(needs[4:], key, value)
    extension.module().flash_attention_bwd_cpu(
        *map(extension.view, (grad, query, words, lse, key, value)),
        is_causal,
        scale,
        *map(extension.optional_view, (found[0] if needs[0] else None, *of_words)),
        torch.get_num_threads(),
    )
    return found + [gradient for gradient in of_words if gradient is not None]


def _bwd_triton(
    grad: Tensor,
    query: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    act: Tensor,
    scale: float,
    *needs: bool,
) -> list[Tensor]:
    from mmfast.kernels.zero_init_attention import backward

    found = _empty_gradients(query, prompt_key, act, needs)
    with torch.cuda.device_of(grad):
        backward(grad, query, prompt_key, prompt_value, act, scale, *found)
    return [gradient for gradient in found if gradient is not None]


_FWD = backends.define(
    "zero_init_attention_fwd",
    "(Tensor words, Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor act, float scale) -> Tensor",
    _fwd_fake,
    {"cpu": _fwd_cpu, "triton": _fwd_triton},
)
_BWD = backends.define(
    "zero_init_attention_bwd",
    "(Tensor grad, Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor act, float scale, bool need_query, "
    "bool need_key, bool need_value, bool need_act) -> Tensor[]",
    _bwd_fake,
    {"cpu": _bwd_cpu, "triton": _bwd_triton},
)


_BOTH_BWD = backends.define(
    "zero_init_attention_both_bwd",
    "(Tensor grad, Tensor words, Tensor lse, Tensor query, Tensor prompt_key, Tensor prompt_value, Tensor act, Tensor "
    "key, Tensor value, bool is_causal, float scale, bool[] needs) -> Tensor[]",
    _both_bwd_fake,
    {"cpu": _both_bwd_cpu},
)


class _AddPrompts(torch.autograd.Function):
    """The prompts' part. Saves its arguments but `words`: backward makes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        query: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        act: Tensor,
        scale: float,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(query, prompt_key, prompt_value, act)
        ctx.settings = scale, backend
        return _FWD(words, query, prompt_key, prompt_value, act, scale, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: gradient checkpointing hands each tensor out a single time
        prompt_key = saved[1]
        _, need_query, need_key, *rest, _, _ = ctx.needs_input_grad
        # The weight of one prompt is 1, whatever query and key are.
        depends = prompt_key.shape[-2] > 1
        needs = (need_query and depends, need_key and depends, *rest)
        found = iter(_BWD(grad, *saved, ctx.settings[0], *needs, ctx.settings[1]) if any(needs) else ())
        gradients = [next(found) if need else None for need in needs]
        if need_key and not depends:
            gradients[1] = torch.zeros_like(prompt_key)
        return grad, *gradients, None, None


class _Both(torch.autograd.Function):
    """PyTorch's flash attention to the words, bit for bit, and the prompts' part. Saves what flash attention saves, the
    prompts and `act`; backward is ours for both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        act: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        words, lse = flash(query, key, value, 0.0, is_causal, scale=scale)
        ctx.save_for_backward(words, lse, query, prompt_key, prompt_value, act, key, value)
        ctx.settings = is_causal, scale
        return _FWD(words, query, prompt_key, prompt_value, act, scale, "cpu")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:6])
        found = iter(_BOTH_BWD(grad, *ctx.saved_tensors, *ctx.settings, needs, "cpu"))
        return *(next(found) if need else None for need in needs), None, None


def _takes_both(backend: str, call: Call) -> bool:
    """Whether the C++ kernels make the words' gradients too: where PyTorch's flash attention makes the words' part."""
    query, key, value = call[:3]
    return (
        backend == "cpu"
        and call.words is None
        and call.attn_mask is None
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (query, key, value))
        and not torch.compiler.is_compiling()
        and (query.shape[3] == 1 or key.stride(3) == value.stride(3) == 1)
        and torch._fused_sdp_choice(query, key, value, None, 0.0, call.is_causal, scale=call.scale, enable_gqa=True)
        == FLASH
    )


def zero_init_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    gate: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    gate_activation: str = "tanh",
    words: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attention to the words plus gated attention to the prompts, two softmaxes: `reference` says what exactly.

    The words' part is `F.scaled_dot_product_attention`, whatever implementation that picks; where that is flash
    attention on a CPU, our kernels make its gradients. The prompts' part is one pass that reads query and the words'
    part and writes their sum, in the layout of the words' part, with the prompts on chip; memory grows with L, never
    with L · P or L · S. Saved for backward, beside what the words' part saves: query, prompts and act(gate), no copies
    of them. One pass over query and the gradient gives those of the prompts' part that are wanted. Differentiable once.

    Args:
        query: [B, H, L, D] (fp32, fp16, bf16; fp64 on the reference), any strides; views of [B, L, H, D] are best.
        key, value: [B, Hkv, S, D], of the words; H a multiple of Hkv.
        prompt_key, prompt_value: [Hkv, P, D] or [B, Hkv, P, D], kernels take up to 32 prompts and D up to 256.
        gate (any floating dtype): one number, [] or [1], or one for each head, [H] or [1, H, 1, 1].
        attn_mask, is_causal: as in `F.scaled_dot_product_attention`, for the words alone.
        scale: of both products, default 1 / sqrt(D).
        gate_activation: "tanh" or "identity".
        words: [B, H, L, D], the words' part, if another attention has computed it (FlashAttention, a paged cache); of
            key and value only the shapes count then, and attn_mask and is_causal do not.
        backend: of the prompts' part: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [B, H, L, D] in the dtype of `query`; under autocast in autocast's, to which all but the gate are cast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: scores, softmax and sums in fp32 (products in the dtype of `query` on a GPU and in AMX tiles), rounded
    once. Where act(gate) is 0 the output has the bits of the words' part, and the gate still has its gradient. Our
    kernels sum gradients in fp32 in a fixed order: deterministic, on any number of threads.

    Source: Zhang et al., "LLaMA-Adapter" (arXiv 2303.16199), section 3.2, and its code: see `reference`.
    """
    tensors = query, key, value, prompt_key, prompt_value, gate
    arguments = *tensors, attn_mask, is_causal, scale, gate_activation, words
    if _is_small(*tensors, gate_activation, words, backend):
        return backends.checked_late(reference, check, *arguments)
    call = check(*arguments)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    prompts = call.query, call.prompt_key, call.prompt_value, _activated(gate, query, gate_activation)
    if _takes_both(chosen, call):
        return _Both.apply(*prompts, call.key, call.value, is_causal, factor)
    if call.words is None:
        words = _words(*call[:3], attn_mask, is_causal, scale)
    else:
        words = call.words if call.words.stride(3) == 1 else call.words.contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (words, *prompts)):
        return _AddPrompts.apply(words, *prompts, factor, chosen)
    return _FWD(words, *prompts, factor, chosen)
