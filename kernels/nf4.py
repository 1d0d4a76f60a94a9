"""Triton kernels of NF4: quantise, dequantise, and x Wᵀ for few rows of x. Rows of W [N, K] hold K / 2 bytes."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# As in mmfast/ops/nf4.py: weights that share an absmax, absmax that share a nested one, the smallest to divide by.
BLOCK, NESTED_BLOCK, SMALLEST = 64, 256, 1e-38
# Blocks of 64 weights that a program of the elementwise kernels takes.
BLOCKS = 64
# Rows of W and blocks of each that a program of the linear kernels takes at a time: 16 bytes a thread.
ROWS, GROUPS = 16, 4
# Rows of x that a tensor core takes.
X_ROWS = 16
ADD_OUTPUTS = 256


class Plan(NamedTuple):
    """How the columns of W are cut among programs."""

    parts: int
    steps: int  # of `columns` each, in a part


def plan(outputs: int, columns: int, step: int, processors: int) -> Plan:
    """Parts of the columns, until every processor has eight programs: so many bytes must be on their way at a time."""
    steps = triton.cdiv(columns, step)
    parts = min(max(8 * processors // outputs, 1), steps)
    steps = triton.cdiv(steps, parts)
    return Plan(triton.cdiv(columns, steps * step), steps)


@triton.jit
def _scales(absmax, nested_absmax, nested_code, nested_offset, o_b, mask, NESTED_BLOCK: tl.constexpr):
    """absmax of the blocks o_b, in fp32."""
    if nested_absmax is None:
        return tl.load(absmax + o_b, mask=mask, other=0)
    else:
        code = tl.load(absmax + o_b, mask=mask, other=0).to(tl.int32)
        factor = tl.load(nested_absmax + o_b // NESTED_BLOCK, mask=mask, other=0)
        return tl.load(nested_code + code) * factor + tl.load(nested_offset)


# Grid: blocks / BLOCKS. Traffic: the weight once, its codes and scales once.
@triton.jit(do_not_specialize=("count",))
def _quantize_kernel(
    weight,  # [count]
    levels,  # [16] fp32
    packed,  # [count / 2]
    absmax,  # [blocks]
    count,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    o_w = o_b[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]
    m_w = o_w < count
    high = tl.load(weight + o_w, mask=m_w, other=0).to(tl.float32)
    low = tl.load(weight + o_w + 1, mask=m_w, other=0).to(tl.float32)
    # As integers: what is not finite is larger than all that is, NaN included.
    magnitude = tl.maximum(high.to(tl.int32, bitcast=True) & 0x7FFFFFFF, low.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    divisor = tl.where(largest < SMALLEST, SMALLEST, largest)
    whole = (o_b + 1) * BLOCK <= count
    factor = tl.math.div_rn(1.0, divisor)
    high = tl.where(whole[:, None], high * factor[:, None], tl.math.div_rn(high, divisor[:, None]))
    low = tl.where(whole[:, None], low * factor[:, None], tl.math.div_rn(low, divisor[:, None]))
    high_code, low_code = tl.zeros_like(magnitude), tl.zeros_like(magnitude)
    for j in tl.static_range(15):
        middle = (tl.load(levels + j) + tl.load(levels + j + 1)) * 0.5
        high_code += (high > middle).to(tl.int32)
        low_code += (low > middle).to(tl.int32)
    tl.store(packed + o_w // 2, ((high_code << 4) | low_code).to(tl.uint8), mask=m_w)
    tl.store(absmax + o_b, tl.where(whole, largest, divisor), mask=o_b * BLOCK < count)


# Grid: blocks / BLOCKS. Traffic: the packed weight and its scales once, the dense one once.
@triton.jit(do_not_specialize=("count", "first_block"))
def _dequantize_kernel(
    packed,  # [count / 2]
    absmax,  # from the first block of the weight on
    nested_absmax,
    nested_code,
    nested_offset,
    levels,  # [16] fp32
    out,  # [count]
    count,
    first_block,
    WHOLE: tl.constexpr,  # count is a multiple of BLOCK
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    o_b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    o_p = o_b[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    o_w = o_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_b = o_b * BLOCK < count
    # The same for a whole block, so that it is read and written in vectors; else for each element.
    m_p = m_b[:, None] if WHOLE else o_p * 2 < count
    m_w = m_b[:, None] if WHOLE else o_w < count
    byte = tl.load(packed + o_p, mask=m_p, other=0).to(tl.int32)
    scale = _scales(absmax, nested_absmax, nested_code, nested_offset, first_block + o_b, m_b, NESTED_BLOCK)
    high = tl.load(levels + (byte >> 4)) * scale[:, None]
    low = tl.load(levels + (byte & 15)) * scale[:, None]
    values = tl.interleave(high, low)
    tl.store(out + o_w, values.to(out.dtype.element_ty), mask=m_w)


@triton.jit
def _decode(
    packed,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    levels,
    o_n,
    o_g,
    rows,
    blocks,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The even and the odd elements of blocks o_g of rows o_n, [rows, blocks, 32] in fp32; zero past the weight."""
    o_b = o_n[:, None] * blocks + o_g[None, :]
    mask = (o_n < rows)[:, None] & (o_g < blocks)[None, :]
    o_p = o_b[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
    byte = tl.load(packed + o_p, mask=mask[:, :, None], other=0).to(tl.int32)
    scale = _scales(absmax, nested_absmax, nested_code, nested_offset, o_b, mask, NESTED_BLOCK)
    scale = tl.where(mask, scale, 0)[:, :, None]
    return tl.load(levels + (byte >> 4)) * scale, tl.load(levels + (byte & 15)) * scale


# Grid: row blocks of W × parts of its columns × rows of x. Traffic: the packed weight once for each row of x.
@triton.jit(do_not_specialize=("x_rows", "rows", "blocks", "steps"))
def _row_kernel(
    x,  # [M, K]
    packed,  # [N, K / 2]
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    levels,  # [16] fp32
    sums,  # [parts, M, N] fp32
    x_rows,
    rows,
    blocks,
    steps,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part, m = tl.program_id(1), tl.program_id(2)
    o_i = 2 * tl.arange(0, BLOCK // 2)
    p_x = x + m.to(tl.int64) * blocks * BLOCK
    total = tl.zeros([ROWS, GROUPS, BLOCK // 2], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        o_g = step * GROUPS + tl.arange(0, GROUPS)
        even, odd = _decode(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            levels,
            o_n,
            o_g,
            rows,
            blocks,
            NESTED_BLOCK,
            BLOCK,
        )
        o_x = o_g[:, None] * BLOCK + o_i[None, :]
        m_x = (o_g < blocks)[:, None]
        total += even * tl.load(p_x + o_x, mask=m_x, other=0).to(tl.float32)[None, :, :]
        total += odd * tl.load(p_x + o_x + 1, mask=m_x, other=0).to(tl.float32)[None, :, :]
    p_sums = sums + (part.to(tl.int64) * x_rows + m) * rows + o_n
    tl.store(p_sums, tl.sum(tl.reshape(total, [ROWS, GROUPS * (BLOCK // 2)]), 1), mask=o_n < rows)


# Grid: row blocks of W × parts of its columns. Traffic: the packed weight once. x has X_ROWS rows at most.
@triton.jit(do_not_specialize=("x_rows", "rows", "blocks", "steps"))
def _dot_kernel(
    x,  # [M, K / 2] int32: pairs of DTYPE
    packed,  # [N, K / 2]
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    levels,  # [16] fp32
    sums,  # [parts, M, N] fp32
    x_rows,
    rows,
    blocks,
    steps,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    X_ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    BYTES: tl.constexpr = GROUPS * (BLOCK // 2)
    o_n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_m = tl.arange(0, X_ROWS)
    o_i = tl.arange(0, BYTES)
    part = tl.program_id(1)
    pairs = blocks * (BLOCK // 2)
    total = tl.zeros([ROWS, X_ROWS], tl.float32)
    for step in range(part * steps, (part + 1) * steps):
        even, odd = _decode(
            packed,
            absmax,
            nested_absmax,
            nested_code,
            nested_offset,
            levels,
            o_n,
            step * GROUPS + tl.arange(0, GROUPS),
            rows,
            blocks,
            NESTED_BLOCK,
            BLOCK,
        )
        o_k = step * BYTES + o_i
        m_x = (o_k < pairs)[:, None] & (o_m < x_rows)[None, :]
        pair = tl.load(x + o_k[:, None] + (o_m * pairs)[None, :], mask=m_x, other=0)
        even_x = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        odd_x = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        total = tl.dot(tl.reshape(even, [ROWS, BYTES]).to(DTYPE), even_x, total)
        total = tl.dot(tl.reshape(odd, [ROWS, BYTES]).to(DTYPE), odd_x, total)
    p_sums = sums + (part.to(tl.int64) * x_rows + o_m)[None, :] * rows + o_n[:, None]
    tl.store(p_sums, total, mask=(o_n < rows)[:, None] & (o_m < x_rows)[None, :])


# Grid: outputs / ADD_OUTPUTS. Adds the parts in order, so that the result is always the same, then scale and bias.
@triton.jit(do_not_specialize=("outputs", "rows", "parts"))
def add_parts_kernel(
    sums,  # [parts, M, N] fp32
    scale,  # [N] fp32, or None
    bias,  # [N], or None
    out,  # [M, N]
    outputs,
    rows,
    parts,
    ADD_OUTPUTS: tl.constexpr,
):
    o = tl.program_id(0).to(tl.int64) * ADD_OUTPUTS + tl.arange(0, ADD_OUTPUTS)
    mask = o < outputs
    total = tl.zeros([ADD_OUTPUTS], tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + part * outputs.to(tl.int64) + o, mask=mask, other=0)
    if scale is not None:
        total *= tl.load(scale + o % rows, mask=mask, other=0)
    if bias is not None:
        total += tl.load(bias + o % rows, mask=mask, other=0).to(tl.float32)
    tl.store(out + o, total.to(out.dtype.element_ty), mask=mask)


def processors(device: torch.device) -> int:
    """Multiprocessors. The interpreter has none: a number that splits some calls and not others."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def quantize(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K // 2] and absmax [blocks] of `weight` [N, K] (contiguous)."""
    rows, columns = weight.shape
    blocks = triton.cdiv(weight.numel(), BLOCK)
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    _quantize_kernel[(triton.cdiv(blocks, BLOCKS),)](
        weight,
        levels,
        packed,
        absmax,
        weight.numel(),
        SMALLEST=SMALLEST,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return packed, absmax


def _weight(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None, None][:5] if len(tensors) == 2 else list(tensors)


def dequantize_rows(tensors: list[Tensor], levels: Tensor, first: int, last: int, out: Tensor) -> None:
    """Fills `out` [last - first, K] with rows first to last of the weight."""
    packed, *scales = _weight(tensors)
    if out.numel() == 0:
        return
    _dequantize_kernel[(triton.cdiv(out.numel(), BLOCK * BLOCKS),)](
        packed[first:last],
        *scales,
        levels,
        out,
        out.numel(),
        first * out.shape[1] // BLOCK,
        WHOLE=out.numel() % BLOCK == 0,
        NESTED_BLOCK=NESTED_BLOCK,
        BLOCK=BLOCK,
        BLOCKS=BLOCKS,
        num_warps=8,
        enable_fp_fusion=False,  # the bits of a product that is rounded, then a sum that is rounded
    )


def small_linear(x: Tensor, tensors: list[Tensor], levels: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """out [M, N] = x Wᵀ + bias for x [M, K], K a multiple of 64 and M at most `X_ROWS`."""
    (x_rows, columns), rows = x.shape, out.shape[1]
    single = x_rows == 1 or x.dtype == torch.float32
    row_blocks = triton.cdiv(rows, ROWS)
    cut = plan(row_blocks * (x_rows if single else 1), columns, GROUPS * BLOCK, processors(x.device))
    sums = torch.empty((cut.parts, x_rows, rows), dtype=torch.float32, device=x.device)
    arguments = (*_weight(tensors), levels, sums, x_rows, rows, columns // BLOCK, cut.steps)
    options = {"NESTED_BLOCK": NESTED_BLOCK, "BLOCK": BLOCK, "ROWS": ROWS, "GROUPS": GROUPS, "num_warps": 4}
    if single:
        _row_kernel[(row_blocks, cut.parts, x_rows)](x, *arguments, **options)
    else:
        dtype = tl.float16 if x.dtype == torch.float16 else tl.bfloat16
        pairs = (x.clone() if x.storage_offset() % 2 else x).view(torch.int32)
        # One stage: else the levels that are looked up would be copied to shared memory one by one.
        _dot_kernel[(row_blocks, cut.parts)](pairs, *arguments, X_ROWS=X_ROWS, DTYPE=dtype, num_stages=1, **options)
    add_parts(sums, None, bias, out)


def add_parts(sums: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = sums [parts, M, N], added up, · scale [N] + bias [N]."""
    add_parts_kernel[(triton.cdiv(out.numel(), ADD_OUTPUTS),)](
        sums, scale, bias, out, out.numel(), out.shape[1], sums.shape[0], ADD_OUTPUTS=ADD_OUTPUTS
    )


def compile_cases() -> list[dict[str, Any]]:
    """Every kernel that the op can launch, for scripts/compile_kernels.py."""
    cases = []
    blocks: dict[str, Any] = {"BLOCK": BLOCK, "BLOCKS": BLOCKS}
    rows = {"NESTED_BLOCK": NESTED_BLOCK, "BLOCK": BLOCK, "ROWS": ROWS, "GROUPS": GROUPS}
    for dtype in ("fp32", "fp16", "bf16"):
        pointers = {"weight": dtype, "levels": "fp32", "packed": "u8", "absmax": "fp32"}
        cases.append(case(f"quantize {dtype}", _quantize_kernel, pointers, blocks | {"SMALLEST": SMALLEST}, 8))
        for nested in (False, True):
            name = f"{dtype}{', nested' if nested else ''}"
            weight = {"packed": "u8", "absmax": "u8" if nested else "fp32", "levels": "fp32"}
            none: dict[str, Any] = {}
            parts = ("nested_absmax", "nested_code", "nested_offset")
            if nested:
                weight |= dict.fromkeys(parts, "fp32")
            else:
                none = dict.fromkeys(parts)
            pointers = weight | {"out": dtype}
            for whole in (True, False):
                constants = blocks | none | {"NESTED_BLOCK": NESTED_BLOCK, "WHOLE": whole}
                label = f"dequantize {name}{'' if whole else ', not whole'}"
                cases.append(case(label, _dequantize_kernel, pointers, constants, 8))
            pointers = weight | {"x": dtype, "sums": "fp32"}
            cases.append(case(f"row {name}", _row_kernel, pointers, rows | none, 4))
            if dtype != "fp32":
                constants = rows | none | {"X_ROWS": X_ROWS, "DTYPE": tl.float16 if dtype == "fp16" else tl.bfloat16}
                pointers = pointers | {"x": "i32"}
                cases.append(case(f"dot {name}", _dot_kernel, pointers, constants, 4, True, num_stages=1))
    for dtype, scale in product(("fp32", "fp16", "bf16"), (None, "fp32")):
        pointers = {"sums": "fp32", "bias": dtype, "out": dtype} | ({"scale": scale} if scale else {})
        constants = {"ADD_OUTPUTS": ADD_OUTPUTS} | ({} if scale else {"scale": None})
        cases.append(case(f"add parts {dtype}{', scaled' if scale else ''}", add_parts_kernel, pointers, constants, 4))
    return cases


def case(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constexprs: dict[str, Any],
    num_warps: int,
    tensor_core: bool = False,
    multiples: tuple[str, ...] = (),
    num_stages: int = 2,
) -> dict[str, Any]:
    """One case for scripts/compile_kernels.py. Pointers, and `multiples`, are multiples of 16."""
    kinds = {argument: f"*{kind}" for argument, kind in pointers.items()} | dict.fromkeys(constexprs, "constexpr")
    return {
        "name": name,
        "fn": kernel,
        "signature": {argument: kinds.get(argument, "i32") for argument in kernel.arg_names},
        "constexprs": constexprs,
        "attrs": {
            (i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a in (*pointers, *multiples)
        },
        "num_warps": num_warps,
        "num_stages": num_stages,
        "tensor_core": tensor_core,
    }
