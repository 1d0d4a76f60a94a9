"""Prompts and gates from the files of LLaMA-Adapter and of PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmfast.adapt.prompts import PROMPTS, add_prompts, decoder_of

__all__ = ["load_prompts"]

TABLE = "adapter_query.weight"
# Gates of the official layout; prompts and gates of PEFT's.
_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")
_PEFT = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")


def load_prompts(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    prompt_length: int = 10,
    gate_activation: Literal["tanh", "identity"] = "tanh",
) -> list[str]:
    """Adds prompts as `add_prompts` does, with the values of a checkpoint.

    Two layouts are known by their keys:

    - official: `adapter_query.weight` [layers · P, C], the prompts of the last layers in ascending order, and
      `layers.{i}.attention.gate` [1, H, 1, 1]. Gates of layers without prompts, which the files have, mean nothing.
    - PEFT's `ADAPTION_PROMPT`: `….layers.{i}.self_attn.adaption_prompt` [1, P, C] and `….adaption_gate` [1]. It has
      no tanh.

    Args:
        model: As in `add_prompts`, without prompts.
        state: The tensors of the file, of the adapter alone.
        prompt_length: P of the official layout, which does not say it.
        gate_activation: Of the official layout: "tanh" is what its training code does, "identity" what its inference
            code does with the same file.

    Returns:
        The full names of the attention modules that got prompts.

    Raises:
        TypeError, ValueError: As in `add_prompts`; or if tensors are missing, unexpected or of another shape: all are
            listed. Nothing is changed then.
    """
    decoder = decoder_of("load_prompts", model)
    count, config = len(decoder.layers), decoder.config
    problems = [] if state else ["it is empty"]
    wanted: tuple[int, ...]
    if TABLE in state:
        wanted = (1, config.num_attention_heads, 1, 1)
        prompts, gates = _official(state, prompt_length, count, problems)
    else:
        wanted, gate_activation = (1,), "identity"
        prompts, gates = _peft(state, problems)
        prompt_length = next((prompt.shape[-2] for prompt in prompts.values() if prompt.dim() > 1), prompt_length)
    for index in sorted(prompts.keys() | gates.keys()):
        if index not in prompts or index not in gates:
            problems.append(f"layer {index} has no {'prompt' if index not in prompts else 'gate'}")
        elif not index < count:
            problems.append(f"layer {index} is unknown: the model has {count}")
        else:
            expected = (prompt_length, config.hidden_size)
            if prompts[index].shape not in (expected, (1, *expected)):
                problems.append(f"the prompt of layer {index} is {list(prompts[index].shape)}, not {list(expected)}")
            if gates[index].shape != wanted:
                problems.append(f"the gate of layer {index} is {list(gates[index].shape)}, not {list(wanted)}")
    if problems:
        raise ValueError(
            f"load_prompts: the checkpoint does not fit this {type(model).__name__}: {'; '.join(problems)}. Files of "
            f"LLaMA-Adapter ({TABLE} and gates) or of PEFT's ADAPTION_PROMPT are accepted; nothing was changed"
        )
    names = add_prompts(
        model, prompt_length, sorted(prompts), gate_per_head=len(wanted) > 1, gate_activation=gate_activation
    )
    for index, prompt in prompts.items():
        module: Any = decoder.layers[index].self_attn._modules[PROMPTS]
        with torch.no_grad():
            module.prompt.copy_(prompt.reshape(module.prompt.shape))
            module.gate.copy_(gates[index].reshape(-1))
    return names


def _official(
    state: Mapping[str, Tensor], prompt_length: int, count: int, problems: list[str]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Prompts and gates by layer; what is wrong is added to the problems."""
    found = {int(match[1]): tensor for key, tensor in state.items() if (match := _GATE.fullmatch(key))}
    problems += _unexpected([key for key in state if key != TABLE and not _GATE.fullmatch(key)])
    table = state[TABLE]
    layers, rest = divmod(len(table), prompt_length)
    if rest or not 1 <= layers <= count:
        problems.append(
            f"{TABLE} has {len(table)} rows, not {prompt_length} (prompt_length) for each of up to {count} layers"
        )
        return {}, {}
    first = count - layers
    prompts = {first + index: block for index, block in enumerate(table.split(prompt_length))}
    return prompts, {index: gate for index, gate in found.items() if index >= first}


def _peft(state: Mapping[str, Tensor], problems: list[str]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """As `_official`."""
    found: dict[str, dict[int, Tensor]] = {"prompt": {}, "gate": {}}
    unexpected = []
    for key, tensor in state.items():
        match = _PEFT.fullmatch(key)
        if match is None or int(match[1]) in found[match[2]]:
            unexpected.append(key)
        else:
            found[match[2]][int(match[1])] = tensor
    problems += _unexpected(unexpected)
    return found["prompt"], found["gate"]


def _unexpected(keys: list[str]) -> list[str]:
    """One problem that names some of the keys."""
    if not keys:
        return []
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return [f"unexpected: {', '.join(keys[:5])}{more}"]
