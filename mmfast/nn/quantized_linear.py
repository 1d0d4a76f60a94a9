"""y = x Wᵀ + bias with a frozen W in 4 or 8 bits, as a module that takes the place of an `nn.Linear`."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mmfast.nn.base_linear import BaseLinear
from mmfast.nn.quantized_state import FORMATS, Format
from mmfast.ops.int8 import Int8Weight, int8_dequantize, int8_linear, int8_quantize
from mmfast.ops.nf4 import BLOCK, NESTED_BLOCK, NF4Weight, dynamic_code, nf4_dequantize, nf4_linear, nf4_quantize

__all__ = ["QuantizedLinear"]


class QuantizedLinear(BaseLinear):
    """y = x Wᵀ + bias, W quantised and frozen; x and the bias get gradients.

    The product is computed in the input's dtype (autocast's where it is on), whatever the dtype of the weight that
    was quantised. See `BaseLinear` for how the weight is held, moved and saved.

    Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), §3; bitsandbytes, nn/modules.py (Linear4bit).

    Args:
        in_features: Size of the last dimension of the input; even for NF4.
        out_features: Size of the last dimension of the output.
        bias: Whether there is a bias.
        format: "nf4" or "int8".
        double_quant: Of NF4: whether the scales of blocks are stored in 8 bits.
        device: Device of all tensors.
        dtype: Dtype of the bias, and of the weight when it is dequantised. A fresh layer is zero: load a state into it.

    Raises:
        ValueError: If the format is unknown or cannot hold a weight of this size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format = "nf4",
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_format(format)
        if format == "nf4" and in_features % 2:
            raise ValueError(f"QuantizedLinear: in_features is {in_features}; NF4 takes an even number; use int8")
        super().__init__(in_features, out_features, bias, device="meta")
        dtype = dtype or torch.get_default_dtype()
        self.hold(_zeros(out_features, in_features, format, double_quant, device, dtype))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: Format = "nf4", double_quant: bool = True) -> QuantizedLinear:
        """Quantises the weight of `linear`; the bias is shared, `linear` itself stays as it is.

        Args:
            linear: A plain `nn.Linear`.
            format: "nf4" or "int8".
            double_quant: Of NF4: whether the scales of blocks are stored in 8 bits.

        Raises:
            TypeError: If `linear` is anything but a plain `nn.Linear`.
            ValueError: If `linear` carries hooks, or the format cannot hold the weight (its size, NaN or infinity).
        """
        _check_format(format)
        _check_plain(linear)
        layer = cls(linear.in_features, linear.out_features, format="int8", bias=False, device="meta")
        weight = linear.weight.detach()
        layer.hold(nf4_quantize(weight, double_quant=double_quant) if format == "nf4" else int8_quantize(weight))
        layer.bias = linear.bias
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain `nn.Linear` with the dequantised weight, frozen; the bias is shared, or a copy in another dtype.

        Args:
            dtype: Of weight and bias; by default the weight's is that of the one that was quantised and the bias's
                stays.
        """
        weight = self.base_weight()
        dequantize = nf4_dequantize if isinstance(weight, NF4Weight) else int8_dequantize
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize(weight, dtype), requires_grad=False)  # type: ignore[arg-type]
        linear.bias = self.bias
        if dtype is not None and self.bias is not None and self.bias.dtype != dtype:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), self.bias.requires_grad)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the input's dtype (autocast's where it is on)."""
        weight = self.base_weight()
        if isinstance(weight, NF4Weight):
            return nf4_linear(input, weight, self.bias)
        return int8_linear(input, cast(Int8Weight, weight), self.bias)


def _zeros(
    rows: int,
    columns: int,
    format: Format,
    double_quant: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> NF4Weight | Int8Weight:
    """A weight that dequantises to zeros."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    if format == "int8":
        return Int8Weight(zeros(rows, columns, dtype=torch.int8), zeros(rows), dtype)
    packed, blocks = zeros(rows, columns // 2, dtype=torch.uint8), -(-rows * columns // BLOCK)
    if not double_quant:
        return NF4Weight(packed, zeros(blocks), dtype)
    code = dynamic_code().to(packed.device, copy=True)
    return NF4Weight(packed, zeros(blocks, dtype=torch.uint8), dtype, zeros(-(-blocks // NESTED_BLOCK)), code, zeros())


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"QuantizedLinear: format is {format!r}; {' or '.join(map(repr, FORMATS))} is accepted")


def _check_plain(linear: nn.Linear) -> None:
    if type(linear) is not nn.Linear:
        raise TypeError(
            f"QuantizedLinear: the layer is a {type(linear).__name__}; a plain torch.nn.Linear is accepted; "
            "remove its adapter, quantisation or parametrisation first"
        )
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        raise ValueError(
            "QuantizedLinear: the layer carries hooks or a replaced forward, which would be lost; "
            "a layer without them is accepted; quantise before adding the hooks"
        )
