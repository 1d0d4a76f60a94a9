"""`optimize`: finds the layers that mmfast's ops can serve and replaces their forwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from mmfast.adapt.optimize.classes import change_class, optimized_class
from mmfast.adapt.optimize.kinds import KINDS
from mmfast.adapt.optimize.replacement import Replacement, hides_forward, is_optimized
from mmfast.adapt.optimize.report import Left, OptimizeReport, Replaced

OPS = tuple(dict.fromkeys(kind.op for kind in KINDS))


def optimize(model: nn.Module, ops: Iterable[str] | None = None) -> OptimizeReport:
    """Replaces what mmfast's ops can do faster or in less memory in a model of transformers, in place and reversibly.

    | op | replaces |
    |---|---|
    | "lora" | PEFT's LoRA on a dense `nn.Linear` |
    | "rms_norm" | RMSNorm of the Llama family, with the addition before it in a decoder layer |
    | "swiglu" | the gated MLP with SiLU |
    | "rope" | the rotary embedding of queries and keys in an attention |
    | "loss" | the loss on `labels` of a causal model or LLaVA, and the last decoder layer's positions without a label |

    With "loss", logits are None unless `output_logits=True`; the last decoder layer computes its output projection and
    MLP at labelled positions alone.

    Each replaced module becomes an instance of a subclass of its class that has the same name: no class, function or
    module of another package is changed, nor another model. A layer is known by the source of its class's forward; one
    that is not known is left, and the report says so. Parameters and state-dict keys stay. A copy or a pickle of the
    model is optimised too; `save_pretrained` writes what it did before.

    Args:
        model: Any module. One in which there is nothing to replace is left as it is.
        ops: Names of the ops to use; by default all of them.

    Returns:
        What was replaced, what was left and why, and `restore()`.

    Raises:
        TypeError: If the model is no `nn.Module`, or `ops` a string.
        ValueError: If there is no op of a name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model is a {type(model).__name__}; a torch.nn.Module is accepted")
    chosen = _check_ops(ops)
    replaced: list[Replaced] = []
    left: list[Left] = []
    references = []
    modules = dict(model.named_modules())
    for kind in KINDS:
        if kind.op not in chosen:
            continue
        for name, module in modules.items():
            class_name = type(module).__name__
            if not kind.concerns(module):
                continue
            reason = _refusal(kind, module)
            if reason is not None:
                left.append(Left(name, kind.op, class_name, reason))
                continue
            change_class(module, optimized_class(type(module), kind))
            replaced.append(Replaced(name, kind.op, class_name))
            references.append(weakref.ref(module))
            missing = kind.misses(module)
            if missing is not None:
                left.append(Left(name, kind.op, class_name, missing))
    return OptimizeReport(type(model).__name__, chosen, replaced, left, references)


def _check_ops(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return OPS
    if isinstance(ops, str):
        raise TypeError(f"optimize: ops is the string {ops!r}; several names are accepted, as [{ops!r}]")
    asked = set(ops)
    unknown = sorted(asked - set(OPS), key=str)
    if unknown:
        raise ValueError(f"optimize: there is no op {unknown}; accepted are {list(OPS)}")
    return tuple(op for op in OPS if op in asked)


def _refusal(kind: Replacement, module: nn.Module) -> str | None:
    """Why the module is left; None if it is replaced."""
    if is_optimized(module):
        return "it is optimised already"
    if hides_forward(module):
        return "its forward was replaced on the instance"
    return kind.refuses_class(type(module)) or kind.refuses(module)
