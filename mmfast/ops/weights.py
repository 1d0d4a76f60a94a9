"""What the frozen weight of a linear op may be: a dense tensor, or a quantised weight of a registered format."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class QuantizedWeight(Protocol):
    """A frozen weight [N, K] in fewer bits. (`NF4Weight`, `Int8Weight`.)"""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that was quantised."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def device(self) -> torch.device: ...

    def tensors(self) -> list[Tensor]:
        """What a dispatcher op takes; the dtype of the first tensor tells the format."""


Weight = Tensor | QuantizedWeight


class Format(NamedTuple):
    """What an op needs to know of a quantised format.

    Attributes:
        shape: the tensors of a weight -> (N, K).
        dequantize_rows: (tensors, first, last, out, backend): fills `out` [last - first, K] (fp32, fp16 or bf16,
            contiguous) with rows first to last.
        row_step: (tensors) -> rows that `first` must be a multiple of.
        small_linear: (x, tensors, out, backend, bias): out [M, N] = x Wᵀ + bias [N] or None, decoded in registers.
        takes_small: (x, tensors, backend) -> whether `small_linear` can run this and is the faster way.
    """

    shape: Callable[[list[Tensor]], tuple[int, int]]
    dequantize_rows: Callable[[list[Tensor], int, int, Tensor, str], None]
    row_step: Callable[[list[Tensor]], int]
    small_linear: Callable[[Tensor, list[Tensor], Tensor, str, Tensor | None], None]
    takes_small: Callable[[Tensor, list[Tensor], str], bool]


# The dtype of a weight's first tensor -> its format; a floating dtype is a dense weight. Formats enter themselves.
FORMATS: dict[torch.dtype, Format] = {}


def tensors(weight: Weight) -> list[Tensor]:
    """The weight as a dispatcher op takes it: `[W]` if dense."""
    return [weight] if isinstance(weight, Tensor) else weight.tensors()


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A quantised weight by its definition, in `dtype`; a dense one as it is."""
    if isinstance(weight, Tensor):
        return weight
    parts = weight.tensors()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    FORMATS[parts[0].dtype].dequantize_rows(parts, 0, weight.shape[0], out, "reference")
    return out


def shape(parts: list[Tensor]) -> tuple[int, int]:
    """(N, K) of a weight given as `tensors` gives it."""
    quantised = FORMATS.get(parts[0].dtype)
    return quantised.shape(parts) if quantised else (parts[0].shape[0], parts[0].shape[1])
