"""Adapters on the linear layers of any module, and off again: in place and reversible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from mmfast.adapt.layers import check_holder, choose, named_layers, places, replace, takes_lora
from mmfast.adapt.prompts import remove_prompts
from mmfast.nn import AdaptedLinear, BiasLoRALinear, BiasScaleLinear, LoRALinear

__all__ = ["add_bias_scale", "add_lora", "remove"]


def add_lora(
    module: nn.Module,
    targets: Sequence[str] | None = None,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> list[str]:
    """Replaces linear layers inside `module` by `LoRALinear` layers on the same parameters.

    The base parameters keep their names and their `requires_grad`; freezing them is the caller's choice. Either every
    layer is replaced or, when an error is raised, none. Layers that have no adapter yet can get another one later,
    with another rank. Layers with a trained bias (`add_bias_scale` with the scale "none") keep it and become
    `BiasLoRALinear`.

    Args:
        module: The module to change, in place.
        targets: Names of layers or their last components, such as `["q_proj", "v_proj"]`. Default: every linear layer
            except the output head (what `get_output_embeddings()` gives).
        rank: Rank of the update, 1 or more.
        alpha: Scale of the update before the division by the rank.
        dropout: Probability of dropping an element of the low-rank path's input while training.
        use_rslora: Whether alpha is divided by the square root of the rank instead of the rank.

    Returns:
        The full names of the replaced layers, in the module's order.

    Raises:
        ValueError: If a target names no layer, or one that has another adapter or hooks, or a weight tied to another
            parameter (a merge would change both); or an option is out of range.
        TypeError: If a target names something other than a plain `nn.Linear` or a `QuantizedLinear`.
    """

    def adapted(layer: nn.Linear) -> LoRALinear:
        kind = BiasLoRALinear if takes_lora(layer) else LoRALinear
        return kind.from_linear(layer, rank, alpha, dropout, use_rslora=use_rslora)

    return _add(choose("add_lora", module, targets, takes_lora), module, adapted)


def add_bias_scale(
    module: nn.Module,
    targets: Sequence[str] | None = None,
    scale_on: Literal["output", "input", "none"] = "output",
) -> list[str]:
    """Replaces linear layers inside `module` by `BiasScaleLinear` layers on the same parameters.

    As `add_lora`, with a trained bias and scale instead of a low-rank update.

    Args:
        module: The module to change, in place.
        targets: As in `add_lora`.
        scale_on: "output" (the paper of LLaMA-Adapter V2), "input" (its 65B code) or "none" (its 7B code).

    Returns:
        The full names of the replaced layers, in the module's order.

    Raises:
        ValueError, TypeError: As in `add_lora`.
    """

    def adapted(layer: nn.Linear) -> BiasScaleLinear:
        return BiasScaleLinear.from_linear(layer, scale_on)

    return _add(choose("add_bias_scale", module, targets), module, adapted)


def remove(module: nn.Module) -> list[str]:
    """Takes every adapter off: layers are an `nn.Linear` or a `QuantizedLinear` again, with untouched values.

    Prompts go as well, and the decoder gets the attention function back that it had before `add_prompts`.

    Args:
        module: The module to change, in place. One without adapters is left as it is.

    Returns:
        The full names of the layers that were turned back, then of the attention modules that had prompts.

    Raises:
        ValueError: If a layer is merged (its base is changed), or the module itself is the adapted layer.
    """
    check_holder("remove", module)
    layers = named_layers(module, AdaptedLinear)
    merged = [name for name, layer in layers.items() if isinstance(layer, LoRALinear) and layer.merged]
    if merged:
        raise ValueError(
            f"remove: {merged[0]} and {len(merged) - 1} more layers are merged into their base; unmerged layers are "
            "accepted; call unmerge() on them, or merge(model) to keep the update"
        )
    found = places(module, layers.values())
    replace(found, {layer: layer.to_linear() for layer in found})
    return [*layers, *remove_prompts(module)]


def _add(chosen: dict[str, nn.Linear], module: nn.Module, adapted: Callable[[nn.Linear], AdaptedLinear]) -> list[str]:
    found = places(module, chosen.values())
    replace(found, {layer: adapted(layer) for layer in found})
    return list(chosen)
