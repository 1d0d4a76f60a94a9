"""The calls that are counted, one or two of each op, and what is declared of them.

Sizes differ from each other, so that no two figures agree by chance. What has large products is in fp32, since a CPU
may make those of 16 bits in another dtype (`mmfast.ops.products.compute_dtype`); all else is in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import ops

BF16, FP32 = torch.bfloat16, torch.float32
BATCH, LENGTH, WIDTH, COLUMNS, RANKS = 2, 80, 192, 320, 8
ROWS = BATCH * LENGTH


class Case(NamedTuple):
    """One call.

    Attributes:
        name: the op, then what is special.
        call: with a backend's name, gives the outputs.
        inputs: the tensors that the call takes, by name.
        trained: names of those that get a gradient; none: there is no backward.
        sizes: bytes of other tensors that declarations name.
        without: a backend whose counts would depend on the machine.
    """

    name: str
    call: Callable[[str], Any]
    inputs: dict[str, Tensor]
    trained: tuple[str, ...] = ()
    sizes: Mapping[str, int] = MappingProxyType({})
    without: str = ""


class Declared(NamedTuple):
    """What our op does with memory beyond reading each of its inputs and writing each of its outputs once.

    Each is a formula in the bytes of inputs, of `Case.sizes` and of a `number`.

    Attributes:
        saved: for backward, beside inputs and outputs.
        forward, backward: (bytes read, bytes written) on the CPU; less than none where rows are skipped.
        why: what these are.
    """

    saved: str = "0"
    forward: tuple[str, str] = ("0", "0")
    backward: tuple[str, str] = ("0", "0")
    why: str = ""


NOTHING = Declared()
_QUANTISED = Declared(
    forward=("dense", "dense"),
    backward=("dense", "dense"),
    why="the weight is dequantised for the product; on a CPU block by block, in cache",
)
_FEW_ROWS = Declared(backward=_QUANTISED.backward, why="forward decodes in registers, backward dequantises")
_LABELLED = "mask + indices + targets + losses + correct + number"

DECLARED = {
    "rms_norm, frozen weight, residual": Declared("rstd"),
    "rms_norm, trained weight": Declared(
        "rstd", backward=("2 * weight", "2 * weight"), why="the weight's gradient is summed in fp32, then cast"
    ),
    "gated_residual": Declared(
        forward=("number", "number"),
        backward=("number", "number"),
        why="tanh(gate)",
    ),
    "lora_linear": Declared(
        "s",
        forward=("y + x + s", "y"),
        backward=("y + 2 * s + x", "s + x"),
        why="the low-rank part is written first and the large product adds to it; the gradient of y is read by both",
    ),
    "lora_linear, dropout": Declared(
        "s + seed",
        forward=("y + 2 * x + s + a - seed", "y + x"),
        backward=("y + 2 * s + 3 * x + 2 * a - seed", "s + 3 * x + 2 * a"),
        why="besides, dropout(x) is made in parts that stay in cache, each of which reads A; no mask is stored",
    ),
    "lora_linear_group": Declared(
        "3 * s",
        forward=("y + 3 * x + 3 * s + all_a", "y + all_a"),
        backward=("y + 9 * s + 3 * x + all_a", "6 * s + 3 * x + all_a"),
        why="A's are concatenated, that x may be read once for all; each product reads x, or adds to its gradient",
    ),
    "bias_scale_linear, output": Declared(
        "y",
        forward=("y", "0"),
        backward=("y + bias + scale", "y + bias + scale"),
        why="the product is stored, and its gradient; sums start from zeros",
    ),
    "bias_scale_linear, input": Declared(
        forward=("x", "x"),
        backward=("y + x + bias + scale", "x + bias + scale"),
        why="x ⊙ scale is stored, and its gradient; the bias's gradient is a pass over that of y",
    ),
    "nf4_linear, many rows": _QUANTISED,
    "nf4_linear, few rows": _FEW_ROWS,
    "int8_linear, many rows": _QUANTISED,
    "int8_linear, few rows": _FEW_ROWS,
    "mixture_adapter": Declared(
        "z + 4 * expert + router", why="the merged experts, and for the router those that were merged"
    ),
    "zero_init_attention": Declared(
        "words + lse + act",
        backward=("3 * query", "query"),
        why="the words' kernel comes after the prompts', reads what they read and adds to their gradient of the query",
    ),
    "zero_init_attention, given words": Declared("act"),
    "resampler_attention": Declared("lse"),
    "gated_cross_attention": Declared("lse"),
    "linear_cross_entropy, frozen head": Declared(
        "hidden + 2 * number",
        forward=(
            f"weight + 3 * rows + 2 * logits - hidden + 2 * indices + targets + {_LABELLED}",
            f"3 * rows + 2 * logits + {_LABELLED}",
        ),
        why="rows with a label alone are read, multiplied and multiplied back; their logits become their gradient",
    ),
    "linear_cross_entropy, trained head": Declared(
        "hidden + wide_weight + 2 * number",
        forward=(
            f"2 * weight + 4 * rows + 3 * logits + wide_weight - hidden + 2 * indices + targets + {_LABELLED}",
            f"weight + wide_weight + 3 * rows + 2 * logits + {_LABELLED}",
        ),
        why="besides, the weight's gradient is a 16-bit product that is added to an fp32 sum",
    ),
}


def cases() -> Iterator[Case]:
    """All of them, made anew: with tensors that nobody else holds."""
    for make in (_norms, _rope, _swiglu, _gated_residual, _pool, _lora, _bias_scale, _quantised, _mixture, _attention):
        torch.manual_seed(0)
        yield from make()
    torch.manual_seed(0)
    yield _loss(trained=("hidden",))
    yield _loss(trained=("hidden", "weight"))


def _some(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _norms() -> Iterator[Case]:
    x, residual = _some(ROWS, WIDTH, dtype=BF16), _some(ROWS, WIDTH, dtype=BF16)
    weight, rstd = _some(WIDTH, dtype=BF16), {"rstd": 4 * ROWS}
    yield Case(
        "rms_norm, frozen weight, residual",
        lambda backend: ops.rms_norm(x, weight, residual=residual, backend=backend),
        {"x": x, "weight": weight, "residual": residual},
        ("x", "residual"),
        rstd,
    )
    yield Case(
        "rms_norm, trained weight",
        lambda backend: ops.rms_norm(x, weight, backend=backend),
        {"x": x, "weight": weight},
        ("x", "weight"),
        rstd,
    )


def _rope() -> Iterator[Case]:
    q, k = (_some(BATCH, LENGTH, heads, 32, dtype=BF16).transpose(1, 2) for heads in (6, 2))
    cos, sin = _some(1, LENGTH, 32, dtype=BF16), _some(1, LENGTH, 32, dtype=BF16)
    inputs = {"q": q, "k": k, "cos": cos, "sin": sin}
    yield Case("rope", lambda backend: ops.rope(q, k, cos, sin, backend=backend), inputs, ("q", "k"))


def _swiglu() -> Iterator[Case]:
    gate, up = _some(ROWS, 2 * WIDTH, dtype=BF16).chunk(2, 1)
    inputs = {"gate": gate, "up": up}
    yield Case("swiglu", lambda backend: ops.swiglu(gate, up, backend=backend), inputs, ("gate", "up"))


def _gated_residual() -> Iterator[Case]:
    x, y, gate = _some(ROWS, WIDTH, dtype=BF16), _some(ROWS, WIDTH, dtype=BF16), _some(1)
    inputs = {"x": x, "y": y, "gate": gate}
    yield Case(
        "gated_residual",
        lambda backend: ops.gated_residual(x, y, gate, backend=backend),
        inputs,
        ("x", "y", "gate"),
    )


def _pool() -> Iterator[Case]:
    features, mask = _some(BATCH, 12, 20, WIDTH, dtype=BF16), torch.arange(12) < torch.tensor([[12], [9]])
    yield Case(
        "spatio_temporal_pool",
        lambda backend: ops.spatio_temporal_pool(features, 16, mask, backend=backend),
        {"features": features, "frame_mask": mask},
        ("features",),
    )


def _lora() -> Iterator[Case]:
    x, weight, bias = _some(ROWS, WIDTH), _some(COLUMNS, WIDTH), _some(COLUMNS)
    a, b = _some(RANKS, WIDTH), _some(COLUMNS, RANKS)
    inputs = {"x": x, "weight": weight, "a": a, "b": b, "bias": bias}
    sizes = {"y": 4 * ROWS * COLUMNS, "s": 4 * ROWS * RANKS, "seed": 8}
    yield Case(
        "lora_linear",
        lambda backend: ops.lora_linear(x, weight, a, b, 2.0, bias, backend=backend),
        inputs,
        ("x", "a", "b"),
        sizes,
    )
    yield Case(
        "lora_linear, dropout",
        lambda backend: ops.lora_linear(x, weight, a, b, 2.0, bias, 0.05, backend=backend),
        inputs,
        ("x", "a", "b"),
        sizes,
    )
    x16, weight16, a16, b16 = (tensor.to(BF16) for tensor in (x, weight, a, b))
    yield Case(
        "lora_linear, bf16",
        lambda backend: ops.lora_linear(x16, weight16, a16, b16, 2.0, backend=backend),
        {"x": x16, "weight": weight16, "a": a16, "b": b16},
        ("x", "a", "b"),
        without="cpu",
    )
    as_, bs = [_some(RANKS, WIDTH) for _ in range(3)], [_some(n, RANKS) for n in (192, 64, 64)]
    weights = [_some(n, WIDTH) for n in (192, 64, 64)]
    group = {f"{name}{i}": x for name, xs in (("weight", weights), ("a", as_), ("b", bs)) for i, x in enumerate(xs)}
    yield Case(
        "lora_linear_group",
        lambda backend: ops.lora_linear_group(x, weights, as_, bs, [2.0] * 3, backend=backend),
        {"x": x} | group,
        ("x", *(name for name in group if not name.startswith("weight"))),
        sizes | {"all_a": 3 * 4 * RANKS * WIDTH},
    )


def _bias_scale() -> Iterator[Case]:
    x, weight = _some(ROWS, WIDTH), _some(COLUMNS, WIDTH)
    bias = _some(COLUMNS)
    for scale_on, scale in (("output", _some(COLUMNS)), ("input", _some(WIDTH))):
        yield Case(
            f"bias_scale_linear, {scale_on}",
            lambda backend, scale=scale, on=scale_on: ops.bias_scale_linear(
                x, weight, bias, scale, on, backend=backend
            ),
            {"x": x, "weight": weight, "bias": bias, "scale": scale},
            ("x", "bias", "scale"),
            {"y": 4 * ROWS * COLUMNS},
        )


def _quantised() -> Iterator[Case]:
    dense, bias = _some(COLUMNS, WIDTH), _some(COLUMNS)
    many, few = _some(ROWS, WIDTH), _some(4, WIDTH)
    formats: tuple[tuple[str, Any, Any, Any], ...] = (
        ("nf4", ops.nf4_quantize, ops.nf4_dequantize, ops.nf4_linear),
        ("int8", ops.int8_quantize, ops.int8_dequantize, ops.int8_linear),
    )
    for name, quantize, dequantize, linear in formats:
        q = quantize(dense, backend="reference")
        parts = {f"part{i}": part for i, part in enumerate(q.tensors())}
        yield Case(
            f"{name}_quantize", lambda backend, f=quantize: f(dense, backend=backend).tensors(), {"weight": dense}
        )
        yield Case(f"{name}_dequantize", lambda backend, f=dequantize, q=q: f(q, backend=backend), parts)
        for rows, x in (("many rows", many), ("few rows", few)):
            yield Case(
                f"{name}_linear, {rows}",
                lambda backend, f=linear, q=q, x=x: f(x, q, bias, backend=backend),
                {"x": x, "bias": bias} | parts,
                ("x", "bias"),
                {"dense": 4 * dense.numel(), "y": 4 * x.shape[0] * COLUMNS},
            )


def _mixture() -> Iterator[Case]:
    x, router = _some(BATCH, LENGTH, WIDTH, dtype=BF16), torch.softmax(_some(BATCH, 2), 1)
    down, down_bias, up, up_bias = _some(RANKS, WIDTH), _some(RANKS), _some(2, WIDTH, RANKS // 2), _some(2, WIDTH)
    arguments = {"x": x, "down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias, "router": router}
    yield Case(
        "mixture_adapter",
        lambda backend: ops.mixture_adapter(*arguments.values(), 0.5, backend=backend),
        arguments,
        tuple(arguments),
        {"z": 4 * ROWS * RANKS, "expert": 4 * (RANKS // 2 + 1) * WIDTH},
    )


def _heads(heads: int, length: int, dim: int = 32) -> Tensor:
    """[B, H, L, D] as a projection leaves it."""
    return _some(BATCH, length, heads, dim, dtype=BF16).transpose(1, 2)


def _attention() -> Iterator[Case]:
    query, key, value = (_heads(heads, LENGTH) for heads in (6, 2, 2))
    prompt_key, prompt_value = _some(2, 10, 32, dtype=BF16), _some(2, 10, 32, dtype=BF16)
    gate, words = _some(6), _heads(6, LENGTH)
    few = {"prompt_key": prompt_key, "prompt_value": prompt_value, "gate": gate}
    whole = {"query": query, "key": key, "value": value, **few}
    heads_lse = {"lse": 4 * 6 * BATCH * LENGTH}
    yield Case(
        "zero_init_attention",
        lambda backend: ops.zero_init_attention(*whole.values(), is_causal=True, backend=backend),
        whole,
        tuple(whole),
        {"words": words.nbytes, "act": 4 * 6, **heads_lse},
    )
    prompts = {"query": query, **few, "words": words}
    yield Case(
        "zero_init_attention, given words",
        lambda backend: ops.zero_init_attention(
            query, key, value, prompt_key, prompt_value, gate, words=words, backend=backend
        ),
        prompts,
        tuple(prompts),
        {"act": 4 * 6},
    )
    latents, media = [_heads(6, 16) for _ in range(3)], [_heads(6, 96) for _ in range(2)]
    names = "query", "media_key", "media_value", "latent_key", "latent_value"
    resampled = dict(zip(names, (latents[0], *media, *latents[1:]), strict=True))
    yield Case(
        "resampler_attention",
        lambda backend: ops.resampler_attention(*resampled.values(), backend=backend),
        resampled,
        tuple(resampled),
        {"lse": 4 * 6 * BATCH * 16},
    )
    text, visual = _heads(6, LENGTH), [_heads(6, 3 * 32) for _ in range(2)]
    # Each row has text before its first medium; the second row sees two of its three.
    locations = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    locations[0, [5, 30, 50]] = locations[1, [9, 40]] = True
    flamingo = {"query": text, "key": visual[0], "value": visual[1], "text_time": ops.text_times(locations)}
    yield Case(
        "gated_cross_attention",
        lambda backend: ops.gated_cross_attention(*flamingo.values(), 32, backend=backend),
        flamingo,
        ("query", "key", "value"),
        heads_lse,
    )


def _loss(trained: tuple[str, ...]) -> Case:
    labelled, vocabulary = 24, 1000
    hidden, weight = _some(BATCH, LENGTH, WIDTH, dtype=BF16), _some(vocabulary, WIDTH, dtype=BF16)
    labels = torch.full((BATCH, LENGTH), -100)
    labels[:, -labelled // 2 :] = torch.randint(vocabulary, (BATCH, labelled // 2))
    return Case(
        f"linear_cross_entropy, {'trained' if 'weight' in trained else 'frozen'} head",
        lambda backend: ops.linear_cross_entropy(hidden, weight, labels, backend=backend),
        {"hidden": hidden, "weight": weight, "labels": labels},
        trained,
        {
            "rows": 2 * labelled * WIDTH,
            "logits": 2 * labelled * vocabulary,
            "wide_weight": 4 * vocabulary * WIDTH,
            # Whether each row has a label; of those that do two indices, the label, the loss, whether it is right.
            "mask": ROWS,
            "indices": 16 * labelled,
            "targets": 8 * labelled,
            "losses": 4 * labelled,
            "correct": labelled,
        },
    )
