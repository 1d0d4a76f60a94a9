"""NF4 against an eager table lookup, eager linears in the dense weight, torch.compile and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness, quantized
from mmfast.nn.quantized_state import to_state
from mmfast.ops import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize
from mmfast.ops.nf4 import BLOCK, LEVELS, dequantize_rows, reference_quantize

BITS = 4.127


def lookup(q: NF4Weight, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What one writes without thinking, index the levels and multiply, at its best: into buffers that are kept."""
    levels = torch.tensor(LEVELS, device=q.device)
    codes = torch.empty((*q.packed.shape, 2), dtype=torch.int32, device=q.device)
    values = torch.empty((*q.packed.shape, 2), device=q.device)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)

    def run(q: NF4Weight, dtype: torch.dtype) -> Tensor:
        codes[..., 0] = q.packed >> 4
        codes[..., 1] = q.packed & 15
        torch.index_select(levels, 0, codes.view(-1), out=values.view(-1))
        values.view(-1, BLOCK).mul_(scales(q)[:, None])
        return out.copy_(values.view(q.shape))

    return run


def scales(q: NF4Weight) -> Tensor:
    _, absmax, nested, code, offset = q.tensors()
    return code[absmax.int()] * nested.repeat_interleave(256)[: absmax.numel()] + offset


def plain(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    codes = torch.stack([q.packed >> 4, q.packed & 15], -1).view(-1, BLOCK).int()
    levels = torch.tensor(LEVELS, device=q.packed.device)
    return (levels[codes] * scales(q)[:, None]).view(q.shape).to(dtype)


def into_buffer(q: NF4Weight, dtype: torch.dtype, backend: str) -> Callable[..., Tensor]:
    buffer = torch.empty(q.shape, dtype=dtype, device=q.device)

    def run(q: NF4Weight, dtype: torch.dtype) -> Tensor:
        dequantize_rows(q.tensors(), 0, q.shape[0], buffer, backend)
        return buffer

    return run


def theirs(q: NF4Weight, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The packed weight and bitsandbytes' own description of it."""
    from bitsandbytes.functional import QuantState

    state = to_state(q)
    packed = state.pop("weight")
    parts = {key.removeprefix("weight."): value for key, value in state.items()}
    found = QuantState.from_dict(parts, device=q.device)
    found.dtype = dtype
    return packed, found


def their_dequantize(q: NF4Weight, dtype: torch.dtype) -> Callable[..., Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    packed, state = theirs(q, dtype)
    return lambda *_: dequantize_4bit(packed, state)


def their_linear(x: Tensor, q: NF4Weight, _: Tensor) -> Callable[..., Tensor]:
    from bitsandbytes import matmul_4bit

    packed, state = theirs(q, x.dtype)
    return lambda x, *_: matmul_4bit(x, packed.t(), state)


def their_quantize(_: Tensor) -> Callable[..., Tensor]:
    from bitsandbytes.functional import quantize_4bit

    return lambda weight: quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1].absmax


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    backend = "cpu" if device == "cpu" else "triton"
    dequantising = {"eager (table lookup)": harness.Prepared(lookup), **harness.compiling(plain, device, quick)}
    dequantising |= {"bitsandbytes": harness.Prepared(their_dequantize)}
    dequantising |= {f"mmfast:{backend}, buffer kept": harness.Prepared(partial(into_buffer, backend=backend))}
    peers = {"bitsandbytes": harness.Prepared(their_linear)}
    yield from quantized.cases(
        "nf4", BITS, nf4_quantize, nf4_dequantize, nf4_linear, dequantising, peers, device, quick
    )
    if not quick:
        yield harness.Case(
            op="nf4",
            name="1024x4096 bfloat16",
            table="quantising",
            mode="forward",
            arguments=lambda: [quantized.weight((1024, 4096), torch.bfloat16, device)],
            providers={
                "eager": lambda weight: reference_quantize(weight).absmax,
                "bitsandbytes": harness.Prepared(their_quantize),
                "mmfast": lambda weight: nf4_quantize(weight).absmax,
            },
            limit=1e-6 if device == "cpu" else 1e-2,
            bytes=int(1024 * 4096 * (2 + BITS / 8)),
            device=device,
        )
