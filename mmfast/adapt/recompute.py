"""What a decoder layer keeps of its forward pass for backward, layer by layer: less memory for more work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mmfast.adapt.optimize.source import unlike
from mmfast.adapt.optimize.swiglu import MLP, MLP_FORWARD

__all__ = ["POLICIES", "decoder_layers", "is_recomputed", "parse_policies", "policy_runs", "recompute"]

POLICIES = ("none", "product", "mlp", "full", "offload")
# The policies under which an MLP has a forward of ours.
_IN_MLP = ("product", "mlp")


def recompute(model: nn.Module, policies: str | Sequence[str]) -> list[str]:
    """Sets what each decoder layer computes again in backward instead of keeping it; "none" everywhere undoes it.

    | policy | kept of a layer with hidden size C and MLP size F, per token | computed again |
    |---|---|---|
    | "none" | everything | nothing |
    | "product" | everything but the product act(gate) · up of the MLP: F less where `down_proj` has LoRA | it |
    | "mlp" | everything but gate, up and their product: 3 F less | the gate and up projections, and the product |
    | "full" | the layer's input: C | the layer |
    | "offload" | nothing: the input is copied to pinned host memory while the next layers run | the layer |

    Values, gradients and the random numbers of dropout stay what they are. "full" is transformers' own gradient
    checkpointing, in its form that is not re-entrant. On a CPU, where the host is the device, "offload" is "full".

    Args:
        model: A causal language model of transformers, bare, adapted or optimised, or anything that holds one.
        policies: One for all layers, or one for each.

    Returns:
        The names of the layers.

    Raises:
        ValueError: If a policy is not known, there is not one for each layer, the model has no layers that can be
            computed again, or "product" or "mlp" is wanted of an MLP that is not gated as Llama's.
    """
    layers = decoder_layers(model)
    each = [policies] * len(layers) if isinstance(policies, str) else list(policies)
    unknown = sorted({policy for policy in each if policy not in POLICIES})
    if unknown:
        raise ValueError(f"recompute: the policy is {unknown[0]!r}; {', '.join(POLICIES)} are accepted")
    if len(each) != len(layers):
        raise ValueError(f"recompute: there are {len(each)} policies but {len(layers)} layers; as many are accepted")
    for (name, layer), policy in zip(layers.items(), each, strict=True):
        if policy in _IN_MLP:
            _check_mlp(name, layer, policy)
    offload = _Offload()
    for layer, policy in zip(layers.values(), each, strict=True):
        _set(layer, policy, offload)
    return list(layers)


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the language model in `model`, in order, by their names in it.

    Raises:
        ValueError: If it has none that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    get_decoder = getattr(model, "get_decoder", None)
    decoder: Any = get_decoder() if get_decoder else model
    inside = {id(module) for module in decoder.modules()}
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and id(module) in inside
    }
    if not found:
        raise ValueError(
            f"recompute: {type(model).__name__} has no decoder layers that transformers can checkpoint; a causal "
            "language model of transformers, or a model that holds one, is accepted"
        )
    return found


def parse_policies(text: str, count: int) -> list[str]:
    """One policy for each of `count` layers from "full", or from runs such as "full*20,none*12".

    Raises:
        ValueError: If a policy is not known, or the runs are not of `count` layers together.
    """
    runs = policy_runs(text)
    if len(runs) == 1 and runs[0][1] is None:
        return [runs[0][0]] * count
    policies = [name for name, times in runs for _ in range(times or 1)]
    if len(policies) != count:
        raise ValueError(
            f"recompute: {text!r} is for {len(policies)} layers, but there are {count}; one policy for all, or runs of "
            f"{count} layers together, are accepted"
        )
    return policies


def policy_runs(text: str) -> list[tuple[str, int | None]]:
    """The policies in "full*20,none*12", each with its number of layers; None where it has none.

    Raises:
        ValueError: If a policy is not known, or a number is none.
    """
    runs: list[tuple[str, int | None]] = []
    for run in text.split(","):
        name, star, times = run.strip().partition("*")
        if name not in POLICIES or (star and not times.isdecimal()):
            raise ValueError(
                f"recompute: {text!r} holds {run.strip()!r}; {', '.join(POLICIES)} are accepted, or runs of layers "
                "such as full*20,none*12"
            )
        runs.append((name, int(times) if star else None))
    return runs


def _check_mlp(name: str, layer: nn.Module, policy: str) -> None:
    mlp: Any = getattr(layer, "mlp", None)
    reason = "it has none" if mlp is None else None
    if mlp is not None and not is_recomputed(mlp):
        if "forward" in mlp.__dict__:
            reason = "its forward was replaced on the instance"
        elif getattr(type(mlp), "_mmfast_replacement", None) is not MLP:
            reason = unlike(type(mlp), MLP_FORWARD, "LlamaMLP")
    if reason:
        raise ValueError(
            f'recompute: the policy of {name} is "{policy}", but its MLP cannot be computed in parts: {reason}; the '
            'MLP of Llama, Mistral and Qwen2 is accepted; use "full"'
        )


def _set(layer: Any, policy: str, offload: _Offload) -> None:
    layer.gradient_checkpointing = policy in ("full", "offload")
    if policy == "offload":
        layer._gradient_checkpointing_func = offload.checkpoint
    elif policy == "full":
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    mlp: Any = getattr(layer, "mlp", None)
    if policy in _IN_MLP:
        mlp.forward = MethodType(_forwards[policy], mlp)
    elif mlp is not None and is_recomputed(mlp):
        del mlp.forward


def is_recomputed(mlp: nn.Module) -> bool:
    """Whether the module is an MLP under the policy "product" or "mlp"; it maps each position by itself, as before."""
    own = mlp.__dict__.get("forward")
    return getattr(own, "__func__", None) in _forwards.values()


def _forward_product(self: Any, x: Tensor) -> Tensor:
    """LlamaMLP.forward, whose product is computed again in backward."""
    return _forward(self, x, keep_factors=True)


def _forward_mlp(self: Any, x: Tensor) -> Tensor:
    """LlamaMLP.forward, whose three wide matrices are computed again in backward."""
    return _forward(self, x, keep_factors=False)


_forwards = {"product": _forward_product, "mlp": _forward_mlp}


def _forward(mlp: Any, x: Tensor, keep_factors: bool) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, mlp.down_proj(_product(mlp, mlp.gate_proj(x), mlp.up_proj(x))))
    again = _Again(mlp, x, keep_factors)
    hidden = cast(Tensor, _Product.apply(x, mlp.gate_proj(x), mlp.up_proj(x), again))
    node = hidden.grad_fn
    if node is None:
        return cast(Tensor, mlp.down_proj(hidden))
    storage = hidden.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        # Of the node, not of the tensor: what the node has saved is freed with the graph.
        return node, tensor.shape, tensor.stride(), tensor.storage_offset()

    with saved_tensors_hooks(pack, _unpack):
        return cast(Tensor, mlp.down_proj(hidden))


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    node, *view = packed
    return cast(Tensor, node.again.values(*node.saved_tensors)[2].detach().as_strided(*view))


def _product(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    if getattr(type(mlp), "_mmfast_replacement", None) is MLP:
        from mmfast.ops.swiglu import swiglu

        return swiglu(gate, up)
    return cast(Tensor, mlp.act_fn(gate) * up)


class _Product(torch.autograd.Function):
    """act(gate) · up, which saves its factors or, to make these again too, the input of the projections."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, again: _Again) -> Tensor:
        ctx.save_for_backward(*((gate, up) if again.keep_factors else (x,)))
        ctx.again = again
        return _product(again.mlp, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, hidden = ctx.again.values(*ctx.saved_tensors)
        ctx.again.made = None
        return None, *torch.autograd.grad(hidden, (gate, up), grad), None


class _Again:
    """The wide matrices of one call of an MLP, computed again as they were: same autocast, same dropout."""

    def __init__(self, mlp: Any, x: Tensor, keep_factors: bool) -> None:
        self.mlp = mlp
        self.keep_factors = keep_factors
        self.made: tuple[Tensor, Tensor, Tensor] | None = None
        self.device = x.device
        self.autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        self.random = _random_state(x.device) if mlp.training and not keep_factors else None

    def values(self, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and their product, a function of both, from what was saved; kept until it gave the gradients."""
        if self.made is None:
            enabled, dtype = self.autocast
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(self.device.type, dtype, enabled))
                if self.random is not None:
                    stack.enter_context(_random_as(self.random, self.device))
                with torch.no_grad():
                    factors = saved if self.keep_factors else (self.mlp.gate_proj(*saved), self.mlp.up_proj(*saved))
                gate, up = (factor.detach().requires_grad_() for factor in factors)
                with torch.enable_grad():
                    self.made = gate, up, _product(self.mlp, gate, up)
        return self.made


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _random_as(states: list[Tensor], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield


class _Offload:
    """Gradient checkpointing whose kept inputs wait on the host; the copies run beside the computation."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.waiting: list[weakref.ref[_OnHost]] = []

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(function, *args, use_reentrant=False)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.device.type != "cuda":
            return tensor
        if self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        held = _OnHost(tensor, self.stream)
        self.waiting.append(weakref.ref(held))
        return held

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.fetch(self.stream)
        torch.cuda.current_stream(tensor.device).wait_event(packed.arrived)
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
        # Backward goes through the layers in reverse: the one before is wanted next.
        alive = [held for held in (reference() for reference in self.waiting) if held is not None]
        before = alive[: alive.index(packed)] if packed in alive else alive
        self.waiting = [weakref.ref(held) for held in before]
        if before:
            before[-1].fetch(self.stream)
        return tensor


class _OnHost:
    """A tensor in pinned memory of the host, and again on its device once it was fetched."""

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self.device = tensor.device
        self.on_device: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self, stream: Any) -> Tensor:
        """Starts the copy back, once; `arrived` is its event."""
        if self.on_device is None:
            with torch.cuda.stream(stream):
                self.on_device = self.host.to(self.device, non_blocking=True)
                self.arrived = torch.cuda.Event()
                self.arrived.record(stream)
        return self.on_device
