"""int8 weights with one scale for each output channel: quantised, dequantised, and multiplied as they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from mmfast.ops import backends, extension, products, quantized_linear, weights
from mmfast.ops.backends import Backend, Machine, Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Rows of x up to which decoding in registers is faster than dequantising and a dense product (CPU: two cores of a
# Zen 3; Triton: not measured, the rows of one tensor-core tile).
SMALL_ROWS = {"cpu": 16, "triton": 16, "cuda": 16, "reference": 0}
# The same on a CPU with matrix instructions for 16-bit floats (two cores of an Intel Xeon with AMX).
SMALL_ROWS_NATIVE = 8
# The same where a product of bfloat16 is made in tiles that are decoded as they are needed (`products.linear`).
SMALL_ROWS_TILES = 1


class Int8Weight(NamedTuple):
    """A frozen weight [N, K] in 8 bits: values · scale, row by row.

    Attributes:
        values: [N, K] (int8), from -127 to 127.
        scale: [N] (fp32).
        dtype: of the weight that was quantised, and of what `int8_dequantize` returns by default.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return _shape([self.values])

    @property
    def device(self) -> torch.device:
        return self.values.device

    def tensors(self) -> list[Tensor]:
        """[values, scale]: what a dispatcher op takes."""
        return [self.values, self.scale]


def _shape(tensors: list[Tensor]) -> tuple[int, int]:
    rows, columns = tensors[0].shape
    return rows, columns


def reference_quantize(weight: Tensor) -> Int8Weight:
    """The definition: symmetric, per output channel.

        scale = max |w| of a row / 127;  values = w / scale, rounded half to even;  a row of zeros has scale 0, values 0

    Args:
        weight: [N, K] (fp32, fp16, bf16; finite; any strides).
    """
    return _finish(weight, *_reference_rows_of_values(weight))


def _reference_rows_of_values(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    values = (weight / torch.where(scale == 0, 1, scale)[:, None]).round()
    return values.clamp(-127, 127).to(torch.int8), scale


def _finish(weight: Tensor, values: Tensor, scale: Tensor) -> Int8Weight:
    if not scale.isfinite().all():
        raise ValueError(
            f"int8_quantize: weight {list(weight.shape)} holds an infinity or NaN; expected finite values; "
            "look for the step that made it"
        )
    return Int8Weight(values, scale, weight.dtype)


def reference_dequantize(q: Int8Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The definition: values · scale in fp32, rounded once to `dtype` [N, K]."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    _reference_rows(q.tensors(), 0, q.shape[0], out)
    return out


def _reference_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    values, scale = tensors
    out.copy_(values[first:last] * scale[first:last, None])


def _cpu_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.contiguous()
    values = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(weight.shape[0])
    extension.module().int8_quantize_cpu(
        extension.view(weight), extension.view(values), extension.view(scale), torch.get_num_threads()
    )
    return values, scale


def _cpu_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    extension.module().int8_dequantize_cpu(
        *map(extension.view, tensors), first, last, extension.view(out), torch.get_num_threads()
    )


def _cpu_small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    bias = None if bias is None else bias.float().contiguous()
    extension.module().int8_linear_cpu(
        extension.view(x),
        *map(extension.view, tensors),
        None if bias is None else extension.view(bias),
        extension.view(out),
        torch.get_num_threads(),
    )


def _triton_rows(tensors: list[Tensor], first: int, last: int, out: Tensor) -> None:
    from mmfast.kernels.int8 import dequantize_rows

    with torch.cuda.device_of(out):
        dequantize_rows(tensors, first, last, out)


def _triton_small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    from mmfast.kernels.int8 import small_linear

    with torch.cuda.device_of(out):
        small_linear(x, tensors, out, bias)


# Ops that have CUDA kernels of their own may take this weight too.
_ROWS = {"cuda": _triton_rows, "cpu": _cpu_rows, "triton": _triton_rows, "reference": _reference_rows}
_SMALL_LINEAR = {"cuda": _triton_small_linear, "cpu": _cpu_small_linear, "triton": _triton_small_linear}


def dequantize_rows(tensors: list[Tensor], first: int, last: int, out: Tensor, backend: str) -> None:
    """Fills `out` [last - first, K] (contiguous; fp32, fp16, bf16; any dtype on the reference) with rows of the weight.

    Checks nothing; a step of other ops.
    """
    _ROWS[backend](tensors, first, last, out)


def row_step(tensors: list[Tensor]) -> int:
    """Rows that `first` of `dequantize_rows` must be a multiple of."""
    return 1


def small_linear(x: Tensor, tensors: list[Tensor], out: Tensor, backend: str, bias: Tensor | None) -> None:
    """out [M, N] = x Wᵀ (+ bias [N]) for few rows of x [M, K] (contiguous, of the dtype of `out`), decoding on the fly.

    Sums are made in fp32, scaled, and rounded once. Checks nothing; a step of other ops.
    """
    _SMALL_LINEAR[backend](x, tensors, out, bias)


def takes_small(x: Tensor, tensors: list[Tensor], backend: str) -> bool:
    """Whether `small_linear` can run this and is the faster way."""
    rows = SMALL_ROWS_NATIVE if products.multiplies_16_bit(x.dtype, backend) else SMALL_ROWS[backend]
    if products.has_tiles(x.dtype, backend):
        rows = SMALL_ROWS_TILES
    return x.dtype in DTYPES and x.shape[0] <= rows


weights.FORMATS[torch.int8] = weights.Format(_shape, dequantize_rows, row_step, small_linear, takes_small)


class QuantizeCall(NamedTuple):
    """The checked arguments of `int8_quantize`."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        return self.weight.device


def check_quantize(weight: Tensor) -> QuantizeCall:
    """The arguments of `int8_quantize`, checked."""
    where = "int8_quantize"
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"{where}: weight has shape {list(weight.shape)}; expected [N, K], none of them 0")
    if weight.dtype not in DTYPES:
        raise TypeError(f"{where}: weight is {weight.dtype}; expected {', '.join(map(str, DTYPES))}")
    return QuantizeCall(weight.detach())


class DequantizeCall(NamedTuple):
    """The checked arguments of `int8_dequantize`."""

    q: Int8Weight
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.q.device


def check_dequantize(q: Int8Weight, dtype: torch.dtype | None = None) -> DequantizeCall:
    """The arguments of `int8_dequantize`, checked."""
    check_weight("int8_dequantize", q)
    dtype = dtype or q.dtype
    if dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"int8_dequantize: dtype is {dtype}; expected {', '.join(map(str, DTYPES))} or torch.float64")
    return DequantizeCall(q, dtype)


def check_weight(where: str, q: Int8Weight) -> None:
    """Raises unless the parts of `q` belong together."""
    if not isinstance(q, Int8Weight):
        raise TypeError(
            f"{where}: the weight is a {type(q).__name__}; expected an Int8Weight, as int8_quantize returns"
        )
    values, scale = q.values, q.scale
    if values.dim() != 2 or values.dtype != torch.int8:
        raise ValueError(f"{where}: values are {values.dtype} {list(values.shape)}; expected torch.int8 [N, K]")
    if scale.dtype != torch.float32 or scale.shape != values.shape[:1]:
        raise ValueError(
            f"{where}: scale is {scale.dtype} {list(scale.shape)}; expected torch.float32 {list(values.shape[:1])} "
            f"for values {list(values.shape)}"
        )
    if scale.device != values.device:
        raise ValueError(f"{where}: scale is on {scale.device} but values on {values.device}; move one")
    if not values.is_contiguous() or not scale.is_contiguous():
        raise ValueError(f"{where}: the parts of the weight must be contiguous; call .contiguous() on them")


def check_linear(x: Tensor, q: Int8Weight, bias: Tensor | None = None) -> quantized_linear.Call:
    """The arguments of `int8_linear`, checked."""
    check_weight("int8_linear", q)
    return quantized_linear.check("int8_linear", x, q, bias)


def _no_float64(call: DequantizeCall, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.dtype == torch.float64 else None


# On a GPU a weight is quantised once, by the reference.
QUANTIZE = Op("int8_quantize", check_quantize, (Backend("cpu"), Backend("reference")))
DEQUANTIZE = Op(
    "int8_dequantize",
    check_dequantize,
    (Backend("cpu", _no_float64), Backend("triton", _no_float64), Backend("reference")),
)
LINEAR = Op("int8_linear", check_linear, quantized_linear.BACKENDS)


def _quantize_fake(weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    values = weight.new_empty(weight.shape, dtype=torch.int8)
    return values, weight.new_empty(weight.shape[0], dtype=torch.float32)


def _dequantize_fake(weight: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    return weight[0].new_empty(_shape(weight), dtype=dtype)


def _dequantize(backend: str) -> Callable[[list[Tensor], torch.dtype], Tensor]:
    def run(weight: list[Tensor], dtype: torch.dtype) -> Tensor:
        out = torch.empty(_shape(weight), dtype=dtype, device=weight[0].device)
        dequantize_rows(weight, 0, out.shape[0], out, backend)
        return out

    return run


_QUANTIZE = backends.define(
    "int8_quantize", "(Tensor weight) -> (Tensor, Tensor)", _quantize_fake, {"cpu": _cpu_quantize}
)
_DEQUANTIZE = backends.define(
    "int8_dequantize",
    "(Tensor[] weight, ScalarType dtype) -> Tensor",
    _dequantize_fake,
    {name: _dequantize(name) for name in ("cpu", "triton")},
)


def int8_quantize(weight: Tensor, *, backend: str | None = None) -> Int8Weight:
    """`weight` [N, K] in 8 bits: `reference_quantize` says how.

    Args:
        weight: [N, K] (fp32, fp16, bf16; finite; any strides).
        backend: "cpu" or "reference"; default: the fastest that can. Both give the same bits.

    Raises:
        ValueError, TypeError: an argument is wrong, or the weight is not finite.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    call = check_quantize(weight)
    chosen = QUANTIZE.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference_quantize(*call)
    values, scale = _QUANTIZE(call.weight, chosen)
    return _finish(call.weight, values, scale)


def int8_dequantize(q: Int8Weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
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


def int8_linear(x: Tensor, q: Int8Weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
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
    return quantized_linear.run(LINEAR, Int8Weight, x, q, bias, backend)
