"""int8 weights against eager dequantising, eager linears in the dense weight and torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.benchmarks import harness, quantized
from mmfast.ops import Int8Weight, int8_dequantize, int8_linear, int8_quantize


def plain(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What one writes without thinking."""
    return (values * scale[:, None]).to(dtype)


def dequantising(q: Int8Weight, dtype: torch.dtype) -> quantized.Providers:
    timed: quantized.Providers = {"values * scale": lambda: plain(q.values, q.scale, dtype)}
    if fast := quantized.compiled(plain, q.values, q.scale, dtype):
        timed["torch.compile"] = fast
    for name in quantized.kernels(q.device):
        timed[name] = lambda name=name: int8_dequantize(q, dtype, backend=name)
    return timed


def main() -> None:
    options = harness.arguments(__doc__)
    rows = quantized.rows_of(options, int8_quantize, int8_dequantize, int8_linear, dequantising)
    harness.report("int8", rows, options)


if __name__ == "__main__":
    main()
