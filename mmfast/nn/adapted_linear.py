"""What LoRA and bias-scale layers share: a base that is not copied, and folding the adapter into the weight."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mmfast.nn.base_linear import BaseLinear
from mmfast.nn.quantized_linear import QuantizedLinear

__all__ = ["AdaptedLinear", "MergeDrift"]

# Elements of a weight that are merged at a time: the float64 copies stay small beside the weight.
_CHUNK = 2**24


class MergeDrift(NamedTuple):
    """What rounding did to a merged weight.

    Attributes:
        largest: Largest absolute difference of an element between the rounded merged weight and the exact one.
        relative: Norm of that difference over the norm of the adapter's change to the weight; 0 without a change.
        unmerged: Largest absolute difference to the original that taking the adapter off the rounded weight leaves;
            NaN or infinite where that is impossible (a scale of 0).
    """

    largest: float
    relative: float
    unmerged: float


class AdaptedLinear(BaseLinear):
    """A `BaseLinear` with an adapter whose effect is that of another weight and bias.

    `weight` and `bias` keep the names they have in `nn.Linear`, so checkpoints of the base load unchanged; the
    parameters in `adapter_names` come on top. They are float32 whatever the base is (float64 on a float64 base after
    `.double()`), so that small updates are not rounded away.
    """

    def to_linear(self) -> nn.Linear:
        """The base without the adapter, on its own weight and bias: an `nn.Linear`, or a `QuantizedLinear`."""
        if self.weight_format is not None:
            quantized = QuantizedLinear(
                self.in_features, self.out_features, bias=False, format=self.weight_format, device="meta"
            )
            quantized._take(self)
            return quantized
        return self._plain(cast(nn.Parameter, self.weight), self.bias)

    def base_forward(self, input: Tensor) -> Tensor:
        """What the base alone makes of [..., in_features], without the adapter."""
        return nn.Linear.forward(self, input) if self.weight_format is None else self.to_linear()(input)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] that has the adapter in it, rounded once.

        Args:
            dtype: Default: that of the base's weight; of a quantised one, that of the weight that was quantised.
        """
        return self._fold(dtype)[0]

    @torch.no_grad()
    def merged_bias(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """The bias that belongs to `merged_weight`; the base's own where the adapter has no part in it."""
        return None if self.bias is None else self.bias.detach().to(dtype or self.bias.dtype)

    @torch.no_grad()
    def merged_linear(self, dtype: torch.dtype | None = None) -> tuple[nn.Linear, MergeDrift]:
        """A plain `nn.Linear` with the adapter folded into a new weight, and what the rounding did to it.

        Args:
            dtype: As in `merged_weight`.
        """
        weight, drift = self._fold(dtype)
        bias = self.merged_bias(dtype)
        trained = self.weight.requires_grad
        bias_trained = trained if self.bias is None else self.bias.requires_grad
        merged_bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=bias_trained)
        return self._plain(nn.Parameter(weight, requires_grad=trained), merged_bias), drift

    def _merge_rows(self, base: Tensor, rows: slice) -> Tensor:
        """The exact merged rows, given the base's in float64."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is merged")

    def _unmerge_rows(self, merged: Tensor, rows: slice) -> Tensor:
        """The inverse of `_merge_rows`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is unmerged")

    def _fold(self, dtype: torch.dtype | None, out: Tensor | None = None) -> tuple[Tensor, MergeDrift]:
        """The merged weight, written to `out` if given."""
        linear = self.to_linear()
        base = (linear.to_linear(torch.float32) if isinstance(linear, QuantizedLinear) else linear).weight
        if out is None:
            dtype = dtype or self.weight_dtype or base.dtype
            out = torch.empty_like(base, dtype=dtype, memory_format=torch.contiguous_format)
        largest, unmerged = base.new_zeros((), dtype=torch.float64), base.new_zeros((), dtype=torch.float64)
        error, change = largest.clone(), largest.clone()
        for rows in self._row_blocks():
            original = base[rows].to(torch.float64, copy=True)  # `out` may be the base itself
            exact = self._merge_rows(original, rows)
            change += (exact - original).square().sum()
            out[rows] = exact
            difference = exact.sub_(out[rows])
            error += difference.square().sum()
            largest = torch.maximum(largest, difference.abs().max())
            back = self._unmerge_rows(out[rows].double(), rows).to(out.dtype)
            unmerged = torch.maximum(unmerged, (back.double() - original.to(out.dtype)).abs().max())
        relative = (error / change).sqrt().item() if change else 0.0
        return out, MergeDrift(largest.item(), relative, unmerged.item())

    def _row_blocks(self) -> list[slice]:
        step = max(1, _CHUNK // max(1, self.in_features))
        return [slice(start, start + step) for start in range(0, self.out_features, step)]

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = weight, cast(nn.Parameter, bias)
        return linear.train(self.training)
