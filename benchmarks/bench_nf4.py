"""NF4 against an eager table lookup, eager linears in the dense weight, torch.compile and bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness, quantized
from mmfast.nn.quantized_state import to_state
from mmfast.ops import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from mmfast.ops.nf4 import BLOCK, LEVELS, dequantize_rows, reference_quantize

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None


class Lookup:
    """What one writes without thinking: index the levels, multiply; into buffers that are kept."""

    def __init__(self, q: NF4Weight, dtype: torch.dtype) -> None:
        self.q, self.levels = q, torch.tensor(LEVELS, device=q.device)
        self.codes = torch.empty((*q.packed.shape, 2), dtype=torch.int32, device=q.device)
        self.values = torch.empty((*q.packed.shape, 2), device=q.device)
        self.out = torch.empty(q.shape, dtype=dtype, device=q.device)

    def __call__(self) -> Tensor:
        _, absmax, nested, code, offset = self.q.tensors()
        blocks = code[absmax.int()] * nested.repeat_interleave(256)[: absmax.numel()] + offset
        self.codes[..., 0] = self.q.packed >> 4
        self.codes[..., 1] = self.q.packed & 15
        torch.index_select(self.levels, 0, self.codes.view(-1), out=self.values.view(-1))
        self.values.view(-1, BLOCK).mul_(blocks[:, None])
        return self.out.copy_(self.values.view(self.q.shape))


def theirs(q: NF4Weight) -> tuple[Tensor, Any]:
    """The packed weight and bitsandbytes' own description of it."""
    state = to_state(q)
    packed = state.pop("weight")
    parts = {key.removeprefix("weight."): value for key, value in state.items()}
    return packed, bitsandbytes.functional.QuantState.from_dict(parts, device=q.device)


def dequantising(q: NF4Weight, dtype: torch.dtype) -> quantized.Providers:
    timed: quantized.Providers = {"table lookup": Lookup(q, dtype)}
    if fast := quantized.compiled(_plain, q.tensors(), q.shape, dtype):
        timed["torch.compile"] = fast
    if bitsandbytes:
        packed, state = theirs(q)
        state.dtype = dtype
        timed["bitsandbytes"] = lambda: bitsandbytes.functional.dequantize_4bit(packed, state)
    buffer = torch.empty(q.shape, dtype=dtype, device=q.device)
    for name in quantized.kernels(q.device):
        timed[name] = lambda name=name: nf4_dequantize(q, dtype, backend=name)
        timed[f"{name}, buffer kept"] = lambda name=name: _into(q, buffer, name)
    return timed


def _into(q: NF4Weight, buffer: Tensor, backend: str) -> Tensor:
    dequantize_rows(q.tensors(), 0, q.shape[0], buffer, backend)
    return buffer


def _plain(tensors: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    packed, absmax, nested, code, offset = tensors
    scales = code[absmax.int()] * nested.repeat_interleave(256)[: absmax.numel()] + offset
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1, BLOCK).int()
    levels = torch.tensor(LEVELS, device=packed.device)
    return (levels[codes] * scales[:, None]).view(shape).to(dtype)


def peers(q: NF4Weight, dtype: torch.dtype) -> quantized.Linears:
    if not bitsandbytes:
        return {}
    packed, state = theirs(q)
    state.dtype = dtype
    return {"bitsandbytes": lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state)}


def main() -> None:
    options = harness.arguments(__doc__)
    rows = quantized.rows_of(options, nf4_quantize, nf4_dequantize, nf4_linear, dequantising, peers)
    weight = torch.randn(quantized.WEIGHTS[0], device=options.device).bfloat16()
    timed: quantized.Providers = {"reference": lambda: reference_quantize(weight).absmax}
    if bitsandbytes:
        timed["bitsandbytes"] = lambda: (
            bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1].absmax
        )
    timed["auto"] = lambda: nf4_quantize(weight).absmax
    tolerance = 0.0 if options.device == "cpu" else 1e-2
    rows += quantized.timed("quantise 4096x4096 bfloat16", timed, weight.numel(), tolerance, options)
    harness.report("nf4", rows, options)


if __name__ == "__main__":
    main()
