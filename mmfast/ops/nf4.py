"""NF4: weights in 4 bits, as QLoRA and bitsandbytes store them; quantised, dequantised, and multiplied as they lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mmfast.ops import backends, extension, products, quantized_linear, weights
from mmfast.ops.backends import Backend, Machine, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Weights that share one absmax, and values of absmax that share one nested absmax.
BLOCK, NESTED_BLOCK = 64, 256

# Quantiles of the normal distribution, so spaced that zero is one of them; a weight is LEVELS[4 bits] · absmax.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The smallest absmax that is divided by, so that a block of zeros is 0 / SMALLEST.
SMALLEST = 1e-38

# Rows of x up to which decoding in registers is faster than dequantising and a dense product (CPU: two cores of a
# Zen 3; Triton: not measured, the rows of one tensor-core tile).
SMALL_ROWS = {"cpu": 16, "triton": 16, "cuda": 16, "reference": 0}
# The same on a CPU with matrix instructions for 16-bit floats (two cores of an Intel Xeon with AMX).
SMALL_ROWS_NATIVE = 12
# The same where a product of bfloat16 is made in tiles that are decoded as they are needed (`products.linear`).
SMALL_ROWS_TILES = 4


class NF4Weight(NamedTuple):
    """A frozen weight [N, K] in 4 bits. Blocks are of 64 elements of the weight as it lies in memory, row after row.

    Attributes:
        packed: [N, K // 2] (uint8), element 2j in the high half of byte j, 2j + 1 in the low one; K is even.
        absmax: [ceil(N·K / 64)] (fp32; uint8 if double-quantised), the largest magnitude in each block.
        dtype: of the weight that was quantised, and of what `nf4_dequantize` returns by default.
        nested_absmax: [ceil(blocks / 256)] (fp32), if double-quantised, as the next two; the absmax of block i is
            nested_code[absmax[i]] · nested_absmax[i // 256] + nested_offset.
        nested_code: [256] (fp32).
        nested_offset: [] (fp32).
    """

    packed: Tensor
    absmax: Tensor
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return _shape([self.packed])

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> list[Tensor]:
        """[packed, absmax], and the nested ones if there are any: what a dispatcher op takes."""
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        return [self.packed, self.absmax, *(part for part in nested if part is not None)]


def _shape(tensors: list[Tensor]) -> tuple[int, int]:
    rows, half = tensors[0].shape
    return rows, 2 * half


def reference_quantize(weight: Tensor, double_quant: bool = True) -> NF4Weight:
    """The definition: what bitsandbytes 0.50 makes of a weight on a CPU, to the last bit.

        absmax = max |w| of a block of 64;  x = w · (1 / absmax);  code = how many of the 15 midpoints between
        neighbouring levels are below x, so that a tie goes to the lower level.

    The last block, if it is shorter than 64, is divided by absmax instead. A block of zeros has code 7 (level 0) and
    absmax 0, except a shorter last one, whose absmax is 1e-38. Double quantisation replaces absmax by 8-bit codes of
    absmax - mean(absmax), see `quantize_absmax`.

    Args:
        weight: [N, K] (fp32, fp16, bf16; finite; any strides), K even.
        double_quant: store absmax in 8 bits.

    Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3; bitsandbytes, backends/default/ops.py.
    """
    return _finish(weight, *_reference_blocks(weight), double_quant)


def _reference_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1).float()
    whole = flat.numel() // BLOCK * BLOCK
    blocks, rest = flat[:whole].view(-1, BLOCK), flat[whole:]
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax(0, keepdim=True).clamp(min=SMALLEST)
        absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, rest / last])
    levels = torch.tensor(LEVELS, device=weight.device)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2]).view(weight.shape[0], -1), absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Double quantisation of absmax [blocks] (fp32): codes (uint8), nested absmax, code table and offset.

    offset = mean(absmax); in blocks of 256, x = (absmax - offset) · (1 / nested absmax) is rounded to the nearest of
    65,536 evenly spaced points of [-1, 1] and that to the nearest entry of the table, as bitsandbytes does on a CPU. A
    block of zeros has code 0.
    """
    code = dynamic_code().to(absmax.device)
    offset = absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = centred.abs().amax(1)
    scaled = (centred * torch.where(nested == 0, 0, 1 / nested)[:, None]).clamp(-1, 1)
    # In float64 the fused multiply-add of bitsandbytes is exact until it is rounded.
    point = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().int()
    codes = torch.bucketize(point / 65535 * 2 - 1, (code[:-1] + code[1:]) / 2, out_int32=True)
    codes = codes.masked_fill(nested[:, None] == 0, 0).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()].contiguous(), nested, code, offset


@cache
def dynamic_code() -> Tensor:
    """bitsandbytes' signed "dynamic" map [256] (fp32): 0, 1, and ±10^(d - 6) times the middles of 2^d parts of [0.1, 1]
    for d = 0 … 6, in order."""
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        values += [10 ** (decade - 6) * middles, -(10 ** (decade - 6)) * middles]
    return torch.cat(values).sort().values


def _finish(weight: Tensor, packed: Tensor, absmax: Tensor, double_quant: bool) -> NF4Weight:
    """The quantised weight, from the codes and absmax of `weight`."""
    if not absmax.isfinite().all():
        raise ValueError(
            f"nf4_quantize: weight {list(weight.shape)} holds an infinity or NaN; expected finite values; "
            "look for the step that made it"
        )
    if not double_quant:
        return NF4Weight(packed, absmax, weight.dtype)
    codes, *nested = quantize_absmax(absmax)
    return NF4Weight(packed, codes, weight.dtype, *nested)


def _reference_absmax(tensors: list[Tensor]) -> Tensor:
    """absmax in fp32, double-quantised or not."""
    if len(tensors) == 2:
        return tensors[1]
    _, codes, nested, code, offset = tensors
    return code[codes.int()] * nested.repeat_interleave(NESTED_BLOCK)[: codes.numel()] + offset


def reference_dequantize(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The definition: LEVELS[code] · absmax, in fp32, rounded once to `dtype` [N, K]."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    _reference_rows(q.tensors(), 0, q.shape[0], out)
    return out


def _reference_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    packed = tensors[0][first:last]
    rows, half = packed.shape
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1).int()
    start = first * 2 * half // BLOCK
    absmax = _reference_absmax(tensors)[start:].repeat_interleave(BLOCK)[: codes.numel()]
    levels = torch.tensor(LEVELS, device=packed.device)
    out.copy_((levels[codes] * absmax).view(rows, 2 * half))


def _cpu_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    rows, columns = weight.shape
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
    absmax = torch.empty(-(-weight.numel() // BLOCK))
    extension.module().nf4_quantize_cpu(
        extension.view(weight), extension.view(packed), extension.view(absmax), torch.get_num_threads()
    )
    return packed, absmax


def _cpu_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    extension.module().nf4_dequantize_cpu(
        [extension.view(part) for part in tensors], first, last, extension.view(out), torch.get_num_threads()
    )


def _cpu_small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    bias = None if bias is None else bias.float().contiguous()
    extension.module().nf4_linear_cpu(
        extension.view(x),
        [extension.view(part) for part in tensors],
        None if bias is None else extension.view(bias),
        extension.view(out),
        torch.get_num_threads(),
    )


@cache
def _levels(device: torch.device) -> Tensor:
    """LEVELS [16] (fp32), brought to a GPU once: nothing may be copied there while a graph is captured."""
    return torch.tensor(LEVELS, device=device)


def _triton_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    from mmfast.kernels.nf4 import quantize

    with torch.cuda.device_of(weight):
        return quantize(weight.contiguous(), _levels(weight.device))


def _triton_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    from mmfast.kernels.nf4 import dequantize_rows

    with torch.cuda.device_of(out):
        dequantize_rows(tensors, _levels(out.device), first, last, out)


def _triton_small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    from mmfast.kernels.nf4 import small_linear

    with torch.cuda.device_of(out):
        small_linear(x, tensors, _levels(out.device), out, bias)


# Ops that have CUDA kernels of their own may take this weight too.
_ROWS = {"cuda": _triton_rows, "cpu": _cpu_rows, "triton": _triton_rows, "reference": _reference_rows}
_SMALL_LINEAR = {"cuda": _triton_small_linear, "cpu": _cpu_small_linear, "triton": _triton_small_linear}


def dequantize_rows(tensors: list[Tensor], first: int, last: int, out: Tensor, backend: str) -> None:
    """Fills `out` [last - first, K] (contiguous; fp32, fp16, bf16; any dtype on the reference) with rows of the weight.

    first · K must be a multiple of 64: see `row_step`. Checks nothing; a step of other ops.
    """
    _ROWS[backend](tensors, first, last, out)


def row_step(tensors: list[Tensor]) -> int:
    """The smallest number of rows that is a whole number of blocks."""
    return BLOCK // math.gcd(BLOCK, _shape(tensors)[1])


def small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, backend: str, bias: Tensor | None) -> None:
    """out [M, N] = x Wᵀ (+ bias [N]) for few rows of x [M, K] (contiguous, of the dtype of `out`), decoding on the fly.

    Sums are made in fp32 and rounded once. On the CPU, x in 16 bits is taken as whole numbers with one scale for each
    64 of them, and levels as whole numbers: products and sums are exact within a block, the rounding before is less
    than that of a weight to fp16, and what is not finite in x becomes NaN. Checks nothing; a step of other ops.
    """
    _SMALL_LINEAR[backend](x, tensors, out, bias)


def takes_small(x: Tensor, tensors: list[Tensor], backend: str) -> bool:
    """Whether `small_linear` can run this and is the faster way."""
    rows = SMALL_ROWS_NATIVE if products.multiplies_16_bit(x.dtype, backend) else SMALL_ROWS[backend]
    if products.has_tiles(x.dtype, backend):
        rows = SMALL_ROWS_TILES
    whole = backend == "cpu" or _shape(tensors)[1] % BLOCK == 0
    return whole and x.dtype in DTYPES and x.shape[0] <= rows


weights.FORMATS[torch.uint8] = weights.Format(_shape, dequantize_rows, row_step, small_linear, takes_small)


class QuantizeCall(NamedTuple):
    """The checked arguments of `nf4_quantize`."""

    weight: Tensor
    double_quant: bool

    @property
    def device(self) -> torch.device:
        return self.weight.device


def check_quantize(weight: Tensor, double_quant: bool = True) -> QuantizeCall:
    """The arguments of `nf4_quantize`, checked."""
    where = "nf4_quantize"
    if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % 2:
        raise ValueError(f"{where}: weight has shape {list(weight.shape)}; expected [N, K] with K even, none of them 0")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{where}: weight is {weight.dtype}; expected {', '.join(map(str, DTYPES))}")
    return QuantizeCall(weight.detach(), double_quant)


class DequantizeCall(NamedTuple):
    """The checked arguments of `nf4_dequantize`."""

    q: NF4Weight
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device


def check_dequantize(q: NF4Weight, dtype: torch.dtype | None = None) -> DequantizeCall:
    """The arguments of `nf4_dequantize`, checked."""
    check_weight("nf4_dequantize", q)
    dtype = dtype or q.dtype
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"nf4_dequantize: dtype is {dtype}; expected {', '.join(map(str, DTYPES))} or torch.float64")
    return DequantizeCall(q, dtype)


def check_weight(where: str, q: NF4Weight) -> None:
    """Raises unless the parts of `q` belong together."""
    if not isinstance(q, NF4Weight):
        raise TypeError(f"{where}: the weight is a {type(q).__name__}; expected an NF4Weight, as nf4_quantize returns")
    packed, absmax = q.packed, q.absmax
    if packed.dim() != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"{where}: packed is {packed.dtype} {list(packed.shape)}; expected torch.uint8 [N, K // 2]")
    nested = (q.nested_absmax, q.nested_code, q.nested_offset)
    given = [part is not None for part in nested]
    if any(given) != all(given):
        raise ValueError(f"{where}: of nested_absmax, nested_code, nested_offset, some are None; give all or none")
    blocks = -(-2 * packed.numel() // BLOCK)
    expected: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("absmax", absmax, torch.uint8 if all(given) else torch.float32, (blocks,)),
        ("nested_absmax", nested[0], torch.float32, (-(-blocks // NESTED_BLOCK),)),
        ("nested_code", nested[1], torch.float32, (256,)),
        ("nested_offset", nested[2], torch.float32, ()),
    ]
    for name, part, dtype, shape in expected:
        if part is None:
            continue
        if part.dtype != dtype or part.shape != shape:
            raise ValueError(
                f"{where}: {name} is {part.dtype} {list(part.shape)}; expected {dtype} {list(shape)} "
                f"for packed {list(packed.shape)}{' and nested parts' if all(given) else ''}"
            )
        if part.device != packed.device:
            raise ValueError(f"{where}: {name} is on {part.device} but packed on {packed.device}; move one")
    if not all(part.is_contiguous() for part in q.tensors()):
        raise ValueError(f"{where}: the parts of the weight must be contiguous; call .contiguous() on them")


def check_linear(x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> quantized_linear.Call:
    """The arguments of `nf4_linear`, checked."""
    check_weight("nf4_linear", q)
    return quantized_linear.check("nf4_linear", x, q, bias)


def _no_float64(call: DequantizeCall, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.dtype == torch.float64 else None


QUANTIZE = Op("nf4_quantize", check_quantize, (Backend("cpu"), Backend("triton"), Backend("reference")))
DEQUANTIZE = Op(
    "nf4_dequantize",
    check_dequantize,
    (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference")),
)
LINEAR = Op("nf4_linear", check_linear, quantized_linear.BACKENDS)


def _quantize_fake(weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed = weight.new_empty((rows, columns // 2), dtype=torch.uint8)
    return packed, weight.new_empty((rows * columns + BLOCK - 1) // BLOCK, dtype=torch.float32)


def _dequantize_fake(weight: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    return weight[0].new_empty(_shape(weight), dtype=dtype)


def _dequantize(backend: str) -> Callable[[list[Tensor], torch.dtype], Tensor]:
    def run(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
        out = torch.empty(_shape(weight), dtype=dtype, device=weight[0].device)
        dequantize_rows(weight, 0, out.shape[0], out, backend)
        return out

    return run


_QUANTIZE = backends.define(
    "nf4_quantize",
    "(Tensor weight) -> (Tensor, Tensor)",
    _quantize_fake,
    {"cpu": _cpu_quantize, "triton": _triton_quantize},
)
_DEQUANTIZE = backends.define(
    "nf4_dequantize",
    "(Tensor[] weight, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    {name: _dequantize(name) for name in ("cpu", "triton")},
)


def nf4_quantize(weight: Tensor, *, double_quant: bool = True, backend: str | None = None) -> NF4Weight:
    """`weight` [N, K] in 4 bits: `reference_quantize` says how.

    Args:
        weight: [N, K] (fp32, fp16, bf16; finite; any strides), K even.
        double_quant: store the scales of blocks in 8 bits: 4.127 bits an element instead of 4.5.
        backend: "cpu", "triton" or "reference"; default: the fastest that can. All give the same bits.

    Raises:
        ValueError, TypeError: an argument is wrong, or the weight is not finite.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    call = check_quantize(weight, double_quant)
    chosen = QUANTIZE.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference_quantize(*call)
    packed, absmax = _QUANTIZE(call.weight, chosen)
    return _finish(call.weight, packed, absmax, double_quant)


def nf4_dequantize(q: NF4Weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """The dense weight [N, K]: `reference_dequantize` says how.

    Args:
        q: the quantised weight.
        dtype: fp32, fp16, bf16, or fp64 on the reference; default: that of the weight that was quantised.
        backend: "cpu", "triton" or "reference"; default: the fastest that can. All give the same bits.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    call = check_dequantize(q, dtype)
    chosen = DEQUANTIZE.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference_dequantize(*call)
    return cast(Tensor, _DEQUANTIZE(call.q.tensors(), call.dtype, chosen))


def nf4_linear(x: Tensor, q: NF4Weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x Wᵀ + bias: `mmfast.ops.quantized_linear.reference` says what. Differentiable in x and bias.

    Args:
        x: [..., K] (fp32, fp16, bf16; fp64 on the reference; any strides). Autocast casts it to its dtype.
        q: the weight [N, K].
        bias: [N] (any floating dtype).
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    return quantized_linear.run(LINEAR, NF4Weight, x, q, bias, backend)
