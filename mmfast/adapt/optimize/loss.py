"""The loss of a causal language model on labels, from its hidden states: the logits are not made."""

from __future__ import annotations

import functools
import inspect
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.adapt.optimize.replacement import Forward, Replacement, is_bare_linear, is_optimized
from mmfast.adapt.optimize.source import fingerprint, unlike
from mmfast.ops.linear_cross_entropy import linear_cross_entropy

# transformers/models/llama/modeling_llama.py (Mistral, Qwen2, Qwen3, Phi3 and others have the same) and
# {llava,llava_next}/modeling_*.py: all arguments but two go to self.model, the logits are self.lm_head(hidden), the
# loss is self.loss_function(logits). The fingerprint of the forward -> the class of what it returns.
FORWARDS = {
    "627f5362ed52d20e": "CausalLMOutputWithPast",
    "cbb444faee8e25bf": "LlavaCausalLMOutputWithPast",
    "3b346e79ae07cd46": "LlavaNextCausalLMOutputWithPast",
    # transformers 5.11 and 5.17.
    "047ce9e0fa498a7b": "CausalLMOutputWithPast",
    "0d4b2465acd6488f": "LlavaCausalLMOutputWithPast",
    "b8b5918f7bd38407": "LlavaNextCausalLMOutputWithPast",
}


def _has_loss(module: nn.Module) -> bool:
    """Whether it is a language model with a head and takes labels; one of mmfast makes its loss without logits."""
    cls = type(module)
    # Of the class: PEFT's wrappers answer for the model that they hold, which has its own turn.
    if cls.__module__.split(".")[0] == "mmfast" or not hasattr(cls, "get_output_embeddings"):
        return False
    model: Any = module
    return model.get_output_embeddings() is not None and "labels" in inspect.signature(cls.forward).parameters


def _refuses_class(cls: type[nn.Module]) -> str | None:
    return unlike(cls, set(FORWARDS), "LlamaForCausalLM or LlavaForConditionalGeneration", wrappers=("transformers",))


def _refuses(module: nn.Module) -> str | None:
    model: Any = module
    if not _is_causal_lm_loss(model.loss_function):
        return "its loss_function is not ForCausalLMLoss"
    head = model.lm_head
    if not is_bare_linear(head):
        return f"its lm_head is a {type(head).__name__}" + " with hooks" * (type(head) is nn.Linear)
    return "its lm_head has a bias" if head.bias is not None else None


def _is_causal_lm_loss(function: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss


def _forward(original: type[nn.Module]) -> Forward:
    from transformers.utils import can_return_tuple

    from mmfast.adapt.optimize.last_layer import labelled_rows

    plain: Any = original.forward
    innermost: Any = inspect.unwrap(plain)
    names = list(inspect.signature(innermost).parameters)[1:]
    output_class = innermost.__globals__[FORWARDS[cast(str, fingerprint(plain))]]
    fields = [name for name in output_class.__dataclass_fields__ if name not in ("loss", "logits")]

    @can_return_tuple
    @functools.wraps(innermost)
    def forward(self: Any, *args: Any, output_logits: bool = False, **kwargs: Any) -> Any:
        """As the original; with labels the logits are None, unless `output_logits=True` asks for them."""
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.get("labels")
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        everything = isinstance(logits_to_keep, int) and logits_to_keep == 0
        # Asked at each call: all of it can change after the model was optimised, and who took its forward keeps it.
        if labels is None or not everything or not is_optimized(self) or _refuses(self) is not None:
            return plain(self, **kwargs)
        del kwargs["labels"]
        kwargs.pop("logits_to_keep", None)
        targets, ignore_index = _targets(labels, **kwargs)
        where = nullcontext() if output_logits else labelled_rows(self.model, targets != ignore_index, kwargs)
        with where as rows:
            outputs = self.model(**kwargs)
        hidden = outputs[0]
        if rows is not None:
            targets = targets[rows.to(targets.device)]
        loss = _loss(hidden, self.lm_head.weight, targets, ignore_index, kwargs.get("num_items_in_batch"))
        logits = self.lm_head(hidden) if output_logits else None
        return output_class(loss=loss, logits=logits, **{name: outputs.get(name) for name in fields})

    return forward


def _targets(
    labels: Tensor, shift_labels: Tensor | None = None, ignore_index: int = -100, **_: Any
) -> tuple[Tensor, int]:
    """The label [B · L] of what follows each position, and which value is none."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.flatten(), ignore_index


def _loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """transformers/loss/loss_utils.py, ForCausalLMLoss; but the mean over no label is 0 and not NaN."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.to(hidden.device)
    loss = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return cast(Tensor, loss)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return cast(Tensor, loss) / num_items_in_batch


def _misses(module: nn.Module) -> str | None:
    from mmfast.adapt.optimize.last_layer import refusal

    model: Any = module
    reason = refusal(model.model)
    return None if reason is None else f"its last layer computes unlabelled positions too: {reason}"


LOSS = Replacement("loss", "loss", _has_loss, _refuses_class, _refuses, _forward, _misses)
