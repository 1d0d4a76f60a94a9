"""x + scale · Up(act(Down x)): the bottleneck adapter, as a module to put behind (or before) a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.ops.mixture_adapter import ACTIVATIONS, mixture_adapter

__all__ = ["Adapter"]


class Adapter(nn.Module):
    """y = x + scale · Up(drop(act(Down x))), in one pass over x.

    Parameters are `down_weight` [bottleneck_size, hidden_size], `down_bias`, `up_weight` [hidden_size, bottleneck_size]
    and `up_bias`. The up-projection starts at zero: a fresh adapter is the identity. The output has the input's dtype,
    under autocast too; the arithmetic is float32.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv 1902.00751), section 2.1.

    Args:
        hidden_size: Size of the last dimension of input and output.
        bottleneck_size: Size between the projections, 1 or more.
        activation: "identity", "relu", "gelu" (by the error function) or "silu".
        dropout: Probability in [0, 1) of dropping an element between the projections while training.
        scale: The factor on the update.
        bias: Whether the projections have biases.
        device: Device of all parameters.
        dtype: Dtype of all parameters; default float32, whatever the dtype of the model around them.

    Raises:
        ValueError: If an option is outside its range.
    """

    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        activation: str = "relu",
        dropout: float = 0.0,
        scale: float = 1.0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options("Adapter", hidden_size, bottleneck_size, activation, dropout)
        super().__init__()
        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.activation, self.dropout, self.scale = activation, float(dropout), float(scale)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype or torch.float32))

        self.down_weight = parameter(bottleneck_size, hidden_size)
        self.up_weight = parameter(hidden_size, bottleneck_size)
        self.register_parameter("down_bias", parameter(bottleneck_size) if bias else None)
        self.register_parameter("up_bias", parameter(hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws `down_weight` xavier-uniform and zeroes the rest, so that the update is zero."""
        nn.init.xavier_uniform_(self.down_weight)
        nn.init.zeros_(self.up_weight)
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [B, ..., hidden_size] to the same shape and dtype."""
        return mixture_adapter(
            input,
            self.down_weight,
            self.down_bias,
            self.up_weight[None],
            None if self.up_bias is None else self.up_bias[None],
            None,
            self.scale,
            self.dropout if self.training else 0.0,
            self.activation,
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"{self.hidden_size}, {self.bottleneck_size}, activation={self.activation!r}, dropout={self.dropout:g}, "
            f"scale={self.scale:g}, bias={self.down_bias is not None}"
        )


def check_options(where: str, hidden_size: int, bottleneck_size: int, activation: str, dropout: float) -> None:
    """Refuses options that give no adapter, or one that would fail only when it is called."""
    for name, size in (("hidden_size", hidden_size), ("bottleneck_size", bottleneck_size)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{where}: {name} is {size!r}; a whole number of 1 or more is accepted")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation is {activation!r}; {', '.join(map(repr, ACTIVATIONS))} are accepted")
    if not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout is {dropout!r}; a probability in [0, 1) is accepted")
