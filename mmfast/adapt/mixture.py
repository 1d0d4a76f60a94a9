"""Mixture adapters before the attention of transformers' layers: by hooks, so that taking them off leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmfast.nn import MixtureAdapter

__all__ = ["EXPERT_WEIGHTS", "Route", "add_mixtures", "route_as_told", "route_by_first_sample", "route_by_token"]

EXPERT_WEIGHTS = "expert_weights"
"""The argument of a language model that `route_as_told` takes."""

Route: TypeAlias = Callable[["LayerMixture", Tensor, dict[str, Any]], Tensor]
"""Weights [B, K], or [B, T, K] of each token, for a layer's adapter from the input x [B, T, H] and the other arguments
of the attention, of which it takes out its own."""


@dataclass(frozen=True, eq=False)
class LayerMixture:
    """The hook before one attention. What it reads of itself a compiled layer is bound to: the index is read late."""

    index: int
    """Of the layer."""
    adapter: MixtureAdapter
    route: Route

    def __call__(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        if args:
            return (self.adapter(args[0], weights=self.route(self, args[0], kwargs)), *args[1:]), kwargs
        x = kwargs["hidden_states"]
        kwargs["hidden_states"] = self.adapter(x, weights=self.route(self, x, kwargs))
        return args, kwargs


def add_mixtures(
    attentions: Sequence[nn.Module], adapters: Sequence[MixtureAdapter], route: Route
) -> list[RemovableHandle]:
    """Lets each attention see adapter(x) instead of x, its `hidden_states`.

    Names, parameters and modules of the model stay as they are; the adapters live where their owner keeps them.

    Args:
        attentions: Of the layers, in order, called as transformers does, with `hidden_states` by name or first.
        adapters: One for each attention.
        route: What the adapters weight their experts by, one of this module.

    Returns:
        Handles whose `remove()` takes the adapters off.
    """
    return [
        attention.register_forward_pre_hook(LayerMixture(index, adapter, route), with_kwargs=True)
        for index, (attention, adapter) in enumerate(zip(attentions, adapters, strict=True))
    ]


def route_by_token(mixture: LayerMixture, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Every token is routed by itself."""
    return mixture.adapter.route(x)


def route_by_first_sample(mixture: LayerMixture, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Every token is routed by the token in its place of the batch's first sample, so samples depend on each other."""
    return mixture.adapter.route(x[:1]).expand(len(x), -1, -1)


def route_as_told(mixture: LayerMixture, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The weights that the caller gave the model as `expert_weights`.

    That is a tensor [layers, B, K], or [layers, B, T, K] of each token, with 1 in place of `layers` if it is of this
    layer alone; a sample's rows may be repeated, side by side, as beam search does. Or it is an empty dictionary: then
    every sample is routed by its first token, and its weights are put there by layer.

    Raises:
        RuntimeError: If the model was called without.
    """
    given = arguments.pop(EXPERT_WEIGHTS, None)
    if given is None:
        raise RuntimeError(
            f"add_mixtures: the model that has the adapters was called without {EXPERT_WEIGHTS}, so nothing says which "
            "experts to use; call the system that holds it, or its detach() first"
        )
    if isinstance(given, dict):
        given[mixture.index] = weights = mixture.adapter.route(x[:, 0])
        return weights
    # A graph that reads no index serves every layer.
    weights = given[0] if len(given) == 1 else given[mixture.index]
    return weights.repeat_interleave(len(x) // len(weights), 0)
