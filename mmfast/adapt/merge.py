"""Adapters folded into the weights they stand on, with what the rounding did to each."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn

from mmfast.adapt.layers import check_holder, join, named_layers, places, replace
from mmfast.adapt.prompts import check_foldable
from mmfast.nn import AdaptedLinear, LoRALinear, MergeDrift

__all__ = ["merge", "merged_state_dict"]


@torch.no_grad()
def merge(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, MergeDrift]:
    """Folds every adapter into its base and leaves plain `nn.Linear` layers.

    The new weight is computed in float64 and rounded to the base's dtype. Layers are merged one after the other, so the
    memory of one weight is needed on top.

    Args:
        module: The module to change, in place. It must have adapters.
        dtype: Of the layers whose base is quantised, which become dense. Default: that of the weight that was
            quantised. Dense bases keep theirs.

    Returns:
        For each layer, by its full name, how far its weight is from the exact one. Layers that were merged before
        (`LoRALinear.merge`) become plain and are not listed.

    Raises:
        ValueError: If the module has no adapters, is itself the adapted layer, or has prompts that pass by them.
    """
    check_holder("merge", module)
    check_foldable("merge", module)
    layers = named_layers(module, AdaptedLinear)
    if not layers:
        raise ValueError("merge: the module has no adapters; add_lora or add_bias_scale comes first")
    names = {layer: name for name, layer in reversed(layers.items())}
    pending = deque(places(module, layers.values()).items())
    layers.clear()
    report = {}
    while pending:  # so that no list keeps the weights that are done
        layer, where = pending.popleft()
        name = names.pop(layer)
        if isinstance(layer, LoRALinear) and layer.merged:
            plain = layer.to_linear()
        else:
            plain, report[name] = layer.merged_linear(None if layer.weight_format is None else dtype)
        replace({layer: where}, {layer: plain})
    return report


@torch.no_grad()
def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that `module` would have after `merge`; the module itself is not touched.

    Args:
        module: Any module, with adapters or without.

    Returns:
        Detached tensors under the names of the model without adapters. Those of layers without adapters share the
        module's memory, as in `state_dict`.

    Raises:
        ValueError: If the module has prompts that pass by adapters.
    """
    check_foldable("merged_state_dict", module)
    state = dict(module.state_dict())
    for name, layer in named_layers(module, AdaptedLinear).items():
        if isinstance(layer, LoRALinear) and layer.merged:
            continue
        for key in layer.state_dict():
            del state[join(name, key)]
        state[join(name, "weight")] = layer.merged_weight()
        bias = layer.merged_bias()
        if bias is not None:
            state[join(name, "bias")] = bias
    return state
