"""int8 weights against eager dequantising, eager linears in the dense weight and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmfast.benchmarks import harness, quantized
from mmfast.ops import Int8Weight, int8_dequantize, int8_linear, int8_quantize


def plain(q: Int8Weight, dtype: torch.dtype) -> Tensor:
    """What one writes without thinking."""
    return (q.values * q.scale[:, None]).to(dtype)


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    dequantising = {"eager": plain, **harness.compiling(plain, device, quick)}
    yield from quantized.cases("int8", 8, int8_quantize, int8_dequantize, int8_linear, dequantising, {}, device, quick)
