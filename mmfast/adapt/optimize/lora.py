"""PEFT's LoRA layer on a dense `nn.Linear`: the base and its active adapters in one call of `lora_linear`."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.adapt.optimize.replacement import Forward, Replacement, is_bare_linear
from mmfast.adapt.optimize.source import unlike
from mmfast.ops import lora_short, products
from mmfast.ops.lora_linear import LEAST, lora_linear

# peft/tuners/lora/layer.py, Linear.
LORA_FORWARD = "883865a2889afa79"


class _Adapter(NamedTuple):
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float


def is_lora(module: nn.Module) -> bool:
    # A model with PEFT's layers has imported PEFT.
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and isinstance(module, peft.LoraLayer)


def _refuses_class(cls: type[nn.Module]) -> str | None:
    if (cls.__module__, cls.__qualname__) != ("peft.tuners.lora.layer", "Linear"):
        kind = f"{cls.__module__.removeprefix('peft.tuners.lora.')}.{cls.__name__}"
        return f"it is {kind}, not PEFT's layer for a dense nn.Linear"
    return unlike(cls, LORA_FORWARD, "PEFT's lora.Linear")


def _refuses(module: nn.Module) -> str | None:
    layer: Any = module
    base = layer.base_layer
    if not is_bare_linear(base):
        if type(base) is nn.Linear:
            return "its base has hooks, which would not run"
        quantised = getattr(base, "weight_format", None) is not None
        return f"its base is {'quantised' * quantised or 'not a plain nn.Linear'} ({type(base).__name__})"
    if layer.fan_in_fan_out:
        return "its weight is transposed (fan_in_fan_out)"
    reasons = {name: _refuses_adapter(layer, name) for name in layer.lora_A}
    if reasons and all(reasons.values()):
        return "; ".join(f"adapter {name!r} {reason}" for name, reason in reasons.items())
    return None


def _refuses_adapter(layer: Any, name: str) -> str | None:
    if name in layer.lora_variant:
        return f"is a variant of LoRA ({type(layer.lora_variant[name]).__name__})"
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not is_bare_linear(down) or not is_bare_linear(up):
        return "does not consist of two plain nn.Linear without hooks"
    if down.bias is not None or up.bias is not None:
        return "has a bias (lora_bias)"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"drops with a {type(dropout).__name__}"
    return None


def _is_small(x: Tensor) -> bool:
    """Whether `lora_linear` would run PyTorch's own steps, as PEFT's forward does, which casts no adapter for it."""
    kind = x.device.type
    if kind != "cpu":
        return False
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    rows = x.numel() // max(x.shape[-1], 1)
    if rows <= lora_short.MOST_DOTS and not (autocast or torch.is_grad_enabled()):
        return False
    return rows < LEAST["rows"] and not products.is_slow(dtype, rows, grad=torch.is_grad_enabled())


def _adapters(layer: Any, x: Tensor) -> list[_Adapter] | None:
    """The active adapters as `lora_linear` takes them; None where PEFT's own forward must do this call."""
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out or not layer.cast_input_dtype_enabled:
        return None
    base = layer.base_layer
    if not is_bare_linear(base) or (x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        return None
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if _refuses_adapter(layer, name) is not None:
            return None
        dropout = layer.lora_dropout[name]
        probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        weights = layer.lora_A[name].weight, layer.lora_B[name].weight
        found.append(_Adapter(*weights, float(layer.scaling[name]), probability))
    # Stacked adapters share one mask of x.
    dropouts = {adapter.dropout for adapter in found}
    return found if len(dropouts) == 1 and 1.0 not in dropouts else None


def _forward(original: type[nn.Module]) -> Forward:
    plain: Any = original.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Asked at each call: adapters are added, chosen, merged and disabled without notice.
        adapters = None if args or kwargs or _is_small(x) else _adapters(self, x)
        if adapters is None:
            return plain(self, x, *args, **kwargs)
        base, first = self.base_layer, adapters[0]
        if len(adapters) == 1:
            return lora_linear(x, base.weight, first.lora_a, first.lora_b, first.scaling, base.bias, first.dropout)
        lora_as, lora_bs = [adapter.lora_a for adapter in adapters], [adapter.lora_b for adapter in adapters]
        scalings = [adapter.scaling for adapter in adapters]
        return lora_linear(x, base.weight, lora_as, lora_bs, scalings, base.bias, first.dropout)

    return forward


LORA = Replacement("lora", "lora", is_lora, _refuses_class, _refuses, _forward)
