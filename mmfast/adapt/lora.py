"""LoRA on the linear layers of any module: add, remove, merge; per instance, in place and reversible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmfast.nn import LoRALinear

__all__ = ["add_lora", "has_lora", "lora_parameters", "merge_lora", "merged_state_dict", "remove_lora"]


def add_lora(module: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> list[str]:
    """Replaces the named linear layers inside `module` by `LoRALinear` layers on the same parameters.

    The base parameters keep their names and their `requires_grad`; freezing them is the caller's choice.
    Either every layer is replaced or, when an error is raised, none.

    Args:
        module: The module to change, in place.
        targets: Last components of the layers' names, such as `["q_proj", "v_proj"]`.
        rank: Rank of the update, 1 or more.
        alpha: Scale of the update before the division by the rank.
        dropout: Probability of dropping an element of the low-rank path's input while training.

    Returns:
        The full names of the replaced layers, in the module's order.

    Raises:
        ValueError: If the module has LoRA already, a target names no layer, or a layer's weight is tied to
            another parameter (a merge would change both).
        TypeError: If a target names something other than a plain `nn.Linear`.
    """
    if isinstance(targets, str):
        raise TypeError(f"add_lora: targets is the string {targets!r}; a list of names is accepted, as [{targets!r}]")
    if has_lora(module):
        raise ValueError("add_lora: the module has LoRA already; remove_lora or merge_lora comes first")
    chosen = {name: layer for name, layer in _named_modules(module) if name and _last(name) in targets}
    missing = [target for target in targets if target not in {_last(name) for name in chosen}]
    if missing or not chosen:
        linears = sorted({_last(name) for name, layer in _named_modules(module) if isinstance(layer, nn.Linear)})
        raise ValueError(
            f"add_lora: no layer is named {missing or list(targets)}; "
            f"the linear layers of this {type(module).__name__} are named {linears}"
        )
    adapted: dict[nn.Module, nn.Module] = {}
    for name, layer in chosen.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"add_lora: {name} is a {type(layer).__name__}; a torch.nn.Linear is accepted")
        _check_untied(module, name, layer)
        if layer not in adapted:
            adapted[layer] = LoRALinear.from_linear(layer, rank, alpha, dropout)
    _replace(module, adapted)
    return list(chosen)


def remove_lora(module: nn.Module) -> list[str]:
    """Turns every `LoRALinear` in `module` back into a plain `nn.Linear`, with the base's untouched values.

    Args:
        module: The module to change, in place. One without LoRA is left as it is.

    Returns:
        The full names of the layers that were turned back.
    """
    names = list(_lora_layers(module))
    _convert(module, LoRALinear.to_linear)
    return names


@torch.no_grad()
def merge_lora(module: nn.Module) -> float:
    """Adds each update to its base weight and leaves plain `nn.Linear` layers.

    The sum is made in float32 (float64 for a float64 base) and rounded once to the base's dtype.

    Args:
        module: The module to change, in place. It must have LoRA.

    Returns:
        The largest absolute change of any weight element, after the rounding.

    Raises:
        ValueError: If the module has no LoRA.
    """
    if not has_lora(module):
        raise ValueError("merge_lora: the module has no LoRA layer; add_lora comes first")
    largest = 0.0

    def merged(layer: LoRALinear) -> nn.Linear:
        nonlocal largest
        weight = layer.merged_weight()
        exact = torch.promote_types(weight.dtype, torch.float32)
        largest = max(largest, (weight.to(exact) - layer.weight.to(exact)).abs().max().item())
        layer.weight.copy_(weight)
        return layer.to_linear()

    _convert(module, merged)
    return largest


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that `module` would have after `merge_lora`; the module itself is not touched.

    Args:
        module: Any module, with LoRA or without.

    Returns:
        Detached tensors under the names of the model without LoRA. Those of layers without LoRA share the
        module's memory, as in `state_dict`.
    """
    state = dict(module.state_dict())
    for name, layer in _lora_layers(module).items():
        prefix = f"{name}." if name else ""
        state[f"{prefix}weight"] = layer.merged_weight()
        del state[f"{prefix}lora_a"], state[f"{prefix}lora_b"]
    return state


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their full names, each once; empty for a module without LoRA."""
    adapters = {id(p) for layer in _lora_layers(module).values() for p in (layer.lora_a, layer.lora_b)}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in adapters}


def has_lora(module: nn.Module) -> bool:
    """Whether any layer of `module` is a `LoRALinear`."""
    return any(isinstance(layer, LoRALinear) for layer in module.modules())


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under every name it has: a layer used twice must be replaced in both places."""
    return list(module.named_modules(remove_duplicate=False))


def _lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in _named_modules(module) if isinstance(layer, LoRALinear)}


def _check_untied(module: nn.Module, name: str, layer: nn.Linear) -> None:
    for other_name, other in _named_modules(module):
        if other is not layer and any(parameter is layer.weight for parameter in other._parameters.values()):
            raise ValueError(
                f"add_lora: the weight of {name} is tied to {other_name}, so merging would change both; "
                "layers with a weight of their own are accepted; untie it or leave it out of the targets"
            )


def _convert(module: nn.Module, to_linear: Callable[[LoRALinear], nn.Linear]) -> None:
    layers = dict.fromkeys(_lora_layers(module).values())
    if module in layers:
        raise ValueError("remove_lora, merge_lora: the module itself is the LoRALinear; pass the module that holds it")
    _replace(module, {layer: to_linear(layer) for layer in layers})


def _replace(module: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for _, parent in _named_modules(module):
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                parent._modules[child_name] = replacements[child]
