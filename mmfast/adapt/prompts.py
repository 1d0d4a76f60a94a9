"""LLaMA-Adapter's prompts and gates in the attention of a language model of transformers, and off again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmfast.adapt.layers import adapter_parameters, named_layers
from mmfast.nn import AdaptedLinear, ZeroInitAttention

__all__ = ["add_prompts"]

# The name of a layer's `ZeroInitAttention` in its attention, and of the attention function that calls it.
PROMPTS = "prompts"
IMPLEMENTATION = "mmfast"
# The attribute of the decoder that remembers which attention function it had.
_BEFORE = "_attention_before_prompts"


@dataclass(frozen=True)
class Prompts:
    """The options of one layer's `ZeroInitAttention`."""

    prompt_length: int
    gate_per_head: bool = True
    gate_activation: Literal["tanh", "identity"] = "tanh"
    learned: bool = True
    gate_scale: bool = False
    base_projections: bool = False


def add_prompts(
    model: nn.Module,
    prompt_length: int = 10,
    layers: int | Iterable[int] = 30,
    *,
    gate_per_head: bool = True,
    gate_activation: Literal["tanh", "identity"] = "tanh",
    learned: bool = True,
    gate_scale: bool = False,
    base_projections: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> list[str]:
    """Gives attention layers of a language model trained prompts behind gates that start closed (LLaMA-Adapter).

    Each chosen layer's attention gets a `ZeroInitAttention` called `prompts`, whose prompts pass through the layer's
    own key and value projections. Until a gate has moved, logits have the bits of the frozen model with SDPA. All else
    in the model is frozen, except this package's adapters. The words' part is SDPA's, in all layers and whatever
    implementation the model had; masks and sliding windows concern the words alone.

    A word's prompts depend on its position, for prompts are not rotated: batches that are padded on the left need
    `position_ids` that start behind the padding, as `generate` makes them.

    A sample can bring prompts of its own, an image's features say: the model's forward takes them as the keyword
    arguments that `attend` describes, and `given_prompts` gives them to `generate`.

    Gradient checkpointing in its reentrant form needs `model.enable_input_require_grads()`, as with any adapter.

    Args:
        model: A model of transformers that uses its attention interface, or one that holds such a decoder, such as
            Llama, Mistral and Qwen2 with or without PEFT around them; changed in place.
        prompt_length: P, prompts of each layer.
        layers: How many decoder layers, the last ones, or the indices of the layers.
        gate_per_head: As in `ZeroInitAttention`, with all that follow.

    Returns:
        The full names of the attention modules that got prompts, in the model's order.

    Raises:
        TypeError: If there is no decoder whose layers have a `self_attn` with `k_proj` and `v_proj`.
        ValueError: If a layer does not exist or has prompts, or the model cannot use another attention function. The
            model is as it was then.
    """
    decoder = decoder_of("add_prompts", model)
    attentions = [layer.self_attn for layer in decoder.layers]
    chosen = _chosen(layers, len(attentions))
    taken = [index for index in chosen if has_prompts(attentions[index])]
    if taken:
        raise ValueError(
            f"add_prompts: layers {taken} have prompts already; layers without are accepted; remove(model) comes first"
        )
    options = Prompts(prompt_length, gate_per_head, gate_activation, learned, gate_scale, base_projections)
    prompts = {attentions[index]: build(decoder, attentions[index], options, dtype) for index in chosen}
    attach(decoder, prompts)
    adapters = [p for layer in named_layers(model, AdaptedLinear).values() for p in adapter_parameters(layer).values()]
    adapters += [p for layer in named_layers(model, ZeroInitAttention).values() for p in layer.parameters()]
    own = set(map(id, adapters))
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return [name for name, module in model.named_modules() if module in prompts]


def remove_prompts(module: nn.Module) -> list[str]:
    """Takes prompts off, wherever in `module` they are, and gives decoders the attention function that they had.

    Returns:
        The full names of the attention modules that had prompts.
    """
    names = []
    for name, attention in list(module.named_modules()):
        if has_prompts(attention):
            del attention._modules[PROMPTS]
            names.append(name)
    for decoder in module.modules():
        if _BEFORE in decoder.__dict__:
            hooks = decoder._forward_pre_hooks
            del hooks[next(key for key, hook in hooks.items() if hook is _check_implementation)]
            decoder.set_attn_implementation(decoder.__dict__.pop(_BEFORE))  # type: ignore[operator]
    return names


@contextmanager
def given_prompts(decoder: nn.Module, **prompts: Tensor) -> Iterator[None]:
    """Calls of the decoder in this thread get the keyword arguments of `attend`, which `generate` would refuse.

    Args:
        decoder: The model of transformers that holds the layers.
        **prompts: Each [B, …] for the rows that `generate` is given; where it makes several rows of one, as beams,
            these are repeated.
    """
    thread = threading.get_ident()

    @cache  # the layers keep the keys and values of prompts that stay the same tensors
    def repeated(times: int) -> dict[str, Tensor]:
        return {name: tensor.repeat_interleave(times, 0) for name, tensor in prompts.items()}

    def give(_: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread or not prompts:
            return None
        inputs = options.get("inputs_embeds")
        rows = len(options["input_ids"] if inputs is None else inputs)
        return args, options | repeated(rows // len(next(iter(prompts.values()))))

    hook = decoder.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prompt_bias: Tensor | None = None,
    sample_prompts: Tensor | None = None,
    prompted: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it, plus the gated attention to the prompts where the layer has some.

    The model's forward hands down what it does not know:

    Args:
        prompt_bias: [B, P or 1, C]: added to the prompts that layers have learned.
        sample_prompts: [B, P, C]: the prompts of layers that have learned none; without, these layers have words alone.
        prompted: [B] bool: the samples that have `sample_prompts`; None: all.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    learned = has_prompts(module) and module.prompts.prompt is not None  # type: ignore[union-attr]
    prompts = prompt_bias if learned else sample_prompts
    if not has_prompts(module) or (not learned and prompts is None):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    words, is_causal = None, options.get("is_causal")
    if torch.is_grad_enabled() and query.is_cpu and _is_plain(query, key, attention_mask, **options):
        # The op asks of SDPA what transformers would, and makes the gradients of both parts together.
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    else:
        # After attention transformers has [B, L, H, D], the op [B, H, L, D]: in that same memory.
        words = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0].transpose(1, 2)
    both = module.prompts(  # type: ignore[operator]
        query,
        key,
        value,
        module.k_proj,
        module.v_proj,
        is_causal=bool(is_causal),
        scale=options.get("scaling"),
        prompt_bias=prompts,
        words=words,
        prompted=None if learned else prompted,
    )
    return both.transpose(1, 2).contiguous(), None


def _is_plain(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **_: Any,
) -> bool:
    """Whether every token is there, and sees those before it or all."""
    unusual = mask, softcap, position_bias, cache
    return query.shape[2] == key.shape[2] > 1 and not dropout and all(option is None for option in unusual)


def has_prompts(module: nn.Module) -> bool:
    """Whether this attention, of one layer, has prompts."""
    return isinstance(module._modules.get(PROMPTS), ZeroInitAttention)


def check_foldable(where: str, module: nn.Module) -> None:
    """Refuses to fold adapters that prompts pass by: folded, they would act on the prompts too."""
    for name, attention in module.named_modules():
        if has_prompts(attention) and attention.prompts.base_projections:  # type: ignore[union-attr]
            projections = (attention._modules["k_proj"], attention._modules["v_proj"])
            if any(isinstance(projection, AdaptedLinear) for projection in projections):
                raise ValueError(
                    f"{where}: the prompts of {name} pass by the adapters of its key and value projections, which "
                    "folded adapters would not allow; projections without adapters are accepted there; keep the "
                    "adapters as they are"
                )


def decoder_of(where: str, model: nn.Module) -> Any:
    """The model of transformers inside `model` that has the decoder layers.

    Raises:
        TypeError: If there is none with the right projections.
        ValueError: If its class cannot use another attention function.
    """
    from transformers import PreTrainedModel

    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, PreTrainedModel) or not isinstance(layers, nn.ModuleList) or not all(map(_fits, layers)):
        raise TypeError(
            f"{where}: found no decoder in this {type(model).__name__} whose layers have a self_attn with q_proj, "
            "k_proj and v_proj; models of transformers such as Llama, Mistral and Qwen2 are accepted"
        )
    if not decoder._can_set_attn_implementation() or not decoder._supports_sdpa:
        raise ValueError(
            f"{where}: {type(decoder).__name__} does not take its attention from transformers' attention interface, or "
            "does not support SDPA; models that do are accepted, such as Llama, Mistral and Qwen2"
        )
    return decoder


def build(decoder: Any, attention: Any, options: Prompts, dtype: torch.dtype | None = torch.float32) -> Any:
    """New prompts for one attention of the decoder, in its mode and on its device; not yet in it."""
    config = decoder.config
    module = ZeroInitAttention(
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        attention.head_dim,
        options.prompt_length,
        config.hidden_size,
        gate_per_head=options.gate_per_head,
        gate_activation=options.gate_activation,
        learned=options.learned,
        gate_scale=options.gate_scale,
        base_projections=options.base_projections,
        device=attention.k_proj.weight.device,
        dtype=dtype,
    )
    return module.train(attention.training)


def attach(decoder: Any, prompts: Mapping[nn.Module, ZeroInitAttention]) -> None:
    """Puts prompts into their attentions, and makes `attend` the attention function of the decoder's layers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if _BEFORE not in decoder.__dict__:
        before = decoder.config._attn_implementation
        AttentionInterface.register(IMPLEMENTATION, attend)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        decoder.set_attn_implementation(IMPLEMENTATION)
        decoder.register_forward_pre_hook(_check_implementation)
        setattr(decoder, _BEFORE, before)
    for holder, module in prompts.items():
        holder.add_module(PROMPTS, module)


def _check_implementation(decoder: Any, _: Any) -> None:
    """Before a decoder with prompts runs: without its attention function they would have no effect, silently."""
    found = decoder.config._attn_implementation
    if found != IMPLEMENTATION:
        raise RuntimeError(
            f"add_prompts: the attention implementation of this {type(decoder).__name__} has been set to {found!r}, "
            f"which ignores the prompts; {IMPLEMENTATION!r} is accepted; set_attn_implementation({IMPLEMENTATION!r}), "
            "or remove(model) first"
        )


def _fits(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    return all(isinstance(getattr(attention, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj"))


def _chosen(layers: int | Iterable[int], count: int) -> list[int]:
    """The indices of the layers, in order."""
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ValueError(
                f"add_prompts: layers is {layers} but the model has {count} decoder layers; 1 to {count} of the last "
                "ones are accepted, or a list of indices"
            )
        return list(range(count - layers, count))
    chosen = sorted(layers)
    unknown = [index for index in chosen if not 0 <= index < count]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"add_prompts: layers is {chosen} but the model has {count} decoder layers; different indices from 0 to "
            f"{count - 1} are accepted, at least one"
        )
    return chosen
