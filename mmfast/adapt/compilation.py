"""`torch.compile` for the decoder layers of a language model in training: one compilation for all that are alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from mmfast.adapt.mixture import EXPERT_WEIGHTS
from mmfast.adapt.recompute import decoder_layers, policy_runs

__all__ = ["LayerCompiler", "refused_policy"]

BACKEND = "inductor"
# Beside the length there is a graph for each kind of layer (with and without prompts, the last one at labelled
# positions), each set of parameters that train, with and without a gradient for the input, and one row or several.
_GRAPHS = 64
# They keep less by hooks on saved tensors, which cannot be traced.
_UNTRACED = ("product", "mlp")


def refused_policy(text: str) -> str | None:
    """The first policy in a `recompute` such as "full*20,mlp*12" that compiled layers cannot have; None without one."""
    return next((name for name, _ in policy_runs(text) if name in _UNTRACED), None)


class LayerCompiler:
    """Compiles decoder layers, whole or not at all: a graph break inside one is an error.

    The batch size and the length are symbols, so batches of other lengths need no other graph. Recomputation ("full",
    "offload") is around a compiled layer. Outside of `applied`, and in evaluation mode, the layers are as ever; they
    are never wrapped, so the names of modules and parameters stay.

    Args:
        device: Where the layers are.

    Raises:
        RuntimeError: If nothing can be compiled for this device here, for want of a compiler or of Triton.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            torch.compile(lambda x: x + 1, fullgraph=True, backend=BACKEND)(torch.zeros(2, device=device))
        except Exception as error:
            raise RuntimeError(
                f"compile: nothing can be compiled for {device} on this machine: {_summary(error)}; accepted are a "
                "C++ compiler (g++, or the one that CXX names) and, for a GPU, Triton; install them, or set compile to "
                "false"
            ) from error
        # What is compiled is kept with the code of the function: its own code, so that it goes when this object does.
        function = FunctionType(_call.__code__.replace(), globals())
        self._compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=BACKEND)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within, the decoder layers of `model` are compiled when they run in training mode.

        Args:
            model: A causal language model of transformers, bare, adapted or optimised.

        Raises:
            ValueError: If the model has no layers that transformers can checkpoint.
            RuntimeError: If a layer cannot be compiled; the message says where it breaks.
        """
        layers: list[Any] = list(decoder_layers(model).values())
        before = [(layer.gradient_checkpointing, layer.__dict__.get(_HOOK)) for layer in layers]
        for index, (layer, (recomputed, function)) in enumerate(zip(layers, before, strict=True)):
            # Where transformers would recompute a layer in training mode it calls this, whichever its version.
            layer.__dict__[_HOOK] = partial(self._run, index, function if recomputed else None)
            layer.gradient_checkpointing = True
        try:
            with torch._dynamo.config.patch(recompile_limit=_GRAPHS):  # type: ignore[attr-defined]
                yield
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"compile: a layer of this {type(model).__name__} cannot be compiled whole: {_summary(error)}; "
                "layers without a graph break are accepted; set compile to false"
            ) from error
        finally:
            for layer, (recomputed, function) in zip(layers, before, strict=True):
                layer.gradient_checkpointing = recomputed
                if function is None:
                    del layer.__dict__[_HOOK]
                else:
                    layer.__dict__[_HOOK] = function

    def _run(self, index: int, recompute: Callable[..., Any] | None, layer: partial[Any], *args: Any) -> Any:
        """One call of the layer at `index`, whose arguments by name are in `layer`."""
        experts = layer.keywords.get(EXPERT_WEIGHTS)
        # A dictionary is for what a layer says of two sequences of one token, and not worth a graph.
        if not isinstance(experts, dict):
            own = {} if experts is None else {EXPERT_WEIGHTS: experts[index : index + 1]}
            layer = partial(self._compiled, layer.func, *layer.args, **layer.keywords | own)
        return layer(*args) if recompute is None else recompute(layer, *args)


_HOOK = "_gradient_checkpointing_func"


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _summary(error: BaseException) -> str:
    """The first paragraph of its message, on one line."""
    return " ".join(str(error).strip().split("\n\n")[0].split()) or type(error).__name__
