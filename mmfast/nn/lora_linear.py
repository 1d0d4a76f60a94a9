"""y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, as a module that takes the place of an `nn.Linear`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LoRALinear"]


class LoRALinear(nn.Linear):
    """y = x Wᵀ + bias + (alpha / rank) · dropout(x) Aᵀ Bᵀ.

    `weight` and `bias` keep the names they have in `nn.Linear`, so checkpoints of the base load unchanged;
    the adapter adds `lora_a` [rank, in_features] and `lora_b` [out_features, rank]. `lora_b` starts at zero:
    a fresh layer returns what the base returns. The adapters are float32 whatever the base is, so that small
    updates are not rounded away; the product is computed in the input's dtype. Under autocast the layer
    behaves as `nn.Linear` does.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", §4.1.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Rank of the update, 1 or more.
        alpha: Scale of the update before the division by the rank.
        dropout: Probability in [0, 1) of dropping an element of the low-rank path's input while training.
        bias: Whether the base has a bias.
        device: Device of all parameters.
        dtype: Dtype of `weight` and `bias`.

    Raises:
        ValueError: If rank, alpha or dropout is outside its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_options(rank, alpha, dropout)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.scaling = self.alpha / rank
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=torch.float32))
        self.reset_lora_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> LoRALinear:
        """Puts a fresh adapter on `linear`'s own parameters: nothing is copied, `requires_grad` stays.

        Args:
            linear: A plain `nn.Linear`. It stays usable and shares its parameters with the new layer.
            rank: Rank of the update, 1 or more.
            alpha: Scale of the update before the division by the rank.
            dropout: Probability of dropping an element of the low-rank path's input while training.

        Raises:
            TypeError: If `linear` is anything but a plain `nn.Linear` (a quantised or parametrised one, say).
            ValueError: If `linear` carries hooks, which the new layer would lose.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"LoRALinear: the layer is a {type(linear).__name__}; a plain torch.nn.Linear is accepted; "
                "remove its adapter, quantisation or parametrisation first"
            )
        if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
            raise ValueError(
                "LoRALinear: the layer carries hooks or a replaced forward, which would be lost; "
                "a layer without them is accepted; add the adapter before the hooks"
            )
        # Built without storage: every base parameter is replaced by the given layer's own on the next lines.
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            alpha,
            dropout,
            bias=linear.bias is not None,
            device="meta",
        )
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.lora_a = nn.Parameter(torch.empty_like(layer.lora_a, device=linear.weight.device))
        layer.lora_b = nn.Parameter(torch.empty_like(layer.lora_b, device=linear.weight.device))
        layer.reset_lora_parameters()
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Returns a plain `nn.Linear` on the base's own parameters: no adapter, and no copy."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def reset_lora_parameters(self) -> None:
        """Draws `lora_a` as `nn.Linear` draws its weight and zeroes `lora_b`, so that the update is zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the input's dtype (autocast's where it is on)."""
        lowered = F.linear(F.dropout(input, self.dropout, self.training), self.lora_a.to(input.dtype))
        update = F.linear(lowered, self.lora_b.to(input.dtype))
        return F.linear(input, self.weight, self.bias) + self.scaling * update

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · B A [out_features, in_features], summed in float32 or better and rounded once."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_b.to(dtype) @ self.lora_a.to(dtype)
        return (self.weight.to(dtype) + self.scaling * update).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """The base's sizes, then the adapter's."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


def _check_options(rank: int, alpha: float, dropout: float) -> None:
    """Refuses options that give no adapter, a silent zero or a division by zero."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRALinear: rank is {rank!r}; a whole number of 1 or more is accepted")
    if not alpha > 0 or math.isinf(alpha):
        raise ValueError(f"LoRALinear: alpha is {alpha!r}; a finite number above 0 is accepted")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRALinear: dropout is {dropout!r}; a probability in [0, 1) is accepted")
