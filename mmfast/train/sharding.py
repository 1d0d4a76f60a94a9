"""A model divided among processes by FSDP2: each holds a share of its weights, gradients and optimiser state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mmfast.adapt.recompute import decoder_layers
from mmfast.nn.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel

__all__ = ["gather_state", "holds_whole_weights", "is_sharded", "shard_like", "shard_model", "whole"]


def shard_model(model: MultimodalModel, device: torch.device, dtype: torch.dtype) -> None:
    """Divides a model in its stage among all processes and moves it to their devices, layer by layer.

    Each decoder layer is a unit: its weights, the frozen ones and LoRA among them, are gathered when it computes and
    given up again. Another unit is what remains of the language model (embeddings, head, last norm) with all that
    trains outside of it; it stays gathered from forward to backward. What is frozen outside of the language model, such
    as the encoder, and quantised weights, which are buffers, stay whole in each process.

    Gradients are summed over the processes, not averaged. A forward or backward pass is one of all processes at once.

    Args:
        model: On the CPU, in its stage: what requires a gradient is settled, and float32.
        device: Of this process.
        dtype: Of the computation. Where the language model itself trains in bfloat16, its layers are gathered in that
            and their gradients summed in float32; autocast would keep a whole copy of the weights until backward.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = decoder_layers(model.language_model).values()
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32 and any(p.requires_grad for p in model.part_parameters("language_model").values()):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    inside = set(model.language_model.parameters())
    kept = {p for p in model.parameters() if p not in inside and not p.requires_grad}
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    fully_shard(cast(nn.Module, model), mesh=mesh, ignored_params=kept)
    for unit in (cast(Any, model), *cast(Any, layers)):
        unit.set_gradient_divide_factor(1.0)
        # Not the scaled sum that only NCCL has.
        unit.set_force_sum_reduction_for_comms(True)
    # A batch of text alone must take the same gathers backward through the layers as one with media elsewhere.
    model.language_model.enable_input_require_grads()


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` has divided the model."""
    return isinstance(model, FSDPModule)


def holds_whole_weights(model: nn.Module) -> bool:
    """Whether there are quantised weights, which sharding leaves whole."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a share; every process calls it. A plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors by name, those put together from shares on the CPU; every process calls it.

    Args:
        state: Tensors and shares.
        keep: Whether this process wants them. Without it one tensor at a time is held, and nothing is returned.
    """
    gathered = {}
    for name, tensor in state.items():
        found = whole(tensor)
        if keep:
            gathered[name] = found.cpu() if isinstance(tensor, DTensor) else found
    return gathered


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's share of a whole tensor that goes with `parameter`, on its device.

    What is not of the parameter's shape, such as a count of steps, stays whole.
    """
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
