"""What the tests of mixture_adapter share: its forms, arguments, and a run with gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "router")
Tensors = dict[str, Tensor | None]


class Form(NamedTuple):
    """x [B, T, H] and what belongs to it."""

    shape: tuple[int, ...]
    ranks: int = 8
    experts: int = 2
    groups: int = 2
    shared: bool = True
    activation: str = "identity"


FORMS = [
    Form((2, 20, 64)),  # LaVIN's
    Form((3, 5, 70), 6, 3, 2, False, "gelu"),  # a projection for each expert, columns and ranks that fill no vector
    Form((1, 300, 33), 5, 1, 1, True, "relu"),  # more rows than a part of the sums
    Form((2, 530, 40), 4, 2, 4, True, "silu"),  # several parts of each sample
    Form((150, 3, 24), 9, 2, 3, False, "relu"),  # several samples in a part
    Form((1, 40, 600), 20, 2, 2, True, "gelu"),  # several blocks of columns
]


def some(
    form: Form, dtype: torch.dtype = torch.float32, parameters: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensors:
    features = form.shape[-1]
    down = (form.ranks, features) if form.shared else (form.experts, form.ranks, features)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(parameters)

    return {
        "x": torch.randn(form.shape, device=device).to(dtype),
        "down_weight": randn(*down, scale=max(features, 1) ** -0.5),
        "down_bias": randn(*down[:-1]),
        "up_weight": randn(form.experts, features, form.ranks // form.groups, scale=0.5),
        "up_bias": randn(form.experts, features),
        "router": None if form.experts == 1 else randn(form.shape[0], form.experts).softmax(-1),
    }


def run(
    function: Any,
    tensors: Tensors,
    needs: tuple[str, ...] = NAMES,
    *options: Any,
    grad: Tensor | None = None,
    **named: Any,
) -> dict[str, Tensor]:
    """The output, and the gradients that are needed, for a fixed gradient of the output."""
    leaves = {n: None if t is None else t.detach().requires_grad_(n in needs) for n, t in tensors.items()}
    y = function(*leaves.values(), *options, **named)
    assert y.dtype == tensors["x"].dtype  # type: ignore[union-attr]
    assert y.shape == tensors["x"].shape  # type: ignore[union-attr]
    found = {"y": y.detach()}
    if not y.requires_grad:
        return found
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(grad.to(y))
    for name, leaf in leaves.items():
        if leaf is not None and name in needs:
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            found[name] = leaf.grad
        elif leaf is not None:
            assert leaf.grad is None
    return found


def double(tensors: Tensors) -> Tensors:
    return {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
