"""What an adapter folder holds, whichever format it is in: taken from a model, or put into one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mmfast.adapt.layers import adapter_parameters, join, named_layers, named_modules, places, replace, tied_names
from mmfast.adapt.prompts import PROMPTS, Prompts, attach, build, decoder_of, has_prompts
from mmfast.nn import AdaptedLinear, BiasLoRALinear, BiasScaleLinear, LoRALinear, ZeroInitAttention

__all__ = ["Contents", "Lora", "collect", "put"]


@dataclass(frozen=True)
class Lora:
    """The options of one `LoRALinear`, or `BiasLoRALinear`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    adapter_bias: bool = False
    """Whether it is a `BiasLoRALinear`."""


@dataclass
class Contents:
    """The adapters of a model and every tensor that trained.

    Attributes:
        lora: Layer name to the options of its LoRA.
        bias_scale: Layer name to the `scale_on` of its bias-scale adapter.
        prompts: Name of an attention module to the options of its prompts.
        tensors: Parameter or buffer name in the adapted model ("….q_proj.lora_a", "model.norm.weight") to its value; a
            tensor with several names is there under each.
        keys: The same names to the keys that the tensors have in the file.
        problems: What does not fit the model, as sentences; nothing may be put into it then.
    """

    lora: dict[str, Lora] = field(default_factory=dict)
    bias_scale: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Prompts] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def collect(model: nn.Module) -> Contents:
    """The adapters of `model`, and of the rest what requires a gradient, with the buffers beside it.

    Raises:
        ValueError: If a layer is merged, a tensor has no values, or there is nothing to save.
    """
    contents = Contents()
    own: set[str] = set()
    for name, layer in named_layers(model, AdaptedLinear).items():
        own |= {join(name, parameter) for parameter in adapter_parameters(layer)}
        if isinstance(layer, BiasScaleLinear):
            contents.bias_scale[name] = layer.scale_on
        elif isinstance(layer, LoRALinear):
            if layer.merged:
                raise ValueError(f"save_adapter: {name} is merged; unmerged layers are accepted; call unmerge() first")
            biased = isinstance(layer, BiasLoRALinear)
            contents.lora[name] = Lora(layer.rank, layer.alpha, layer.dropout, layer.use_rslora, biased)
    for name, attention in named_modules(model).items():
        if has_prompts(attention):
            prompts: ZeroInitAttention = attention._modules[PROMPTS]  # type: ignore[assignment]
            own |= {join(name, f"{PROMPTS}.{parameter}") for parameter in prompts._parameters}
            contents.prompts[name] = Prompts(
                prompts.prompt_length,
                prompts.gate_per_head,
                prompts.gate_activation,
                prompts.prompt is not None,
                prompts.gate_scale is not None,
                prompts.base_projections,
            )
    for module_name, module in named_modules(model).items():
        parameters = {join(module_name, name): p for name, p in module._parameters.items() if p is not None}
        contents.tensors |= {name: p for name, p in parameters.items() if name in own or p.requires_grad}
        if any(p.requires_grad for name, p in parameters.items() if name not in own):
            contents.tensors |= {join(module_name, name): b for name, b in _kept_buffers(module).items()}
    contents.tensors = {name: tensor.detach() for name, tensor in contents.tensors.items()}
    if not contents.tensors:
        raise ValueError(
            f"save_adapter: this {type(model).__name__} has no adapter and no parameter that requires a gradient; "
            "a model in the state that it was trained in is accepted; add_lora comes first"
        )
    empty = [name for name, tensor in contents.tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"save_adapter: {empty[0]} is on the meta device, without values; load the model first")
    contents.keys = {name: name for name in contents.tensors}
    return contents


@torch.no_grad()
def put(where: str, model: nn.Module, contents: Contents) -> None:
    """Adds the adapters to `model` and copies the tensors; then exactly these require a gradient.

    Raises:
        ValueError: If anything does not fit, with all of it; the model is as it was then.
    """
    modules = named_modules(model)
    problems = list(contents.problems)
    adapted: dict[nn.Module, AdaptedLinear] = {}
    for name in [*contents.lora, *contents.bias_scale]:
        layer = modules.get(name)
        if layer is None:
            problems.append(f"the model has no layer {name}")
        elif not isinstance(layer, nn.Linear):
            problems.append(f"{name} is a {type(layer).__name__}; a torch.nn.Linear is accepted")
        elif tied := tied_names(model, name, layer.weight):
            problems.append(f"the weight of {name} is tied to {tied[0]}, so merging would change both; untie it")
        elif layer not in adapted:
            try:
                adapted[layer] = _adapter(layer, name, contents)
            except (TypeError, ValueError) as error:
                problems.append(f"{name}: {error}")
    prompts = _prompts(model, contents, problems)
    modules |= {join(name, PROMPTS): module for name, (_, module) in prompts.items()}
    targets: dict[str, Tensor] = {}
    for name, tensor in contents.tensors.items():
        target = _target(modules, adapted, name)
        if target is not None:
            targets[name] = target
            if target.shape != tensor.shape:
                key = contents.keys[name]
                problems.append(f"{key} is {list(tensor.shape)} but {name} is {list(target.shape)}")
        elif modules.get(name.rpartition(".")[0]) is not None:
            problems.append(f"unexpected: {contents.keys[name]}; the model has no tensor {name}")
    problems += _untied(model, targets, contents)
    if problems:
        raise ValueError(
            f"{where}: it does not fit this {type(model).__name__}: {'; '.join(problems)}. The model it was trained "
            "on is accepted, in the same classes; nothing was changed"
        )
    replace(places(model, adapted), adapted)
    if prompts:
        attach(decoder_of(where, model), dict(prompts.values()))
    model.requires_grad_(False)
    for name, tensor in contents.tensors.items():
        targets[name].copy_(tensor)
        if isinstance(targets[name], nn.Parameter):
            targets[name].requires_grad_(True)


def _adapter(layer: nn.Linear, name: str, contents: Contents) -> AdaptedLinear:
    if name in contents.bias_scale:
        return BiasScaleLinear.from_linear(layer, contents.bias_scale[name])  # type: ignore[arg-type]
    options = contents.lora[name]
    kind = BiasLoRALinear if options.adapter_bias else LoRALinear
    return kind.from_linear(layer, options.rank, options.alpha, options.dropout, use_rslora=options.use_rslora)


def _prompts(
    model: nn.Module, contents: Contents, problems: list[str]
) -> dict[str, tuple[nn.Module, ZeroInitAttention]]:
    """The attention modules that are to get prompts, with these; what does not fit is added to the problems."""
    if not contents.prompts:
        return {}
    try:
        decoder = decoder_of("prompts", model)
    except (TypeError, ValueError) as error:
        problems.append(str(error))
        return {}
    modules, attentions = named_modules(model), {layer.self_attn for layer in decoder.layers}
    found = {}
    for name, options in contents.prompts.items():
        attention = modules.get(name)
        if attention is not None and attention in attentions:
            found[name] = (attention, build(decoder, attention, options))
        else:
            problems.append(f"the model has no decoder layer with the attention {name}")
    return found


def _target(modules: dict[str, nn.Module], adapted: dict[nn.Module, AdaptedLinear], name: str) -> Tensor | None:
    """The parameter or buffer that is called `name` once the adapters are in the model."""
    prefix, _, last = name.rpartition(".")
    module = modules.get(prefix)
    if module is None:
        return None
    module = adapted.get(module, module)
    return module._parameters.get(last) if last in module._parameters else _kept_buffers(module).get(last)


def _kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that a state dict has."""
    return {
        name: b
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    }


def _untied(model: nn.Module, targets: dict[str, Tensor], contents: Contents) -> list[str]:
    """Problems with a parameter of several names: all of them must be given, with one value."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    problems = []
    for shared in names.values():
        given = [name for name in shared if name in targets]
        first = contents.tensors[given[0]] if given else None
        if 0 < len(given) < len(shared):
            absent = next(name for name in shared if name not in targets)
            problems.append(f"the model ties {given[0]} to {absent}, of which only the first is given; untie them")
        elif any(not torch.equal(contents.tensors[name].to(first), first) for name in given[1:]):  # type: ignore[call-overload, arg-type]
            problems.append(f"the model ties {' and '.join(given)}, which are given with different values; untie them")
    return problems
