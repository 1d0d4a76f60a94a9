"""What the tests of zero_init_attention share: arguments, and the comparison with the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from op_cases import FLOOR, TOLERANCE, assert_as_near
from torch import Tensor

from mmfast.ops import zero_init_attention
from mmfast.ops.zero_init_attention import reference

NAMES = ("query", "key", "value", "prompt_key", "prompt_value", "gate")
PROMPTS = ("prompt_key", "prompt_value", "gate")


def some(
    batch: int = 2,
    heads: int = 4,
    length: int = 5,
    dim: int = 16,
    prompts: int = 10,
    words: int | None = None,
    key_heads: int | None = None,
    per_sample: bool = False,
    gate: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The tensors, in the layout in which a model has them: views of [B, L, H, D]."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    key_heads, words = key_heads or heads, length if words is None else words
    lead = (batch,) if per_sample else ()
    found = {
        "query": randn(batch, length, heads, dim).transpose(1, 2),
        "key": randn(batch, words, key_heads, dim).transpose(1, 2),
        "value": randn(batch, words, key_heads, dim).transpose(1, 2),
        "prompt_key": randn(*lead, prompts, key_heads, dim).transpose(-3, -2),
        "prompt_value": randn(*lead, prompts, key_heads, dim).transpose(-3, -2),
    }
    gates = randn(*((heads,) if gate is None else gate))
    return {name: x.to(dtype) for name, x in found.items()} | {"gate": gates}


def run(
    function: Any, tensors: dict[str, Tensor], needs: Any = NAMES, grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradients that are needed, for a fixed gradient of the output."""
    leaves = {name: tensor.detach().requires_grad_(name in needs) for name, tensor in tensors.items()}
    if "words" in options:
        options["words"] = options["words"].to(leaves["query"])
    output = function(*leaves.values(), **options)
    assert output.dtype == leaves["query"].dtype
    found = {"output": output.detach()}
    if needs:
        if grad is None:
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        output.backward(grad.to(output))
    for name, tensor in leaves.items():
        if name in needs:
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
            found[f"grad {name}"] = tensor.grad
        else:
            assert tensor.grad is None
    return found


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def assert_close(
    backend: str, tensors: dict[str, Tensor] | list[dict[str, Tensor]], needs: Any = NAMES, **options: Any
) -> None:
    """The errors of several draws of the tensors count together: of a few numbers eager's may be small by luck."""
    draws = [tensors] if isinstance(tensors, dict) else tensors
    found: dict[str, list[list[Tensor]]] = {}
    for draw in draws:
        # In the dtype for all: where its product with the prompts cancels, the gate's gradient would show its rounding.
        options["grad"] = torch.randn_like(draw["query"])
        exact = run(reference, double(draw), needs, **options)
        eager = run(reference, draw, needs, **options)
        ours = run(zero_init_attention, draw, needs, backend=backend, **options)
        assert ours.keys() == exact.keys()
        for name in exact:
            found.setdefault(name, []).append([ours[name], eager[name], exact[name]])
        if "grad gate" in exact:
            # A sum that may cancel: errors are measured by the sum of its terms' magnitudes.
            found["grad gate"][-1].append(gate_terms(double(draw), **options))
    dtype = draws[0]["query"].dtype
    # Of many small tensors one has a largest number that eager rounds well, and ours to the number beside it.
    unit = torch.finfo(dtype).eps if len(draws) > 1 else 0.0
    for name, results in found.items():
        ours, eager, exact, *terms = (torch.stack(each) for each in zip(*results, strict=True))
        if name == "grad gate":
            size = terms[0]
            off, baseline = (abs(each.double() - exact).reshape(size.shape) for each in (ours, eager))
            assert (off <= 1.5 * baseline.max() + FLOOR[dtype] * size).all()
            assert (off <= TOLERANCE[dtype] * size).all()
        elif name in ("grad key", "grad value") and (backend != "cpu" or options.get("attn_mask") is not None):
            assert torch.equal(ours, eager)  # PyTorch's own, of the same gradient
        elif name == "grad prompt_key" and draws[0]["prompt_key"].shape[-2] == 1:
            assert ours.eq(0).all()  # in `exact` it is what roundings leave of 0
        else:
            assert_as_near(ours, eager, exact, dtype, unit)


def gate_terms(tensors: dict[str, Tensor], grad: Tensor, gate_activation: str = "tanh", **options: Any) -> Tensor:
    """Σ |grad · ∂out / ∂gate| for each gate."""
    opened = tensors | {"value": 0 * tensors["value"], "gate": torch.ones((), dtype=torch.float64)}
    part = reference(*opened.values(), gate_activation="identity", scale=options.get("scale"))
    gate = tensors["gate"].reshape(-1)
    slope = 1 - gate.tanh() ** 2 if gate_activation == "tanh" else torch.ones_like(gate)
    terms = (grad * part).abs().sum((0, 2, 3))
    return slope * (terms.sum() if gate.numel() == 1 else terms)
