"""NF4 against an eager table lookup, eager linears in the dense weight, torch.compile and bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.nn.quantized_state import to_state
from mmfast.ops import NF4Weight, nf4_dequantize, nf4_linear, nf4_quantize, products
from mmfast.ops.backends import machine
from mmfast.ops.nf4 import BLOCK, LEVELS, dequantize_rows, reference_quantize

# [N, K] of LLaMA-7B (attention, MLP), and smaller ones.
WEIGHTS = [(4096, 4096), (11008, 4096), (1024, 1024), (256, 256)]
ROWS = {"cpu": [1, 2, 4, 8, 16, 128], "cuda": [1, 2, 4, 8, 16, 64, 4096]}
TRAINED = {"cpu": [128], "cuda": [4096]}

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


def kernels(device: torch.device) -> list[str]:
    """The kernels that can be timed here: the interpreter proves kernels, it does not time them."""
    on = machine(device)
    return [
        name for name in ("cpu", "triton") if on.lacks(name) is None and not (on.device == "cpu" and name == "triton")
    ]


def compiled(function: Callable[..., Any], *arguments: Any) -> harness.Provider | None:
    """`function(*arguments)` by torch.compile; None, and said so, where that does not work."""
    try:
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    except Exception as error:  # no C++ compiler, or no Triton
        print(f"torch.compile does not work here: {type(error).__name__}")
        return None
    return lambda: fast(*arguments)


def gate(timed: dict[str, harness.Provider], tolerance: float) -> None:
    """Raises unless all providers agree with the first."""
    (_, first), *others = timed.items()
    expected = first().double()
    for name, run in others:
        error = torch.linalg.vector_norm(run().double() - expected) / torch.linalg.vector_norm(expected)
        if not error <= tolerance:
            raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")


def dequantising(q: NF4Weight, dtype: torch.dtype) -> dict[str, harness.Provider]:
    timed: dict[str, harness.Provider] = {"table lookup": Lookup(q, dtype)}
    plain = compiled(_plain, q.tensors(), q.shape, dtype)
    if plain:
        timed["torch.compile"] = plain
    if bitsandbytes:
        packed, state = theirs(q)
        state.dtype = dtype
        timed["bitsandbytes"] = lambda: bitsandbytes.functional.dequantize_4bit(packed, state)
    buffer = torch.empty(q.shape, dtype=dtype, device=q.device)
    for name in kernels(q.device):
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


def multiplying(x: Tensor, q: NF4Weight, dense: Tensor, backward: bool) -> dict[str, harness.Provider]:
    """x Wᵀ, and the gradient of x with `backward`. The first provider has the dense weight."""

    def run(linear: Callable[[Tensor], Tensor]) -> harness.Provider:
        if not backward:
            return lambda: linear(x)
        leaf, grad = x.detach().requires_grad_(), torch.ones_like(linear(x))
        return lambda: torch.autograd.grad(linear(leaf), leaf, grad)[0]

    timed = {
        "dense F.linear": run(lambda x: F.linear(x, dense)),
        "dequantise, F.linear": run(lambda x: F.linear(x, nf4_dequantize(q, x.dtype))),
    }
    if bitsandbytes:
        packed, state = theirs(q)
        state.dtype = x.dtype
        timed["bitsandbytes"] = run(lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state))
    for name in kernels(q.device):
        timed[name] = run(lambda x, name=name: nf4_linear(x, q, backend=name))
    return timed


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []

    def add(case: str, timed: dict[str, harness.Provider], elements: int, tolerance: float) -> None:
        gate(timed, tolerance)
        rounds = options.rounds * (1 if elements > 1 << 20 else 20)
        for name, timing in harness.measure(timed, options.device, rounds).items():
            rows.append({"case": case, "provider": name, **timing})

    for shape in WEIGHTS[: 1 if options.quick else None]:
        for dtype in (torch.bfloat16, torch.float32):
            weight = (0.02 * torch.randn(shape, device=options.device)).to(dtype)
            q = nf4_quantize(weight)
            case = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            add(f"dequantise {case}", dequantising(q, dtype), weight.numel(), 1e-6)
            dense = nf4_dequantize(q, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            for count in ROWS[options.device][: 1 if options.quick else None]:
                x = torch.randn(count, shape[1], device=options.device).to(dtype)
                add(f"linear {count} · {case}", multiplying(x, q, dense, False), weight.numel() * count, tolerance)
            # A gradient in 16 bits takes eager PyTorch many seconds on a CPU without instructions for it.
            slow = options.device == "cpu" and products.is_slow(dtype, 128, grad=True) and weight.numel() > 2**20
            for count in TRAINED[options.device][: 0 if options.quick or slow else None]:
                x = torch.randn(count, shape[1], device=options.device).to(dtype)
                add(f"both {count} · {case}", multiplying(x, q, dense, True), weight.numel() * count, tolerance)
    weight = torch.randn(WEIGHTS[0], device=options.device).bfloat16()
    timed: dict[str, harness.Provider] = {"reference": lambda: reference_quantize(weight).absmax}
    if bitsandbytes:
        timed["bitsandbytes"] = lambda: (
            bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1].absmax
        )
    timed["auto"] = lambda: nf4_quantize(weight).absmax
    add("quantise 4096x4096 bfloat16", timed, weight.numel(), 0.0 if options.device == "cpu" else 1e-2)
    harness.report("nf4", rows, options)


if __name__ == "__main__":
    main()
