"""A residual connection with a gate that starts closed, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.ops.gated_residual import gated_residual

__all__ = ["GatedResidual"]


class GatedResidual(nn.Module):
    """x + tanh(gate) · y, with a trained `gate` that is 0 at first: a fresh module returns x.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), figure 4.

    Args:
        num_channels: Size of the last dimension, for a gate per channel; None for one gate, of shape [1].
        device: Device of the gate.
        dtype: Dtype of the gate; it need not be that of x and y.
    """

    gate: nn.Parameter

    def __init__(
        self,
        num_channels: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.gate = nn.Parameter(torch.empty(num_channels or 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Closes the gate."""
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps x and y [..., H] of one dtype to [..., H] in that dtype."""
        return gated_residual(x, y, self.gate)

    def extra_repr(self) -> str:
        """The channels."""
        return f"num_channels={self.num_channels}"
