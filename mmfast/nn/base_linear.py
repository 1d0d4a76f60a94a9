"""What every adapted linear stands on: an `nn.Linear` whose weight is a dense parameter or quantised and frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mmfast.nn.quantized_state import Format, from_state, state_names, to_state
from mmfast.ops.int8 import Int8Weight
from mmfast.ops.nf4 import NF4Weight
from mmfast.ops.weights import Weight, tensors

__all__ = ["BaseLinear", "check_no_hooks"]

# The parts of a quantised weight; each is a buffer of this name after "weight_", the first one just "weight".
_PARTS: dict[str, tuple[str, ...]] = {
    "nf4": ("packed", "absmax", "nested_absmax", "nested_code", "nested_offset"),
    "int8": ("values", "scale"),
}


class BaseLinear(nn.Linear):
    """An `nn.Linear` whose weight may be quantised.

    Dense, it is an `nn.Linear` in every way. Quantised, `weight` and the tensors that belong to it are buffers: they
    have no gradient, no optimiser sees them, `.to(device)` moves them and no cast of the module changes their dtype.
    The state dict names them as bitsandbytes does (`mmfast.nn.quantized_state`), and loading checks that they are of
    the layer's own format and size.

    Attributes:
        weight_format: "nf4", "int8", or None for a dense weight.
        weight_dtype: Dtype of the weight that was quantised; what it is dequantised to by default.
    """

    weight_format: Format | None = None
    weight_dtype: torch.dtype | None = None
    # The names of an adapter's own parameters; a layer that has some is no base for another adapter.
    adapter_names: ClassVar[tuple[str, ...]] = ()

    def base_weight(self) -> Weight:
        """The weight [out_features, in_features] as the ops take it: the parameter, or the quantised weight."""
        if self.weight_format == "nf4":
            return NF4Weight(
                self.weight,
                cast(Tensor, self.weight_absmax),
                cast(torch.dtype, self.weight_dtype),
                cast(Tensor | None, self.weight_nested_absmax),
                cast(Tensor | None, self.weight_nested_code),
                cast(Tensor | None, self.weight_nested_offset),
            )
        if self.weight_format == "int8":
            return Int8Weight(self.weight, cast(Tensor, self.weight_scale), cast(torch.dtype, self.weight_dtype))
        return self.weight

    def adopt(self, linear: nn.Linear) -> None:
        """Takes the weight, the bias and the mode of `linear` as its own: nothing is copied, `requires_grad` stays.

        Args:
            linear: A plain `nn.Linear` or a `BaseLinear` without an adapter, of this layer's sizes. It stays usable
                and shares its weight and bias with this layer.

        Raises:
            TypeError: If `linear` is anything else (an adapted or parametrised one, say).
            ValueError: If it has other sizes, or hooks, which this layer would lose.
        """
        _check_adoptable(type(self).__name__, linear)
        sizes, own = (linear.in_features, linear.out_features), (self.in_features, self.out_features)
        if sizes != own:
            raise ValueError(
                f"{type(self).__name__}: the layer maps {sizes[0]} to {sizes[1]} features; {own[0]} to {own[1]}, the "
                "sizes of the layer that adopts it, are accepted"
            )
        self._take(linear)

    def _take(self, linear: nn.Linear) -> None:
        if isinstance(linear, BaseLinear) and linear.weight_format is not None:
            self.hold(cast(NF4Weight | Int8Weight, linear.base_weight()))
        else:
            self._drop_weight()
            self.weight = cast(nn.Parameter, linear.weight)
        self.bias = linear.bias
        self.train(linear.training)

    def hold(self, weight: NF4Weight | Int8Weight) -> None:
        """Makes the quantised `weight` [out_features, in_features] the layer's own, without a copy."""
        self._drop_weight()
        self.weight_format = "nf4" if isinstance(weight, NF4Weight) else "int8"
        self.weight_dtype = weight.dtype
        for part in _PARTS[self.weight_format]:
            # Not persistent: the state dict has them under names with dots, which buffers cannot have.
            self.register_buffer(_buffer(self.weight_format, part), getattr(weight, part), persistent=False)

    def extra_repr(self) -> str:
        """The sizes, then the weight's format if it is quantised."""
        return super().extra_repr() + (f", weight={self.weight_format}" if self.weight_format else "")

    def _drop_weight(self) -> None:
        for part in _PARTS.get(self.weight_format or "", ("weight",)):
            delattr(self, _buffer(self.weight_format, part))
        self.weight_format = self.weight_dtype = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {id(part) for part in tensors(self.base_weight())} if self.weight_format else set()

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # A cast would make the quantised numbers mean something else; only the device is followed.
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_format:
            state = to_state(cast(NF4Weight | Int8Weight, self.base_weight()))
            destination.update({prefix + name: entry for name, entry in state.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self.weight_format is None:
            return
        held = cast(NF4Weight | Int8Weight, self.base_weight())
        names = state_names(self.weight_format, len(held.tensors()) == 5)
        # nn.Module knows none of these names.
        unexpected_keys[:] = [key for key in unexpected_keys if key.removeprefix(prefix) not in names]
        state = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        where = f"{prefix}weight: "
        if "weight" in state and state["weight"].is_floating_point():
            error_msgs.append(
                f"{where}it is {state['weight'].dtype}, dense, but the layer's is {self.weight_format}; expected the "
                f"entries {list(names)}; load into a plain linear and quantise that"
            )
            return
        missing_keys.extend(prefix + name for name in names if name not in state)
        if len(state) < len(names):
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if self.weight.is_meta and not assign:
            error_msgs.append(f"{where}the layer is on the meta device, without memory; load with assign=True")
            return
        try:
            loaded = from_state(state, held.shape, held.dtype)
        except ValueError as error:
            error_msgs.append(f"{where}{error}")
            return
        # New tensors, not copies into the old ones: layers may share the table of the double quantisation.
        self.hold(loaded if assign else _copied(loaded, self.weight.device))


def _check_adoptable(where: str, linear: nn.Linear) -> None:
    """Refuses a layer whose function is more than its weight and bias say."""
    if type(linear) is not nn.Linear and not (isinstance(linear, BaseLinear) and not linear.adapter_names):
        raise TypeError(
            f"{where}: the layer is a {type(linear).__name__}; a torch.nn.Linear or a QuantizedLinear is accepted; "
            "remove its adapter or parametrisation first"
        )
    check_no_hooks(where, linear)


def check_no_hooks(where: str, linear: nn.Linear) -> None:
    """Refuses a layer with hooks, which a layer in its place would lose."""
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        raise ValueError(
            f"{where}: the layer carries hooks or a replaced forward, which would be lost; "
            "a layer without them is accepted; add the adapter before the hooks"
        )


def _buffer(weight_format: str | None, part: str) -> str:
    return "weight" if weight_format is None or part == _PARTS[weight_format][0] else f"weight_{part}"


def _copied(weight: NF4Weight | Int8Weight, device: torch.device) -> NF4Weight | Int8Weight:
    parts: Any = (part.to(device, copy=True) if isinstance(part, Tensor) else part for part in weight)
    return type(weight)(*parts)
