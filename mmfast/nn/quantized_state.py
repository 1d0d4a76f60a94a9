"""A quantised weight under the names that bitsandbytes gives it in a state dict, and back.

NF4, as its `Linear4bit` saves it; the last three only if double-quantised (the offset stands in the last entry):

    weight [N·K / 2, 1] (uint8)           weight.quant_state.bitsandbytes__nf4 (uint8): JSON
    weight.absmax [blocks]                weight.nested_absmax [blocks / 256] (fp32)
    weight.quant_map [16] (fp32)          weight.nested_quant_map [256] (fp32)

int8, as its `Linear8bitLt` saves it: weight [N, K] (int8), SCB [N] (fp32; 127 times the scale), weight_format [] (0).

Source: bitsandbytes 0.50, functional.py (QuantState.as_dict, from_dict) and nn/modules.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mmfast.ops.int8 import Int8Weight
from mmfast.ops.nf4 import BLOCK, LEVELS, NESTED_BLOCK, NF4Weight

__all__ = ["FORMATS", "NF4_STATE", "Format", "from_state", "state_names", "to_state"]

Format = Literal["nf4", "int8"]
FORMATS: tuple[Format, ...] = ("nf4", "int8")

NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def state_names(format: Format, double_quant: bool = False) -> tuple[str, ...]:
    """The names under which a weight of this format is saved."""
    if format == "int8":
        return "weight", "SCB", "weight_format"
    return "weight", "weight.absmax", "weight.quant_map", *(_NESTED if double_quant else ()), NF4_STATE


def to_state(weight: NF4Weight | Int8Weight) -> dict[str, Tensor]:
    """The entries of a weight; all but the small ones share its memory. On the meta device the JSON is empty."""
    device = weight.device
    if isinstance(weight, Int8Weight):
        # (scale · 127) / 127 is scale again, to the last bit, for every scale that is itself some fp32 number / 127.
        kind = torch.zeros((), dtype=torch.uint8, device=device)
        return {"weight": weight.values, "SCB": weight.scale * 127, "weight_format": kind}
    described: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    state = {
        "weight": weight.packed.view(-1, 1),
        "weight.absmax": weight.absmax,
        "weight.quant_map": torch.tensor(LEVELS, device=device),
    }
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.nested_offset is not None:
        # A copy of the table, which layers share: files of safetensors hold no shared memory.
        state |= {"weight.nested_absmax": weight.nested_absmax, "weight.nested_quant_map": weight.nested_code.clone()}
        described |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        if device.type != "meta":
            described["nested_offset"] = weight.nested_offset.item()
    text = b"" if device.type == "meta" else json.dumps(described).encode()
    state[NF4_STATE] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return state


def from_state(state: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> NF4Weight | Int8Weight:
    """The weight that `to_state`, or bitsandbytes, gave; it shares the memory of the entries.

    Args:
        state: All entries of one weight, and no others.
        shape: (N, K) of the weight.
        dtype: Of the weight that was quantised, where the entries do not say it (int8).

    Raises:
        ValueError: If the entries are not those of a weight of this shape in a format that is known here.
    """
    if state.keys() == set(state_names("int8")):
        return _int8_from_state(state, shape, dtype)
    if state.keys() not in (set(state_names("nf4")), set(state_names("nf4", True))):
        raise ValueError(f"it has the entries {sorted(state)}; expected {_expected()}")
    return _nf4_from_state(state, shape)


def _int8_from_state(state: Mapping[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Int8Weight:
    _check("weight", state["weight"], torch.int8, shape)
    _check("SCB", state["SCB"], torch.float32, shape[:1])
    kind = int(state["weight_format"])
    if kind:
        raise ValueError(f"weight_format is {kind}, a layout of one kind of GPU; expected 0, rows one after the other")
    return Int8Weight(state["weight"].contiguous(), state["SCB"] / 127, dtype)


def _nf4_from_state(state: Mapping[str, Tensor], shape: tuple[int, int]) -> NF4Weight:
    described = _described(state[NF4_STATE])
    double_quant = "nested_absmax" in {name.removeprefix("weight.") for name in state}
    expected = {"quant_type": "nf4", "blocksize": BLOCK, "shape": list(shape)}
    if double_quant:
        expected |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    wrong = {key: described.get(key) for key, value in expected.items() if described.get(key) != value}
    if wrong:
        raise ValueError(f"{NF4_STATE} says {wrong}; expected { {key: expected[key] for key in wrong} }")
    dtype = getattr(torch, str(described.get("dtype")), None)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{NF4_STATE} says dtype {described.get('dtype')!r}; expected float32, float16 or bfloat16")
    rows, columns = shape
    blocks = -(-rows * columns // BLOCK)
    _check("weight", state["weight"], torch.uint8, (rows * columns // 2, 1))
    _check("weight.absmax", state["weight.absmax"], torch.uint8 if double_quant else torch.float32, (blocks,))
    _check("weight.quant_map", state["weight.quant_map"], torch.float32, (len(LEVELS),))
    levels = state["weight.quant_map"].tolist()
    if max(abs(ours - theirs) for ours, theirs in zip(LEVELS, levels, strict=True)) > 1e-6:
        raise ValueError(f"weight.quant_map is {levels}; expected the levels of NF4, {list(LEVELS)}")
    packed, absmax = state["weight"].contiguous().view(rows, columns // 2), state["weight.absmax"].contiguous()
    if not double_quant:
        return NF4Weight(packed, absmax, dtype)
    nested_absmax, nested_code = (state[name].contiguous() for name in _NESTED)
    _check(_NESTED[0], nested_absmax, torch.float32, (-(-blocks // NESTED_BLOCK),))
    _check(_NESTED[1], nested_code, torch.float32, (256,))
    offset = described.get("nested_offset")
    if not isinstance(offset, float):
        raise ValueError(f"{NF4_STATE} says nested_offset {offset!r}; expected a number")
    return NF4Weight(packed, absmax, dtype, nested_absmax, nested_code, torch.tensor(offset, device=packed.device))


def _described(entry: Tensor) -> dict[str, Any]:
    try:
        described = json.loads(bytes(entry.to("cpu", torch.uint8).tolist()))
    except ValueError as error:
        raise ValueError(f"{NF4_STATE} {list(entry.shape)} is not JSON ({error})") from None
    if not isinstance(described, dict):
        raise ValueError(f"{NF4_STATE} holds {described!r}; expected a JSON object")
    return described


def _check(name: str, entry: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if entry.dtype != dtype or entry.shape != shape:
        raise ValueError(f"{name} is {entry.dtype} {list(entry.shape)}; expected {dtype} {list(shape)}")


def _expected() -> str:
    return " or ".join(
        str(sorted(names)) for names in (state_names("nf4"), state_names("nf4", True), state_names("int8"))
    )
