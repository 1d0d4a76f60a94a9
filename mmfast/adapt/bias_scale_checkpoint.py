"""Biases, scales and norms in the layout of LLaMA-Adapter V2's 65B chat model, which has no prompts and no images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.adapt.add import add_bias_scale
from mmfast.adapt.layers import join
from mmfast.adapt.prompts import decoder_of

__all__ = ["bias_scale_state", "from_interleaved", "load_bias_scale", "to_interleaved"]

_LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS = {"attention_norm.weight": "input_layernorm", "ffn_norm.weight": "post_attention_layernorm"}
_SHOWN = 8


@torch.no_grad()
def load_bias_scale(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Adds biases and scales, as `add_bias_scale(scale_on="input")`, with a checkpoint's values, and loads its norms.

    The layout: `layers.{i}.attention.{wq,wk,wv,wo}_{bias,scale}` and `layers.{i}.feed_forward.{w1,w2,w3}_{bias,scale}`
    (biases as long as the output, scales as the input), `layers.{i}.{attention_norm,ffn_norm}.weight` and
    `norm.weight`, unsharded. Norms that the file lacks stay as they are.

    Source: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_chat65b/llama/model.py.

    Args:
        model: A Llama of transformers without adapters; changed in place.
        state: The tensors of the file.

    Returns:
        The full names of the replaced layers.

    Raises:
        TypeError, ValueError: As in `add_bias_scale`; or if tensors are missing, unexpected or of another shape: all
            are listed. Nothing is changed then.
    """
    decoder = decoder_of("load_bias_scale", model)
    shapes = _shapes(decoder)
    optional = {name for name in shapes if name.endswith("norm.weight")}
    kinds = {
        "missing": [name for name in shapes if name not in state and name not in optional],
        "unexpected": [name for name in state if name not in shapes],
        "of another shape": [name for name in shapes if name in state and tuple(state[name].shape) != shapes[name]],
    }
    problems = [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError(
            f"load_bias_scale: the checkpoint does not fit this {type(model).__name__}: {'; '.join(problems)}. The "
            "biases and scales of all linear layers of a Llama of this size are accepted; nothing was changed"
        )
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = add_bias_scale(decoder, list(_LINEARS.values()), "input")
    for name, target in _targets(decoder).items():
        if name in state:
            heads = _rotated_heads(decoder, name)
            target.copy_(from_interleaved(state[name], heads) if heads else state[name])
    return [join(prefix, name) for name in names]


def bias_scale_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of that layout, of a model that has biases and scales as `load_bias_scale` adds them.

    Raises:
        TypeError: As in `load_bias_scale`.
        ValueError: If a linear layer has none, or its scale is not on the input.
    """
    decoder = decoder_of("bias_scale_state", model)
    for index, layer in enumerate(decoder.layers):
        for ours in _LINEARS.values():
            linear = layer.get_submodule(ours)
            if getattr(linear, "scale_on", None) != "input":
                raise ValueError(
                    f"bias_scale_state: layers.{index}.{ours} is {linear}; a BiasScaleLinear with the scale on the "
                    "input is accepted; that layout has no other form"
                )
    state = {}
    for name, target in _targets(decoder).items():
        heads = _rotated_heads(decoder, name)
        state[name] = to_interleaved(target.detach(), heads) if heads else target.detach().clone()
    return state


def from_interleaved(rows: Tensor, heads: int) -> Tensor:
    """From Meta's order of a head's channels, whose rotary pairs are neighbours, to transformers', a half apart.

    Args:
        rows: [heads · D] or [heads · D, …]: a bias, or what makes queries or keys.
        heads: Heads that the rows are of.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `from_interleaved`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rotated_heads(decoder: Any, name: str) -> int:
    """Heads of a bias that a rotary embedding follows, else 0."""
    if name.endswith("wq_bias"):
        return int(decoder.config.num_attention_heads)
    return int(decoder.config.num_key_value_heads) if name.endswith("wk_bias") else 0


def _shapes(decoder: Any) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": tuple(decoder.norm.weight.shape)}
    for index, layer in enumerate(decoder.layers):
        for theirs, ours in _LINEARS.items():
            linear = layer.get_submodule(ours)
            shapes[f"layers.{index}.{theirs}_bias"] = (linear.out_features,)
            shapes[f"layers.{index}.{theirs}_scale"] = (linear.in_features,)
        for theirs, ours in _NORMS.items():
            shapes[f"layers.{index}.{theirs}"] = tuple(layer.get_submodule(ours).weight.shape)
    return shapes


def _targets(decoder: Any) -> dict[str, Tensor]:
    """The parameters of a decoder with biases and scales, by their names in the file."""
    targets: dict[str, Tensor] = {"norm.weight": decoder.norm.weight}
    for index, layer in enumerate(decoder.layers):
        for theirs, ours in _LINEARS.items():
            linear = layer.get_submodule(ours)
            targets[f"layers.{index}.{theirs}_bias"] = linear.adapter_bias
            targets[f"layers.{index}.{theirs}_scale"] = linear.adapter_scale
        for theirs, ours in _NORMS.items():
            targets[f"layers.{index}.{theirs}"] = layer.get_submodule(ours).weight
    return targets
