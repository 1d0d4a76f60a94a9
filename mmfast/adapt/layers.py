"""The linear layers of a model under all their names: which have adapters, which can get one, how one is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from mmfast.nn import AdaptedLinear, BaseLinear, BiasScaleLinear, LoRALinear, ZeroInitAttention

__all__ = ["has_adapters", "has_lora", "lora_parameters"]

Layer = TypeVar("Layer", bound=nn.Module)


def has_lora(module: nn.Module) -> bool:
    """Whether any layer of `module` is a `LoRALinear`."""
    return any(isinstance(layer, LoRALinear) for layer in module.modules())


def has_adapters(module: nn.Module) -> bool:
    """Whether any layer of `module` has an adapter of any kind."""
    return any(isinstance(layer, (AdaptedLinear, ZeroInitAttention)) for layer in module.modules())


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's parameters by their full names, each once; empty for a module without LoRA. A bias beside it is none."""
    layers = named_layers(module, LoRALinear).values()
    own = {id(getattr(layer, name)) for layer in layers for name in LoRALinear.adapter_names}
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in own}


def adapter_parameters(layer: AdaptedLinear) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by their names in the layer."""
    return {name: p for name in layer.adapter_names if (p := layer._parameters[name]) is not None}


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every module under every name it has: a layer used twice must be replaced in both places."""
    return dict(module.named_modules(remove_duplicate=False))


def named_layers(module: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """The modules of a kind, under every name."""
    return {name: layer for name, layer in named_modules(module).items() if isinstance(layer, kind)}


def join(prefix: str, name: str) -> str:
    """The full name of `name` inside the module named `prefix`, which is "" for the root."""
    return f"{prefix}.{name}" if prefix else name


def is_called(name: str, target: str) -> bool:
    """Whether `target` is `name` or its last components: the rule of PEFT's lists."""
    return name == target or name.endswith(f".{target}")


def takes_lora(layer: nn.Module) -> bool:
    """Whether this is an adapted layer that LoRA can join: one with a trained bias and no scale."""
    return isinstance(layer, BiasScaleLinear) and layer.adapter_scale is None


def choose(
    where: str,
    module: nn.Module,
    targets: Sequence[str] | None,
    joins: Callable[[nn.Module], bool] = lambda layer: False,
) -> dict[str, nn.Linear]:
    """The linear layers that `targets` name, or all but the output head; each can get an adapter.

    Args:
        where: What the messages begin with.
        module: The module that holds the layers.
        targets: Their names, or last components.
        joins: Which layers with an adapter can get this one beside it.

    Raises:
        ValueError: A target names no layer, or one that has an adapter or a weight tied to another parameter.
        TypeError: A target names something other than a linear layer.
    """
    if isinstance(targets, str):
        raise TypeError(f"{where}: targets is the string {targets!r}; a list of names is accepted, as [{targets!r}]")
    modules = named_modules(module)
    linears = {name: layer for name, layer in modules.items() if name and isinstance(layer, nn.Linear)}
    if targets is None:
        heads = _heads(module)
        chosen: dict[str, nn.Module] = {
            name: layer
            for name, layer in linears.items()
            if layer not in heads and (type(layer) is nn.Linear or isinstance(layer, BaseLinear))
        }
        missing: list[str] = []
    else:
        chosen = {name: m for name, m in modules.items() if name and any(is_called(name, t) for t in targets)}
        missing = [target for target in targets if not any(is_called(name, target) for name in chosen)]
    if missing or not chosen:
        names = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(
            f"{where}: no layer is named {missing or list(targets or [])}; the linear layers of this "
            f"{type(module).__name__} are named {names}"
        )
    found: dict[str, nn.Linear] = {}
    for name, layer in chosen.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{where}: {name} is a {type(layer).__name__}; a torch.nn.Linear is accepted")
        if isinstance(layer, AdaptedLinear) and not joins(layer):
            raise ValueError(
                f"{where}: {name} has an adapter already, a {type(layer).__name__}; a layer without one is accepted; "
                "remove(model) or merge(model) comes first"
            )
        tied = tied_names(module, name, layer.weight)
        if tied:
            raise ValueError(
                f"{where}: the weight of {name} is tied to {tied[0]}, so merging would change both; layers with a "
                "weight of their own are accepted; untie it or leave it out of the targets"
            )
        found[name] = layer
    return found


def tied_names(module: nn.Module, name: str, weight: Tensor) -> list[str]:
    """The other modules that hold the parameter `weight` of the layer called `name`."""
    modules = named_modules(module)
    return [
        other_name
        for other_name, other in modules.items()
        if other is not modules[name] and any(parameter is weight for parameter in other._parameters.values())
    ]


def places(module: nn.Module, layers: Iterable[Layer]) -> dict[Layer, list[tuple[nn.Module, str]]]:
    """Each of the layers once, with every module that holds it and its name in there."""
    found: dict[Layer, list[tuple[nn.Module, str]]] = {layer: [] for layer in layers}
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child in found:
                found[child].append((parent, name))  # type: ignore[index]
    return found


def replace(found: Mapping[Layer, list[tuple[nn.Module, str]]], replacements: Mapping[Layer, nn.Module]) -> None:
    """Puts the replacements where `places` found the layers."""
    for layer, new in replacements.items():
        for parent, child in found[layer]:
            parent._modules[child] = new


def check_holder(where: str, module: nn.Module) -> None:
    """Refuses a module that is itself the adapted layer: there is no place to put another one."""
    if isinstance(module, AdaptedLinear):
        raise ValueError(
            f"{where}: the module itself is the {type(module).__name__}; pass the module that holds it, or call its "
            "to_linear() or merged_linear()"
        )


def _heads(module: nn.Module) -> set[nn.Module]:
    """The output heads that the transformers models in `module` name."""
    getters = [getattr(m, "get_output_embeddings", None) for m in module.modules()]
    return {head for getter in getters if callable(getter) and (head := getter()) is not None}
