"""y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, as modules that take the place of `nn.Linear` layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from mmfast.nn.adapted_linear import AdaptedLinear, MergeDrift
from mmfast.nn.base_linear import check_no_hooks
from mmfast.nn.bias_scale_linear import BiasScaleLinear
from mmfast.ops.lora_linear import lora_linear, lora_linear_group

__all__ = ["BiasLoRALinear", "LoRALinear", "LoRALinearGroup"]


class LoRALinear(AdaptedLinear):
    """y = x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, scaling = alpha / rank (rsLoRA: alpha / √rank).

    The adapter is `lora_a` [rank, in_features] and `lora_b` [out_features, rank]. `lora_b` starts at zero: a fresh
    layer returns what the base returns. The product is computed in the input's dtype; under autocast the layer behaves
    as `nn.Linear` does. W is dense, or quantised and frozen.

    `merge()` adds the update to W in place, `unmerge()` takes it off again. A merged layer computes x Wᵀ + bias alone,
    refuses to train, and its state dict is that of the merged `nn.Linear`: without the adapter's parameters, so that
    no one adds the update twice. It loads no state dict.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), §4.1; the scaling of
    rsLoRA: Kalajdzievski, "A Rank Stabilization Scaling Factor" (arXiv 2312.03732).

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Rank of the update, 1 or more.
        alpha: Scale of the update before the division by the rank.
        dropout: Probability in [0, 1) of dropping an element of the low-rank path's input while training.
        use_rslora: Whether alpha is divided by the square root of the rank instead of the rank.
        bias: Whether the base has a bias.
        device: Device of all parameters.
        dtype: Dtype of `weight` and `bias`.

    Attributes:
        scaling: The factor on the update.
        merged: Whether W has the update in it.

    Raises:
        ValueError: If rank, alpha or dropout is outside its range.
    """

    adapter_names: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        use_rslora: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_options(rank, alpha, dropout)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.use_rslora = use_rslora
        self.scaling = self.alpha / (math.sqrt(rank) if use_rslora else rank)
        self.merged = False
        self._add_adapter(device)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> Self:
        """Puts a fresh adapter on `linear`'s own parameters: nothing is copied, `requires_grad` stays.

        Args:
            linear: A plain `nn.Linear` or a `QuantizedLinear`. It stays usable and shares its weight and bias.
            rank: Rank of the update, 1 or more.
            alpha: Scale of the update before the division by the rank.
            dropout: Probability of dropping an element of the low-rank path's input while training.
            use_rslora: Whether alpha is divided by the square root of the rank instead of the rank.

        Raises:
            TypeError: If `linear` is anything else (an adapted or parametrised one, say).
            ValueError: If `linear` carries hooks, which the new layer would lose, or an option is out of range.
        """
        # Built without storage: the base's parameters are those of `linear`, the adapter's are made on its device.
        layer = cls(linear.in_features, linear.out_features, rank, alpha, dropout, use_rslora=use_rslora, device="meta")
        layer.adopt(linear)
        layer._add_adapter(linear.weight.device)
        return layer

    def reset_lora_parameters(self) -> None:
        """Draws `lora_a` as `nn.Linear` draws its weight and zeroes `lora_b`, so that the update is zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features] in the input's dtype (autocast's where it is on).

        Raises:
            RuntimeError: If the layer is merged and training.
        """
        if self.merged:
            return self._forward_merged(input)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(input, self.base_weight(), self.lora_a, self.lora_b, self.scaling, self._bias(), dropout)

    @torch.no_grad()
    def merge(self) -> MergeDrift:
        """Adds the update to the weight, in place: summed in float64, rounded once to the weight's dtype.

        Returns:
            How far the rounded weight is from the exact sum, and an unmerge would leave it from the original.

        Raises:
            RuntimeError: If the layer is merged already, or its weight is quantised and so cannot hold the sum.
        """
        if self.merged:
            raise RuntimeError("LoRALinear.merge: the layer is merged already; call unmerge() first")
        if self.weight_format is not None:
            raise RuntimeError(
                f"LoRALinear.merge: the weight is {self.weight_format}, which cannot hold the sum; a dense weight is "
                "accepted; mmfast.adapt.merge(model, dtype) makes dense layers"
            )
        _, drift = self._fold(None, out=self.weight)
        self.merged = True
        return drift

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the update off the weight again; what `merge` measured as `unmerged` stays behind.

        Raises:
            RuntimeError: If the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("LoRALinear.unmerge: the layer is not merged; call merge() first")
        for rows in self._row_blocks():
            self.weight[rows] = self._unmerge_rows(self.weight[rows].double(), rows)
        self.merged = False

    def extra_repr(self) -> str:
        """The base's sizes, then the adapter's."""
        adapter = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        flags = ", use_rslora=True" * self.use_rslora + ", merged=True" * self.merged
        return f"{super().extra_repr()}, {adapter}{flags}"

    def base_forward(self, input: Tensor) -> Tensor:
        """As in `AdaptedLinear`.

        Raises:
            RuntimeError: If the layer is merged: its weight has the update in it.
        """
        if self.merged:
            raise RuntimeError("LoRALinear.base_forward: the layer is merged; call unmerge() first")
        return super().base_forward(input)

    def _add_adapter(self, device: torch.device | str | None) -> None:
        self.lora_a = nn.Parameter(torch.empty(self.rank, self.in_features, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, self.rank, device=device, dtype=torch.float32))
        self.reset_lora_parameters()

    def _bias(self) -> Tensor | None:
        """What is added to the products."""
        return self.bias

    def _forward_merged(self, input: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "LoRALinear: the layer is merged and training, but the merged update gets no gradient; call unmerge() "
                "to train, or eval() to infer"
            )
        return nn.Linear.forward(self, input)

    def _update_rows(self, rows: slice) -> Tensor:
        return (self.lora_b[rows].double() @ self.lora_a.double()).mul_(self.scaling)

    def _merge_rows(self, base: Tensor, rows: slice) -> Tensor:
        return base + self._update_rows(rows)

    def _unmerge_rows(self, merged: Tensor, rows: slice) -> Tensor:
        return merged - self._update_rows(rows)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in self.adapter_names:
                del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            error_msgs.append(f"{prefix}weight: the LoRALinear is merged; call unmerge() before loading")
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class BiasLoRALinear(LoRALinear):
    """y = x Wᵀ + b₀ + b + scaling · dropout(x) Aᵀ Bᵀ: LoRA and a trained bias b at once; b₀ is the base's own bias.

    `LoRALinear` with an adapter of one tensor more: `adapter_bias` b [out_features], at first 0, as a `BiasScaleLinear`
    without a scale has it. `merge()` is not possible, for the base may have no bias; `merged_linear()` is.

    Source: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/llama.py (scaling is 1 there).

    Args:
        in_features: As in `LoRALinear`, with all that follow.
    """

    adapter_names: ClassVar[tuple[str, ...]] = (*LoRALinear.adapter_names, "adapter_bias")
    adapter_bias: nn.Parameter

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, use_rslora: bool = False
    ) -> Self:
        """As `LoRALinear.from_linear`; a `BiasScaleLinear` without a scale is accepted too, whose bias stays.

        Raises:
            TypeError, ValueError: As there; or if the `BiasScaleLinear` has a scale.
        """
        bias = None
        if isinstance(linear, BiasScaleLinear):
            check_no_hooks(cls.__name__, linear)
            if linear.adapter_scale is not None:
                raise ValueError(
                    f"{cls.__name__}: the layer has a trained scale on its {linear.scale_on}; a trained bias alone is "
                    "accepted beside LoRA"
                )
            bias, linear = linear.adapter_bias, linear.to_linear()
        layer = super().from_linear(linear, rank, alpha, dropout, use_rslora=use_rslora)
        if bias is not None:
            layer.adapter_bias = bias
        return layer

    def merge(self) -> MergeDrift:
        """Is refused.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "BiasLoRALinear.merge: the layer has a trained bias, for which its base may have no place; a LoRALinear is "
            "accepted; mmfast.adapt.merge(model) makes plain layers with both"
        )

    @torch.no_grad()
    def merged_bias(self, dtype: torch.dtype | None = None) -> Tensor:
        """b₀ + b, in `dtype` or that of the merged weight."""
        return self._bias().to(dtype or self.weight_dtype or self.weight.dtype)

    def _add_adapter(self, device: torch.device | str | None) -> None:
        super()._add_adapter(device)
        self.adapter_bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=torch.float32))

    def _bias(self) -> Tensor:
        """b₀ + b, in the adapter's dtype."""
        return self.adapter_bias if self.bias is None else self.adapter_bias + self.bias


class LoRALinearGroup(nn.ModuleList):
    """Siblings that read the same x (q, k and v; gate and up): one low-rank pass over x, one dropout mask.

    Holds `LoRALinear` layers of the same input size and dropout; ranks, output sizes and formats of the weights may
    differ. If one is merged, each runs by itself.

    Args:
        layers: The siblings, 1 or more.

    Raises:
        TypeError: If one is not a `LoRALinear`.
        ValueError: If there is none, or they differ in input size or dropout.
    """

    def __init__(self, layers: Iterable[LoRALinear]) -> None:
        siblings = list(layers)
        for layer in siblings:
            if not isinstance(layer, LoRALinear):
                raise TypeError(f"LoRALinearGroup: a layer is a {type(layer).__name__}; LoRALinear is accepted")
        shared = {(layer.in_features, layer.dropout) for layer in siblings}
        if len(shared) != 1:
            raise ValueError(
                f"LoRALinearGroup: the pairs (in_features, dropout) of the layers are {sorted(shared)}; 1 or more "
                "layers with the same pair are accepted"
            )
        super().__init__(siblings)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Maps [..., in_features] to one [..., out_features] for each sibling."""
        siblings = [cast(LoRALinear, layer) for layer in self]
        if any(layer.merged for layer in siblings):
            return tuple(layer(input) for layer in siblings)
        return lora_linear_group(
            input,
            [layer.base_weight() for layer in siblings],
            [layer.lora_a for layer in siblings],
            [layer.lora_b for layer in siblings],
            [layer.scaling for layer in siblings],
            [layer._bias() for layer in siblings],
            siblings[0].dropout if self.training else 0.0,
        )


def _check_options(rank: int, alpha: float, dropout: float) -> None:
    """Refuses options that give no adapter, a silent zero or a division by zero."""
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"LoRALinear: rank is {rank!r}; a whole number of 1 or more is accepted")
    if not alpha > 0 or math.isinf(alpha):
        raise ValueError(f"LoRALinear: alpha is {alpha!r}; a finite number above 0 is accepted")
    if not 0 <= dropout < 1:
        raise ValueError(f"LoRALinear: dropout is {dropout!r}; a probability in [0, 1) is accepted")
