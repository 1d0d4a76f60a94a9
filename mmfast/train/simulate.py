"""What a training step allocates, told without memory: the model's own code runs on tensors that have only a shape.

Floating-point tensors are fake; integers (token ids, labels, masks) are real, because what the model does depends on
them. So the figures come from the same forward and backward that a run makes, whatever the system is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmfast.ops.linear_cross_entropy import WORKSPACE_BYTES
from mmfast.train.batches import MicroBatch
from mmfast.train.step import autocast, held_frozen, untrained

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage

__all__ = ["StepMemory", "as_fake", "simulate_step"]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a forward and a backward pass, beside the weights and the state of the optimiser."""

    activations: int
    """What is kept for backward when forward has ended."""
    workspace: int
    """What comes on top of activations and gradients at the peak: the tensors of the operations that run then."""
    gradients: int
    """Gradients of everything that trains, when backward has ended."""
    peak: int
    """The most that is allocated at one time."""


def as_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces the model's tensors, in place, by fake ones of the same dtypes on the CPU."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor, parameter: bool) -> Any:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            # The old one is kept so that no other gets its id.
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new, tensor
        return made[id(tensor)][0]

    with mode:
        for module in model.modules():
            for tensors, parameter in ((module._parameters, True), (module._buffers, False)):
                tensors.update({name: fake(t, parameter) for name, t in tensors.items() if t is not None})


def simulate_step(
    model: MultimodalModel,
    inputs: Mapping[str, Tensor],
    mode: FakeTensorMode,
    dtype: torch.dtype,
    stage: Stage,
    windows: int = 1,
) -> StepMemory:
    """Runs the forward and backward passes of one optimiser step.

    Args:
        model: A model of fake tensors (`as_fake` with the same mode) in the stage that is asked about.
        inputs: A micro-batch as the loop gives it to the model, on the CPU.
        mode: The mode that its tensors are of.
        dtype: Of the computation; bfloat16 is autocast.
        stage: That stage.
        windows: Micro-batches of the step; from the second on the gradients of those before are there.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    with mode:
        given = {name: torch.empty_like(x) if x.is_floating_point() else x for name, x in inputs.items()}
    ledger = _Ledger()
    frozen = untrained(model, stage)[MicroBatch([], dict(inputs), 0).kind]
    with mode, ledger, held_frozen(frozen):
        for _ in range(min(windows, 2)):
            with autocast(torch.device("cpu"), dtype):
                loss = model(**given, loss_reduction="sum").loss
            activations, before = ledger.held - ledger.grown(model), ledger.peak
            ledger.peak = ledger.held
            if loss.requires_grad:
                loss.backward()
            del loss
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    peak = max(before, ledger.peak)
    model.zero_grad(set_to_none=True)
    workspace = max(0, peak - activations - gradients)
    return StepMemory(activations, workspace, gradients, peak)


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, from the moment that it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for tensor in tensors:
            self._enter(tensor, existed=True)  # a weight or an input: what is made has been counted
        if tensors and not any(isinstance(x, FakeTensor) or x.is_floating_point() for x in tensors):
            with unset_fake_temporarily():
                return self._count(func(*args, **kwargs))
        extra = _inside(func, args)
        self.peak = max(self.peak, self.held + extra)
        return self._count(func(*args, **kwargs))

    def grown(self, model: nn.Module) -> int:
        """Bytes of the gradients that are there."""
        return sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)

    def _count(self, result: Any) -> Any:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor)
        return result

    def _enter(self, tensor: Tensor, existed: bool = False) -> None:
        storage: Any = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = 0 if existed else storage.nbytes()

        def leave(_: Any) -> None:
            self.held -= self._alive.pop(key)[0]

        self._alive[key] = size, weakref.ref(storage, leave)
        self.held += size
        self.peak = max(self.peak, self.held)


def _inside(func: Any, args: Any) -> int:
    """Bytes that an op of ours allocates and frees again, which its outputs do not tell."""
    if func._schema.name != "mmfast::linear_cross_entropy_fwd":
        return 0
    hidden, weight, labels, ignore_index = args[:4]
    with unset_fake_temporarily():
        supervised = int((labels != ignore_index).sum())
    size = hidden.element_size()
    rows = min(supervised, max(1, WORKSPACE_BYTES // (weight.shape[0] * size)))
    # Logits, the rows that they are of, and their gradient.
    return rows * (weight.shape[0] + 2 * hidden.shape[-1]) * size
