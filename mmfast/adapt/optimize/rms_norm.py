"""RMSNorm of the Llama family, and the addition before it where a decoder layer makes the two in sequence."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from mmfast.adapt.optimize.replacement import Forward, Replacement, has_hooks, never
from mmfast.adapt.optimize.source import unlike
from mmfast.ops.rms_norm import rms_norm

# transformers/models/llama/modeling_llama.py: the forwards of Mistral, Qwen2, Qwen3 and others are the same.
NORM_FORWARD = "9635bcd843f309a0"
LAYER_FORWARD = "1a8125909341e389"


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _refuses_norm_class(cls: type[nn.Module]) -> str | None:
    return unlike(cls, NORM_FORWARD, "LlamaRMSNorm")


def _norm_forward(original: type[nn.Module]) -> Forward:
    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """With a residual, what the optimised decoder layer asks for: norm(residual + hidden) and the sum."""
        if residual is None or residual.dtype == hidden_states.dtype:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)
        # Under autocast the two may differ, and the sum has the dtype to which PyTorch promotes them.
        total = residual + hidden_states
        return cast(Tensor, rms_norm(total, self.weight, self.variance_epsilon)), total

    return forward


NORM = Replacement("rms_norm", "rms_norm", _is_norm, _refuses_norm_class, never, _norm_forward)


def _is_layer(module: nn.Module) -> bool:
    children = module._modules
    return all(name in children for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"))


def _refuses_layer_class(cls: type[nn.Module]) -> str | None:
    # GradientCheckpointingLayer wraps the forward of each of its subclasses, ours included.
    return unlike(cls, LAYER_FORWARD, "LlamaDecoderLayer", wrappers=("transformers",))


def _refuses_layer(module: nn.Module) -> str | None:
    norm: Any = module.post_attention_layernorm
    if _takes_residual(norm) or (_is_norm(norm) and _refuses_norm_class(type(norm)) is None):
        return None
    return f"its post_attention_layernorm is a {type(norm).__name__}, which is left"


def _takes_residual(norm: nn.Module) -> bool:
    replacement = getattr(type(norm), "_mmfast_replacement", None)
    return replacement is NORM


def add_and_norm(norm: nn.Module, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(residual + hidden), residual + hidden: one pass, unless a hook expects the norm to map a tensor."""
    if _takes_residual(norm) and not has_hooks(norm):
        return norm(hidden, residual)
    total = residual + hidden
    return norm(total), total


def _layer_forward(original: type[nn.Module]) -> Forward:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        normed, residual = add_and_norm(self.post_attention_layernorm, attended, hidden_states)
        return residual + self.mlp(normed)

    return forward


LAYER = Replacement("add_rms_norm", "rms_norm", _is_layer, _refuses_layer_class, _refuses_layer, _layer_forward)
