"""A trained bias and scale around a frozen linear, as a module that takes the place of an `nn.Linear`."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmfast.nn.adapted_linear import AdaptedLinear
from mmfast.ops.bias_scale_linear import SCALE_ON, bias_scale_linear

__all__ = ["BiasScaleLinear"]


class BiasScaleLinear(AdaptedLinear):
    """The linear of LLaMA-Adapter V2, in the three forms that go by that name; b₀ is the base's own bias.

        scale_on="output"   y = s ⊙ (x Wᵀ + b₀ + b)     the paper
        scale_on="input"    y = (x ⊙ s) Wᵀ + b₀ + b     the code of the 65B chat model
        scale_on="none"     y = x Wᵀ + b₀ + b           the code of the multimodal 7B model

    The adapter is `adapter_bias` b [out_features], at first 0, and `adapter_scale` s [out_features] on the output,
    [in_features] on the input, at first 1: a fresh layer returns what the base returns (in 16 bits, with b₀, to within
    the rounding of the product, to which b₀ + b is added in float32). The product is computed in the input's dtype;
    under autocast the layer behaves as `nn.Linear` does. W is dense, or quantised and frozen.

    Source: Gao et al., "LLaMA-Adapter V2" (arXiv 2304.15010), equation 1; names and b₀ as in LitGPT.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        scale_on: "output", "input" or "none".
        bias: Whether the base has a bias.
        device: Device of all parameters.
        dtype: Dtype of `weight` and `bias`.

    Raises:
        ValueError: If `scale_on` is none of the three.
    """

    adapter_names: ClassVar[tuple[str, ...]] = ("adapter_bias", "adapter_scale")
    adapter_bias: nn.Parameter
    adapter_scale: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale_on: Literal["output", "input", "none"] = "output",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if scale_on not in SCALE_ON:
            raise ValueError(
                f"BiasScaleLinear: scale_on is {scale_on!r}; {', '.join(map(repr, SCALE_ON))} are accepted"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.scale_on = scale_on
        self._reset_adapter(device)

    @classmethod
    def from_linear(cls, linear: nn.Linear, scale_on: Literal["output", "input", "none"] = "output") -> BiasScaleLinear:
        """Puts a fresh adapter on `linear`'s own parameters: nothing is copied, `requires_grad` stays.

        Args:
            linear: A plain `nn.Linear` or a `QuantizedLinear`. It stays usable and shares its weight and bias.
            scale_on: "output", "input" or "none".

        Raises:
            TypeError: If `linear` is anything else (an adapted or parametrised one, say).
            ValueError: If `linear` carries hooks, which the new layer would lose, or `scale_on` is unknown.
        """
        layer = cls(linear.in_features, linear.out_features, scale_on, device="meta")
        layer.adopt(linear)
        layer._reset_adapter(linear.weight.device)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the input's dtype (autocast's where it is on)."""
        return bias_scale_linear(input, self.base_weight(), self._bias(), self.adapter_scale, self.scale_on)

    @torch.no_grad()
    def merged_bias(self, dtype: torch.dtype | None = None) -> Tensor:
        """s ⊙ (b₀ + b) with the scale on the output, else b₀ + b; in `dtype` or that of the merged weight."""
        bias = self._bias().double()
        if self.scale_on == "output" and self.adapter_scale is not None:
            bias = bias * self.adapter_scale.double()
        return bias.to(dtype or self.weight_dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        """The base's sizes, then where the scale is."""
        return f"{super().extra_repr()}, scale_on={self.scale_on!r}"

    def _bias(self) -> Tensor:
        """b₀ + b, in the adapter's dtype."""
        return self.adapter_bias if self.bias is None else self.adapter_bias + self.bias

    def _reset_adapter(self, device: torch.device | str | None) -> None:
        self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=torch.float32))
        scale = None
        if self.scale_on != "none":
            size = self.out_features if self.scale_on == "output" else self.in_features
            scale = nn.Parameter(torch.ones(size, device=device, dtype=torch.float32))
        self.register_parameter("adapter_scale", scale)

    def _scale_of(self, rows: slice) -> Tensor:
        """What the rows of W are multiplied with, [rows, 1] or [1, in_features], in float64."""
        if self.adapter_scale is None:
            return torch.ones((1, 1), dtype=torch.float64, device=self.weight.device)
        scale = self.adapter_scale.double()
        return scale[rows, None] if self.scale_on == "output" else scale[None]

    def _merge_rows(self, base: Tensor, rows: slice) -> Tensor:
        return base * self._scale_of(rows)

    def _unmerge_rows(self, merged: Tensor, rows: slice) -> Tensor:
        return merged / self._scale_of(rows)
