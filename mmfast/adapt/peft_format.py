"""PEFT's LoRA format: `adapter_config.json` and the keys of `adapter_model.safetensors`, written and read.

Source: peft 0.21, tuners/lora/config.py (the fields), tuners/tuners_utils.py (`check_target_module_exists`),
utils/other.py (`get_pattern_key`, `_set_trainable`), utils/save_and_load.py (the keys).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmfast.adapt.contents import Contents, Lora
from mmfast.adapt.layers import is_called, join, named_modules
from mmfast.nn import AdaptedLinear, BiasScaleLinear, LoRALinear

__all__ = ["PEFT_TYPE", "from_peft", "to_peft", "why_not_peft"]

PEFT_TYPE = "LORA"
PREFIX = "base_model.model."
# What PEFT takes for a config without LoRA layers.
NO_TARGETS = "dummy-target-modules"

_ADAPTER_NAMES = LoRALinear.adapter_names + BiasScaleLinear.adapter_names

# Fields that are read, or say nothing about the function of the adapter.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
_READ |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_READ |= {"base_model_name_or_path", "revision", "init_lora_weights"}
_SILENT = {"task_type", "auto_mapping", "inference_mode", "peft_version", "runtime_config", "megatron_core"}
_SILENT |= {"eva_config", "loftq_config", "qalora_group_size"}
# Of `init_lora_weights`: all others change the base's weights as well.
_PURE_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def why_not_peft(model: nn.Module, contents: Contents) -> list[str]:
    """Why stock PEFT could not load the contents with the same function; empty if it can."""
    reasons = [f"{name} has a bias-scale adapter" for name in contents.bias_scale][:1]
    reasons += [f"{name} has a trained bias beside LoRA" for name, x in contents.lora.items() if x.adapter_bias][:1]
    reasons += [f"{name} has prompts" for name in contents.prompts][:1]
    modules, options = named_modules(model), contents.lora.values()
    for what in ("dropout", "use_rslora"):
        values = sorted({getattr(layer, what) for layer in options})
        if len(values) > 1:
            reasons.append(f"the LoRA layers differ in {what}: {values}")
    if len({id(modules[name]) for name in contents.lora}) < len(contents.lora):
        reasons.append("a layer with LoRA is used under several names")
    saved = _trained_modules(model, contents)
    if _modules_to_save(modules, saved, contents.lora) is None:
        reasons.append(f"no names of modules_to_save mean just {saved}")
    rest = _rest(contents, saved)
    if rest and _bias(model, rest, saved, contents.lora) is None:
        reasons.append(f"{rest[0]} is trained in a module that is not trained as a whole")
    return reasons


def to_peft(model: nn.Module, contents: Contents) -> dict[str, Any]:
    """The part of `adapter_config.json` that describes the contents, whose keys become PEFT's.

    Args:
        model: The model that the contents were collected from.
        contents: Contents for which `why_not_peft` gives nothing.
    """
    saved = _trained_modules(model, contents)
    rest = _rest(contents, saved)
    rank = _commonest(layer.rank for layer in contents.lora.values())
    alpha = _commonest(layer.alpha for layer in contents.lora.values())
    causal = type(model).__name__.endswith("ForCausalLM")
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    first = next(iter(contents.lora.values()), Lora(8, 8.0))
    contents.keys = {name: PREFIX + _peft_key(name, contents.lora) for name in contents.tensors}
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM" if causal else None,
        "auto_mapping": None if causal else mapping,
        "inference_mode": True,
        "r": rank or first.rank,
        "lora_alpha": _number(alpha or first.alpha),
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "rank_pattern": _pattern({name: layer.rank for name, layer in contents.lora.items()}, rank),
        "alpha_pattern": _pattern({name: _number(layer.alpha) for name, layer in contents.lora.items()}, alpha),
        "target_modules": _target_modules(named_modules(model), contents.lora),
        "modules_to_save": _modules_to_save(named_modules(model), saved, contents.lora) or None,
        "bias": _bias(model, rest, saved, contents.lora) if rest else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def from_peft(config: Mapping[str, Any], stored: Mapping[str, Tensor], model: nn.Module) -> Contents:
    """The contents of a folder in PEFT's format, for `model`, under its own tensor names.

    Raises:
        ValueError: If the adapter uses what is not supported here; the message names it.
    """
    _refuse_unsupported(config, stored)
    modules, contents = named_modules(model), Contents()
    layers = {key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in stored if ".lora_" in key}
    targeted = _targeted(modules, config)
    contents.lora = {name: _options(config, name) for name in modules if name in layers | (targeted or set())}
    contents.lora |= {name: _options(config, name) for name in sorted(layers - contents.lora.keys())}
    wanted = config.get("modules_to_save") or []  # some may mean nothing: PEFT adds names of heads by itself
    saved = [name for name in modules if any(name.endswith(target) for target in wanted)]
    bias = config.get("bias", "none")
    allowed = {join(name, key) for name in saved for key in modules[name].state_dict()}
    expected = allowed | {join(name, part) for name in contents.lora for part in LoRALinear.adapter_names}
    allowed = expected | _bias_names(model, bias, contents.lora) | _embedding_names(model)
    if targeted is not None:
        contents.problems += [
            f"unexpected: LoRA of {name}, which target_modules does not mean"
            for name in sorted(layers - targeted)
            if isinstance(modules.get(name), nn.Linear)
        ]
    for key, tensor in stored.items():
        name = _own_name(key, contents.lora)
        if bias == "all" and re.search(r"\.(original_module|modules_to_save)\.bias$", name):
            continue  # with bias="all" PEFT writes these beside the saved module's own bias
        if key.startswith(PREFIX) and name in allowed and name not in contents.tensors:
            contents.tensors[name], contents.keys[name] = tensor, key
        else:
            contents.problems.append(f"unexpected: {key}")
    contents.problems += [
        f"missing: {PREFIX}{_peft_key(name, contents.lora)}" for name in sorted(expected - contents.tensors.keys())
    ]
    return contents


# ---- names


def _peft_key(name: str, lora: Iterable[str]) -> str:
    """The key, without its prefix, of the tensor that is `name` in the adapted model."""
    layer, _, last = name.rpartition(".")
    if layer not in lora:
        return name
    return f"{layer}.{ {'lora_a': 'lora_A.weight', 'lora_b': 'lora_B.weight'}.get(last, f'base_layer.{last}') }"


def _own_name(key: str, lora: Iterable[str]) -> str:
    """The inverse of `_peft_key`, with the prefix."""
    name = key.removeprefix(PREFIX)
    for theirs, ours in ((".lora_A.weight", ".lora_a"), (".lora_B.weight", ".lora_b")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    layer, found, last = name.rpartition(".base_layer.")
    return f"{layer}.{last}" if found and layer in lora else name


def _target_modules(modules: Mapping[str, nn.Module], lora: Iterable[str]) -> list[str] | str:
    """The shortest `target_modules` that mean just the layers with LoRA."""
    names = set(lora)
    if not names:
        return NO_TARGETS
    for candidates in (sorted({name.rpartition(".")[2] for name in names}), sorted(names)):
        if {name for name in modules if any(is_called(name, target) for target in candidates)} == names:
            return candidates
    return "|".join(re.escape(name) for name in sorted(names))


def _targeted(modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> set[str] | None:
    """The linear layers that the config means by PEFT's rule; None if it leaves that open."""
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return None
    if targets == NO_TARGETS:
        return set()
    linears = [name for name, module in modules.items() if name and isinstance(module, nn.Linear)]
    excluded, saved = config.get("exclude_modules") or [], config.get("modules_to_save") or []
    return {
        name
        for name in linears
        if _means(targets, name)
        and (isinstance(targets, str) or _in_layers(config, name))
        and not _means(excluded, name)
        and not any(re.match(rf"(^|.*\.){target}($|\..*)", name) for target in saved)
    }


def _means(targets: str | Sequence[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(is_called(name, target) for target in targets)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    """`layers_to_transform` and `layers_pattern`."""
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or [r"[^.]*"]
    if indices is None or indices == [] or name in config["target_modules"]:
        return True
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        start = r".*?\." if config.get("layers_pattern") in (None, [], "") else r"(?:^|.*?\.)"
        if match := re.match(rf"{start}{pattern}\.(\d+)\.", name):
            return int(match[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def _options(config: Mapping[str, Any], name: str) -> Lora:
    """What PEFT makes of the layer called `name`: the first pattern that matches decides, else the default."""

    def look_up(patterns: Mapping[str, Any], default: Any) -> Any:
        matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(matching, default)

    return Lora(
        rank=look_up(config.get("rank_pattern") or {}, config.get("r", 8)),
        alpha=look_up(config.get("alpha_pattern") or {}, config.get("lora_alpha", 8)),
        dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("use_rslora", False)),
    )


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern`: by last component where all layers of that name agree, else by full name."""
    pattern = {}
    groups: dict[str, set[Any]] = {}
    for name, value in values.items():
        groups.setdefault(name.rpartition(".")[2], set()).add(value)
    for name, value in values.items():
        last = name.rpartition(".")[2]
        if value != default:
            pattern[re.escape(last) if len(groups[last]) == 1 else f"^{re.escape(name)}"] = value
    return pattern


# ---- what trained besides LoRA


def _trained_modules(model: nn.Module, contents: Contents) -> list[str]:
    """The smallest modules without adapters that trained as a whole and hold trained tensors, outer ones only."""
    trained, saved = contents.tensors.keys(), []
    for name, module in named_modules(model).items():
        own = {join(name, p) for p, value in module._parameters.items() if value is not None}
        every = {join(name, key) for key in module.state_dict()}
        adapted = any(isinstance(m, AdaptedLinear) for m in module.modules())
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
        if name and own & trained and every <= trained and not adapted and not listed:
            saved.append(name)
    return [name for name in saved if not any(name.startswith(f"{outer}.") for outer in saved)]


def _rest(contents: Contents, saved: Sequence[str]) -> list[str]:
    """The trained tensors that are neither an adapter's nor in a saved module."""
    return [
        name
        for name in contents.tensors
        if name.rpartition(".")[2] not in _ADAPTER_NAMES and not any(name.startswith(f"{m}.") for m in saved)
    ]


def _modules_to_save(modules: Mapping[str, nn.Module], saved: Sequence[str], lora: Iterable[str]) -> list[str] | None:
    """Names that by PEFT's rules mean just the saved modules and leave LoRA's targets alone; None if there are none."""
    for candidates in (sorted({name.rpartition(".")[2] for name in saved}), sorted(saved)):
        meant = {name for name in modules if any(name.endswith(target) for target in candidates)}
        hidden = any(re.match(rf"(^|.*\.){target}($|\..*)", name) for target in candidates for name in lora)
        if meant == set(saved) and not hidden:
            return candidates
    return None


def _bias(model: nn.Module, rest: Sequence[str], saved: Sequence[str], lora: Iterable[str]) -> str | None:
    """The value of PEFT's `bias` under which just `rest` trains; None if there is none."""
    for bias in ("lora_only", "all"):
        names = _bias_names(model, bias, lora)
        if {name for name in names if not any(name.startswith(f"{m}.") for m in saved)} == set(rest):
            return bias
    return None


def _bias_names(model: nn.Module, bias: str, lora: Iterable[str]) -> set[str]:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if bias == "all":
        return {name for name in names if name == "bias" or name.endswith(".bias")}
    return {join(layer, "bias") for layer in lora} & names if bias == "lora_only" else set()


def _embedding_names(model: nn.Module) -> set[str]:
    """The tensors of embedding and head, which PEFT saves without a word when the vocabulary was resized."""
    getters: list[Callable[[], nn.Module | None]] = [
        getter
        for name in ("get_input_embeddings", "get_output_embeddings")
        if callable(getter := getattr(model, name, None))
    ]
    layers = [layer for getter in getters if (layer := getter()) is not None]
    return {
        join(name, parameter)
        for name, module in named_modules(model).items()
        if any(module is layer for layer in layers)
        for parameter in module._parameters
    }


def _refuse_unsupported(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    unknown = [f"{key}={value!r}" for key, value in config.items() if value and key not in _READ | _SILENT]
    if config.get("init_lora_weights") not in _PURE_INITS:
        unknown.append(f"init_lora_weights={config['init_lora_weights']!r}, which changes the base's weights")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        unknown.append(f"bias={config['bias']!r}")
    for key in stored:
        part = re.search(r"\.(lora_(?!(A|B)\.weight$)[^.]*.*|trainable_tokens.*)$", key)
        if part:
            unknown.append(f"the tensor {key}")
            break
    if unknown:
        raise ValueError(
            f"load_adapter: the adapter uses {'; '.join(unknown)}; LoRA on linear layers is accepted, with "
            "rank_pattern, alpha_pattern, use_rslora, modules_to_save and bias; load it with peft"
        )


def _commonest(values: Iterable[Any]) -> Any:
    counts = Counter(values).most_common(1)
    return counts[0][0] if counts else None


def _number(value: float) -> float:
    """As an int where it is whole: what PEFT writes."""
    return int(value) if value == int(value) else value
