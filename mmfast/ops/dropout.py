"""Dropout whose mask is a pure function of a seed and a position: made again where it is needed, never stored.

The mask is the same on every backend. Element (row, column) of a matrix gets 16 random bits from Philox-4x32 with 7
rounds, whose four output words serve eight neighbouring columns:

    key      low and high 32 bits of the seed
    counter  column // 8, low and high 32 bits of the row, 0
    bits     the low half of word (column // 2) % 4 for an even column, the high half for an odd one

The element is dropped if its bits are below `threshold(p)`, else divided by the probability of being kept. So p is
rounded to a multiple of 2⁻¹⁶.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.ops import backends, extension, products

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


class Dropout(NamedTuple):
    """What a mask depends on.

    Attributes:
        seed: [1] (int64), on the device of the matrix, no host ever waits for it.
        threshold: see `threshold`.
    """

    seed: Tensor
    threshold: int

    @property
    def scale(self) -> float:
        """The factor on the elements that are kept."""
        return 65536 / (65536 - self.threshold)


def threshold(p: float) -> int:
    """An element is dropped if its 16 bits are below this: p · 2¹⁶, rounded."""
    return min(round(p * 65536), 65535)


def draw_seed(device: torch.device) -> Tensor:
    """A seed [1] from PyTorch's generator of this device, so that checkpointing and CUDA graphs replay it."""
    return torch.randint(2**63 - 1, (1,), device=device)


def kept(dropout: Dropout, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The definition of the mask: [rows, columns] (bool), True where an element stays."""
    device = dropout.seed.device
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    group = torch.arange((columns + 7) // 8, device=device)[None, :]
    zero = torch.zeros(rows, (columns + 7) // 8, dtype=torch.int64, device=device)
    words = [zero + group, zero + (row & _LOW), zero + (row >> 32), zero]
    key = [dropout.seed & _LOW, dropout.seed >> 32 & _LOW]
    for _ in range(ROUNDS):
        products = [MULTIPLIERS[0] * words[0], MULTIPLIERS[1] * words[2]]  # their 64 bits are right, their sign is not
        low, high = [p & _LOW for p in products], [p >> 32 & _LOW for p in products]
        words = [high[1] ^ words[1] ^ key[0], low[1], high[0] ^ words[3] ^ key[1], low[0]]
        key = [(k + step) & _LOW for k, step in zip(key, WEYL, strict=True)]
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves >= dropout.threshold).flatten(1)[:, :columns]


def reference(x: Tensor, dropout: Dropout) -> Tensor:
    """x [..., K] with elements dropped and the others scaled; differentiable, any dtype."""
    mask = kept(dropout, x.shape[:-1].numel(), x.shape[-1]).view(x.shape)
    return torch.where(mask, x * dropout.scale, 0)


def apply_cpu(x: Tensor, dropout: Dropout, first_row: int, out: Tensor) -> Tensor:
    """out [M, K] = x [M, K] (fp32, fp16, bf16; last stride 1) after dropout; `out` may be x."""
    extension.module().dropout_cpu(
        extension.view(x),
        int(dropout.seed),
        dropout.threshold,
        first_row,
        extension.view(out),
        torch.get_num_threads(),
    )
    return out


def _run_cpu(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    matrix = products.as_matrix(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    apply_cpu(matrix, Dropout(seed, threshold), 0, out.view(matrix.shape))
    return out


def _run_fake(x: Tensor, seed: Tensor, threshold: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


_RUN = backends.define("dropout", "(Tensor x, Tensor seed, int threshold) -> Tensor", _run_fake, {"cpu": _run_cpu})


class _OnCPU(torch.autograd.Function):
    """Saves the seed: backward makes the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, threshold: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.threshold = threshold
        return _RUN(x, seed, threshold, "cpu")

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _RUN(grad, *ctx.saved_tensors, ctx.threshold, "cpu"), None, None


def on_cpu(x: Tensor, dropout: Dropout) -> Tensor:
    """`reference` of x (fp32, fp16, bf16) by the C++ kernel; the products are rounded to the dtype of x, and it is
    differentiable once.
    """
    return _OnCPU.apply(x, *dropout)
