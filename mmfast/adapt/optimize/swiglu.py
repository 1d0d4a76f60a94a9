"""The gated MLP of the Llama family, where its activation is SiLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmfast.adapt.optimize.replacement import Forward, Replacement, has_hooks
from mmfast.adapt.optimize.source import unlike
from mmfast.ops.swiglu import swiglu

# transformers/models/llama/modeling_llama.py, LlamaMLP: with or without biases, which its linear layers add.
MLP_FORWARD = "7d2027d4464e3e71"


def _is_mlp(module: nn.Module) -> bool:
    return all(name in module._modules for name in ("gate_proj", "up_proj", "down_proj"))


def _refuses_class(cls: type[nn.Module]) -> str | None:
    return unlike(cls, MLP_FORWARD, "LlamaMLP")


def _refuses(module: nn.Module) -> str | None:
    activation: Any = module.act_fn
    if type(activation) is not nn.SiLU and type(activation).__name__ != "SiLUActivation":
        return f"its activation is {type(activation).__name__}, not SiLU"
    return "its activation has hooks, which would not run" if has_hooks(activation) else None


def _forward(original: type[nn.Module]) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    return forward


MLP = Replacement("swiglu", "swiglu", _is_mlp, _refuses_class, _refuses, _forward)
