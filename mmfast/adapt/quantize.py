"""Quantise the frozen linear layers of a model in place, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mmfast.adapt.layers import places
from mmfast.nn import AdaptedLinear, BaseLinear, QuantizedLinear
from mmfast.nn.quantized_state import Format
from mmfast.ops import weights

__all__ = ["QuantizeReport", "dequantize", "quantize", "select_linears"]

HEAD = ("lm_head",)


class QuantizeReport(NamedTuple):
    """What was quantised, and what its weights took in memory before and after."""

    layers: list[str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        before, after = (size / 2**30 for size in (self.bytes_before, self.bytes_after))
        return f"{len(self.layers)} linear layers: {before:.2f} GiB before, {after:.2f} GiB after"


@torch.no_grad()
def quantize(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    format: Format = "nf4",
    double_quant: bool = True,
    skip: Sequence[str] = HEAD,
) -> QuantizeReport:
    """Replaces the linear layers of `model`'s language model by `QuantizedLinear`, one after the other.

    Each dense weight is given up as soon as its layer is replaced. Either every layer is replaced or, when an error
    is raised, none. Embeddings, norms, biases, the head, and in a multimodal model the encoder and the connector stay
    as they are; to quantise one of these parts, pass the part itself.

    Args:
        model: The model to change, in place.
        targets: Last components of the layers' names, such as `["q_proj", "v_proj"]`; by default every linear layer.
        format: "nf4" or "int8".
        double_quant: Of NF4: whether the scales of blocks are stored in 8 bits.
        skip: Last components of the names of layers to leave out.

    Raises:
        ValueError: If a target names no layer, or a layer's weight is trained (`requires_grad`), tied to another
            parameter, on the meta device, of an odd width (NF4), or not finite.
        TypeError: If a layer is not a plain `nn.Linear` (it has an adapter or is quantised already), or its weight is
            not float32, float16 or bfloat16.
    """
    chosen = select_linears("quantize", model, targets, skip)
    for name, layer in chosen.items():
        _check_weight(name, layer.weight, format)
    before = after = 0
    found = places(model, chosen.values())
    names = list(chosen)
    for name in names:
        # Popped, so that nothing holds the dense weight once the layer is replaced.
        layer = chosen.pop(name)
        quantised = QuantizedLinear.from_linear(layer, format, double_quant)
        before += layer.weight.nbytes
        after += sum(part.nbytes for part in weights.tensors(quantised.base_weight()))
        for parent, child in found.pop(layer):
            parent._modules[child] = quantised
    return QuantizeReport(names, before, after)


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Turns every `QuantizedLinear` in `model` back into a plain `nn.Linear` with a frozen weight.

    A layer with an adapter keeps it, on a dense weight.

    Args:
        model: The model to change, in place. One without quantised layers is left as it is.
        dtype: Of the weights and their biases; by default that of the weights that were quantised.

    Returns:
        The full names of the layers that were turned back.

    Raises:
        ValueError: If `model` itself is the layer.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BaseLinear) and layer.weight_format is not None
    }
    if "" in found:
        raise ValueError("dequantize: the module itself is the QuantizedLinear; use its to_linear")
    where = places(model, found.values())
    for layer in found.values():
        if isinstance(layer, AdaptedLinear):
            layer.adopt(cast(QuantizedLinear, layer.to_linear()).to_linear(dtype))
            continue
        dense = cast(QuantizedLinear, layer).to_linear(dtype)
        for parent, child in where.pop(layer):
            parent._modules[child] = dense
    for module in model.modules():
        # What a transformers model was opened with; saved again, it would promise quantised weights.
        config: Any = getattr(module, "config", None)
        if found and getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    return list(found)


def select_linears(
    where: str, model: nn.Module, targets: Sequence[str] | None, skip: Sequence[str] = HEAD
) -> dict[str, nn.Linear]:
    """The linear layers of `model`'s language model that `targets` and `skip` leave, by their names in `model`.

    Args:
        where: What errors begin with.
        model: The model.
        targets: Last components of names; None for every linear layer.
        skip: Last components of the names of layers to leave out.

    Raises:
        ValueError, TypeError: As `quantize` does for names, types and tied weights.
    """
    for name, value in (("targets", targets), ("skip", skip)):
        if isinstance(value, str):
            raise TypeError(f"{where}: {name} is the string {value!r}; a list of names is accepted, as [{value!r}]")
    inside = set(_language_model(model).modules())
    linears = {
        name: layer
        for name, layer in model.named_modules()
        if name and layer in inside and isinstance(layer, nn.Linear) and _last(name) not in skip
    }
    chosen = {name: layer for name, layer in linears.items() if targets is None or _last(name) in targets}
    missing = [target for target in targets or () if target not in map(_last, chosen)]
    if missing or not chosen:
        raise ValueError(
            f"{where}: no linear layer is named {missing or targets or 'anything'}; those of this "
            f"{type(model).__name__} are named {sorted(set(map(_last, linears)))}"
        )
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, layer in chosen.items():
        if type(layer) is not nn.Linear:
            raise TypeError(
                f"{where}: {name} is a {type(layer).__name__}; a torch.nn.Linear is accepted; remove or merge "
                "adapters, and leave out of the targets what is quantised already"
            )
        tied = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if tied:
            raise ValueError(
                f"{where}: the weight of {name} is tied to {tied[0]}, which needs it dense; layers with a weight of "
                "their own are accepted; untie it or leave it out of the targets"
            )
    return chosen


def _check_weight(name: str, weight: torch.Tensor, format: str) -> None:
    problem = None
    if weight.requires_grad:
        problem = "is trained (requires_grad), and a quantised one cannot be; freeze it: model.requires_grad_(False)"
    elif weight.is_meta:
        problem = "is on the meta device, without values; load it first, or use load_quantized"
    elif format == "nf4" and weight.shape[1] % 2:
        problem = f"is {list(weight.shape)}; NF4 takes an even number of columns; use int8 or leave it out"
    elif weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"quantize: the weight of {name} is {weight.dtype}; expected float32, float16 or bfloat16")
    elif weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
        problem = "holds an infinity or NaN; finite values are accepted; look for the step that made it"
    if problem:
        raise ValueError(f"quantize: the weight of {name} {problem}")


def _language_model(model: nn.Module) -> nn.Module:
    """The part of a transformers model that is its language model, without the head; any other module whole."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    return decoder if isinstance(decoder, nn.Module) else model


def _last(name: str) -> str:
    return name.rpartition(".")[2]
