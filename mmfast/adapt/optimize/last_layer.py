"""The last decoder layer at labelled positions alone: after its keys and values no position reads another one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mmfast.adapt.optimize.lora import is_lora
from mmfast.adapt.optimize.replacement import has_hooks, hides_forward, original_class
from mmfast.adapt.optimize.rms_norm import LAYER_FORWARD, NORM_FORWARD, add_and_norm
from mmfast.adapt.optimize.source import fingerprint, unlike
from mmfast.adapt.optimize.swiglu import MLP_FORWARD

# transformers/models/{llama,mistral,qwen2}/modeling_*.py, 5.11 to 5.23; Phi3 has that of Mistral, Qwen3 and others that
# of Qwen2. They call self.layers one after the other, then self.norm, and return that as the last hidden state.
DECODER_FORWARDS = {"eeab4a90d135621d", "a20c59e141641c74", "a4e04405d94dd416"}
# Likewise of Llama, Mistral, Qwen2, Qwen3 and SmolLM3: the last thing they do is self.o_proj on [B, L, heads · D].
ATTENTION_FORWARDS = {
    "ee9b11aafecd166c",
    "9fd52adda2db73b6",
    "4303b9d12716b783",
    "0a88802c2838d189",
    "b0ad2d337f1e8b2e",
}
# LlavaModel and LlavaNextModel, of 5.23 and before it: they return the last hidden state of self.language_model.
HOLDER_FORWARDS = {"77c4c87abe1bb4c2", "d5e4f2f7aad0217f", "e2894af6f752811c", "00e0e5308018e651"}


def labelled_rows(
    model: PreTrainedModel, labelled: Tensor, arguments: Mapping[str, Any]
) -> AbstractContextManager[Tensor | None]:
    """Within, calls of `model` give the last hidden states of the labelled positions alone, where that is possible.

    The last layer's attention reads keys and values of all positions as ever; its output projection, its MLP, the
    additions and the norm after it see the n labelled ones. Another module stands in for the layer until the end of
    the block, in which one thread may call the model. Gradient checkpointing recomputes at the same positions.

    Args:
        model: A model of transformers without a head, such as LlamaModel or LlavaModel.
        labelled: [B, L] or [B · L] bool, the positions whose hidden state the loss reads; or [n] int64, their indices
            in [B · L], with which the host does not wait for the device to count them.
        arguments: What the model will be called with by name.

    Returns:
        A context manager for [n] int64, the indices of the labelled positions in [B · L]: the last hidden state is
        [n, C]. Or for None, where it is [B, L, C] as ever: all or none are labelled, `refusal` has a reason, hidden
        states or attentions are asked for, or `torch.compile` is tracing, which cannot tell n.
    """
    if torch.compiler.is_compiling() or _asks_for_more(model, arguments) or refusal(model) is not None:
        return nullcontext()
    if labelled.dtype != torch.bool:
        return _at_rows(model.get_decoder().layers, labelled) if len(labelled) else nullcontext()
    rows = labelled.flatten().nonzero().flatten()
    return _at_rows(model.get_decoder().layers, rows) if 0 < len(rows) < labelled.numel() else nullcontext()


@contextmanager
def _at_rows(layers: nn.ModuleList, rows: Tensor) -> Iterator[Tensor]:
    layer = layers[-1]
    layers[-1] = _AtRows(layer, rows)
    try:
        yield rows
    finally:
        layers[-1] = layer


def _asks_for_more(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    configs = model.config, model.get_decoder().config
    names = ("output_hidden_states", "output_attentions")
    return any(arguments.get(name) or any(getattr(config, name, False) for config in configs) for name in names)


def refusal(model: PreTrainedModel) -> str | None:
    """Why the last layer in `model` must compute all positions; None if it need not."""
    decoder = model.get_decoder()
    if decoder is not model and (fingerprint(type(model).forward) not in HOLDER_FORWARDS or _sees_output(model)):
        return f"nobody knows what {type(model).__name__} does with the hidden states of its language model"
    # What is known of a module says which others it has, and what it calls them with.
    reason = _unknown("the decoder", decoder, DECODER_FORWARDS, "LlamaModel")
    if reason is not None:
        return reason
    layers: Any = decoder.layers
    if not len(layers) == decoder.config.num_hidden_layers > 0:
        return f"the decoder runs {decoder.config.num_hidden_layers} of {len(layers)} layers"
    layer = layers[-1]
    reason = (
        _unknown("its last layer", layer, {LAYER_FORWARD}, "LlamaDecoderLayer")
        or _unknown("the attention of its last layer", layer.self_attn, ATTENTION_FORWARDS, "LlamaAttention")
        or _unknown("the MLP of its last layer", layer.mlp, {MLP_FORWARD}, "LlamaMLP")
        or _unknown("the norm of its last layer", layer.post_attention_layernorm, {NORM_FORWARD}, "LlamaRMSNorm")
        or _unknown("its last norm", decoder.norm, {NORM_FORWARD}, "LlamaRMSNorm")
    )
    if reason is not None:
        return reason
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    for module in projections:
        if not (isinstance(module, nn.Linear) or is_lora(module)):
            return f"its last layer has a {type(module).__name__}, which may tell one position from another"
    if "forward" in layer.__dict__ or has_hooks(layer) or layer._compiled_call_impl is not None:
        return "its last layer has hooks or is compiled, which would not run"
    rowwise = (decoder.norm, layer.post_attention_layernorm, *mlp.modules(), *attention.o_proj.modules())
    if any(map(_sees_output, (decoder, attention))) or any(has_hooks(module) or _differs(module) for module in rowwise):
        return "a hook sees what its last layer computes, or a part of that is compiled or has a forward of its own"
    return None


def _unknown(name: str, module: nn.Module, forwards: set[str], example: str) -> str | None:
    # GradientCheckpointingLayer, capture_outputs and others of transformers wrap forwards.
    reason = unlike(original_class(module), forwards, example, wrappers=("transformers",))
    return None if reason is None else f"{name}: {reason}"


def _differs(module: nn.Module) -> bool:
    """Whether a call of the module does not run the forward of its class, or runs it compiled, which n would redo."""
    from mmfast.adapt.recompute import is_recomputed

    return (hides_forward(module) and not is_recomputed(module)) or module._compiled_call_impl is not None


def _sees_output(module: nn.Module) -> bool:
    """Whether anything but the caller gets what the module returns or its gradient."""
    seen = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(seen) or _differs(module)


class _AtRows(GradientCheckpointingLayer):
    """A decoder layer of Llama that returns [n, C], its output at n of the B · L positions."""

    def __init__(self, layer: Any, rows: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.rows = rows
        self.training = layer.training
        # A copy that shares all but the output projection: `torch.compile` traces no hook that is set inside.
        self.attention = copy.copy(layer.self_attn)
        self.attention._modules = {**layer.self_attn._modules, "o_proj": _OfRows(layer.self_attn.o_proj, rows)}
        self.gradient_checkpointing = layer.gradient_checkpointing
        if layer.gradient_checkpointing:
            self._gradient_checkpointing_func = layer._gradient_checkpointing_func

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        layer = self.layer
        attended, _ = self.attention(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        residual = _take(hidden_states, self.rows)
        normed, residual = add_and_norm(layer.post_attention_layernorm, attended, residual)
        return residual + layer.mlp(normed)


class _OfRows(nn.Module):
    """A projection of n of the positions in what it is given."""

    def __init__(self, projection: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.rows = rows
        self.training = projection.training

    def forward(self, states: Tensor) -> Any:
        return self.projection(_take(states, self.rows))


def _take(states: Tensor, rows: Tensor) -> Tensor:
    return states.flatten(0, -2).index_select(0, rows.to(states.device))
