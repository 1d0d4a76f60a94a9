"""A linear layer with a trained bias and a trained scale on its output or its input, on a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.ops import backends, crossovers, extension, products, weights
from mmfast.ops.backends import Backend, Machine, Op, Size
from mmfast.ops.weights import Weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SCALE_ON = ("output", "input", "none")

# What the passes must save on a CPU before they are worth the steps on the host: elements of the matrix that is scaled
# or biased, by `scale_on`; rows · K · N where the op makes a 16-bit product in fp32, or one of fp32 in AMX tiles.
LEAST = crossovers.CPU.cpu("bias_scale_linear")


def reference(x: Tensor, weight: Weight, bias: Tensor | None, scale: Tensor | None, scale_on: str = "output") -> Tensor:
    """The definition, of which three forms are called LLaMA-Adapter V2.

        output:  y = scale ⊙ (x Wᵀ + bias)      the paper, and LitGPT
        input:   y = (x ⊙ scale) Wᵀ + bias      the code of the 65B chat model
        none:    y = x Wᵀ + bias                the code of the multimodal 7B model

    Args:
        x: [..., K] (fp32, fp16, bf16, fp64; any strides).
        weight: [N, K] (dense, the dtype of x; or quantised, whose dense values in that dtype are meant).
        bias: [N] (any floating dtype), or None.
        scale: [N] on the output, [K] on the input (any floating dtype); None for "none" and only there.
        scale_on: "output", "input" or "none".

    Returns:
        [..., N] in the dtype of x.

    Numerics: the product, with a bias of its dtype, is rounded to the dtype of x. Another bias and the scale act in the
    wider of their dtypes and that of x, fp32 as a rule, and what comes of it is rounded to the dtype of x once.

    Source: Gao et al., "LLaMA-Adapter V2" (arXiv 2304.15010), equation 1; Lightning-AI/litgpt, litgpt/adapter_v2.py:57;
    OpenGVLab/LLaMA-Adapter, llama_adapter_v2_chat65b/llama/model.py:77-83.
    """
    dense = weights.dense(weight, x.dtype)
    if scale_on == "input" and scale is not None:
        x = (x * scale).to(x.dtype)
    in_product = bias is None or bias.dtype == x.dtype
    y = F.linear(x, dense, bias if in_product else None)
    if bias is not None and not in_product:
        y = y + bias
    if scale_on == "output" and scale is not None:
        y = y * scale
    # Asked first: `to` takes a tenth of a small call, even where it has nothing to do.
    return y if y.dtype == x.dtype else y.to(x.dtype)


class Call(NamedTuple):
    """The checked arguments, cast as autocast asks, and whether a gradient will be asked for."""

    x: Tensor
    weight: Weight
    bias: Tensor | None
    scale: Tensor | None
    scale_on: str
    differentiated: bool

    @property
    def device(self) -> torch.device:
        return self.x.device


def check(x: Tensor, weight: Weight, bias: Tensor | None, scale: Tensor | None, scale_on: str = "output") -> Call:
    """The arguments of `bias_scale_linear`, checked."""
    where = "bias_scale_linear"
    if scale_on not in SCALE_ON:
        raise ValueError(f"{where}: scale_on is {scale_on!r}; use one of {', '.join(SCALE_ON)}")
    if (scale is None) != (scale_on == "none"):
        given = "no scale is given" if scale is None else "a scale is given"
        raise ValueError(f"{where}: {given} and scale_on is {scale_on!r}; expected no scale for 'none', else one")
    if x.dim() == 0 or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{where}: x is {list(x.shape)} and weight is {list(weight.shape)}; expected [..., K] and [N, K]"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype) if isinstance(weight, Tensor) else weight
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x is {x.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype:
        raise TypeError(
            f"{where}: x is {x.dtype} and weight is {weight.dtype}; expected one dtype; cast one, or call under "
            "torch.autocast"
        )
    rows, columns = weight.shape
    if weight.device != x.device:
        raise ValueError(f"{where}: weight is on {weight.device} but x on {x.device}; move one")
    for name, vector, letter, size in (
        ("bias", bias, "N", rows),
        ("scale", scale, *(("K", columns) if scale_on == "input" else ("N", rows))),
    ):
        if vector is None:
            continue
        if vector.shape != (size,):
            raise ValueError(
                f"{where}: {name} is {list(vector.shape)} but weight {[rows, columns]} and scale_on {scale_on!r}; "
                f"expected [{letter}] = [{size}]; was it made for another layer?"
            )
        if not vector.dtype.is_floating_point:
            raise TypeError(f"{where}: {name} is {vector.dtype}; expected a floating dtype")
        if vector.device != x.device:
            raise ValueError(f"{where}: {name} is on {vector.device} but x on {x.device}; move one")
    trained = x, weight, bias, scale
    differentiated = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in trained)
    return Call(x, weight, bias, scale, scale_on, differentiated)


def _no_float64(call: Call, machine: Machine) -> str | None:
    return "there is no float64 kernel" if call.x.dtype == torch.float64 else None


def _nothing_to_gain(call: Call, machine: Machine) -> str | None:
    if not isinstance(call.weight, Tensor) or (call.bias is not None and call.bias.dtype != call.x.dtype):
        return None
    if call.scale is None:
        return "without a scale, the reference is one call of PyTorch's own linear"
    if call.scale_on == "input" and not call.differentiated and call.scale.dtype == call.x.dtype:
        return "with a scale on the input and no gradient, the reference makes the same passes"
    return None


def _cpu_avoids(call: Call, machine: Machine) -> str | None:
    rows = call.x.shape[:-1].numel()
    gains = _gains_a_product(call) or _in_tiles(call.x, call.weight, rows)
    return None if gains else _nothing_to_gain(call, machine)


def _gains_a_product(call: Call) -> bool:
    """Whether PyTorch's product on the CPU is so slow that the op makes it in fp32."""
    return products.is_slow(call.x.dtype, call.x.shape[:-1].numel(), grad=call.differentiated)


def _in_tiles(x: Tensor, weight: Weight, rows: int) -> bool:
    """Whether on a CPU the op makes a product of fp32 matrices in AMX tiles, faster than PyTorch."""
    return isinstance(weight, Tensor) and x.dtype == torch.float32 and products.tiles_f32(rows, "cpu")


def _sizes(call: Call, machine: Machine) -> tuple[Size, ...]:
    if not isinstance(call.weight, Tensor):
        return ()
    if machine.device == "cpu" and _lies_packed(call.x, call.weight, call.bias, call.scale, call.scale_on):
        return ()
    rows, (columns, features) = call.x.shape[:-1].numel(), call.weight.shape
    if machine.device == "cpu" and _gains_a_product(call):
        return (Size("16-bit product", rows * columns * features, "rows · K · N is {}"),)
    if machine.device == "cpu" and _in_tiles(call.x, call.weight, rows):
        work = rows * columns * features
        if work >= LEAST["32-bit product"] or _nothing_to_gain(call, machine):  # else the passes around it may gain
            return (Size("32-bit product", work, "rows · K · N is {}"),)
    if call.scale_on == "input":
        return (Size("input", rows * features, "rows · K is {}"),)
    return (Size(call.scale_on, rows * columns, "rows · N is {}"),)


# By names of their own: to look them up in a package, with caches cold, takes a part of a small call's time.
_cpp_packed, _is_compiling = extension.packed, torch.compiler.is_dynamo_compiling
# What is counted, and the shapes of x, weight, bias and scale, for `backends.fits`.
PATTERNS = {"output": "*n *k nk= n? n", "input": "*k *k nk= n? k"}


def _is_packed(
    x: Tensor, weight: Any, bias: Tensor | None, scale: Tensor | None, scale_on: str, backend: str | None
) -> bool:
    """Whether `check` would find nothing and `_Packed` serves, in less time than these."""
    return (
        scale_on == "output"
        and not (backend or backends._requested or _is_compiling())  # `backends.packed`, written out
        and _cpp_packed()("*n *k nk= n=? n=", x, weight, bias, scale) >= 0
        and x.dtype is torch.float32
        and not (weight.requires_grad or torch._C._is_any_autocast_enabled())
    )


def _lies_packed(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, scale_on: str) -> bool:
    """`_is_packed` of checked arguments, which need no memory."""
    tensors = [tensor for tensor in (x, weight, bias, scale) if tensor is not None]
    return (
        scale_on == "output"
        and all(tensor.dtype == torch.float32 for tensor in tensors)
        and not (weight.requires_grad or torch._C._is_any_autocast_enabled())
        and backends.lies_packed(*tensors)
    )


def _is_small(
    x: Tensor, weight: Any, bias: Tensor | None, scale: Tensor | None, scale_on: str, backend: str | None
) -> bool:
    """Whether `check` would find nothing and `OP.select` take the reference, in less time than these."""
    if (
        scale_on == "input"
        and not torch.is_grad_enabled()
        and backends.fits(backend, "*k *k nk= n=? k=", x, weight, bias, scale) >= 0
    ):
        small = True  # as `_nothing_to_gain` says
    elif scale_on in PATTERNS:
        small = 0 <= backends.fits(backend, PATTERNS[scale_on], x, weight, bias, scale) < LEAST[scale_on]
    else:  # without a scale the reference is best at any size
        small = scale is None and scale_on == "none" and backends.fits(backend, "*n *k nk= n=?", x, weight, bias) >= 0
    if not small or torch._C._is_any_autocast_enabled():
        return False
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float32:
        return not _in_tiles(x, weight, rows) or rows * weight.numel() < LEAST["32-bit product"]
    return not products.is_slow(x.dtype, rows, grad=torch.is_grad_enabled())


OP = Op(
    "bias_scale_linear",
    check,
    (Backend("cpu", _no_float64, _cpu_avoids), Backend("triton", _no_float64, _nothing_to_gain), Backend("reference")),
    _sizes,
)


class Steps(NamedTuple):
    """What a backend is: the passes over what the product gives or takes. Vectors are fp32; one that is None is absent.

    Attributes:
        apply: (z [M, N], bias, scale, out [M, N]): out = (z + bias) · scale; out may be z.
        read_grad: (grad [M, N], z, bias, scale, out, grad_bias, grad_scale), in one pass: out = grad · scale,
            grad_bias += Σ_m grad · scale, grad_scale += Σ_m grad · (z + bias), each if given, the last with z.
            out may be grad.
    """

    apply: Callable[..., None]
    read_grad: Callable[..., None]


def _apply_cpu(*tensors: Tensor | None) -> None:
    extension.module().bias_scale_linear_fwd_cpu(*map(extension.optional_view, tensors), torch.get_num_threads())


def _read_grad_cpu(*tensors: Tensor | None) -> None:
    extension.module().bias_scale_linear_bwd_cpu(*map(extension.optional_view, tensors), torch.get_num_threads())


def _apply_triton(z: Tensor, *tensors: Tensor | None) -> None:
    from mmfast.kernels.bias_scale_linear import apply

    with torch.cuda.device_of(z):
        apply(z, *tensors)


def _read_grad_triton(grad: Tensor, *tensors: Tensor | None) -> None:
    from mmfast.kernels.bias_scale_linear import read_grad

    with torch.cuda.device_of(grad):
        read_grad(grad, *tensors)


STEPS = {"cpu": Steps(_apply_cpu, _read_grad_cpu), "triton": Steps(_apply_triton, _read_grad_triton)}


def _fwd(
    backend: str,
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    scale_on: str,
    keep_z: bool,
) -> list[Tensor]:
    """y, and z = x Wᵀ [M, N] if it is to be kept: if not, y takes its place."""
    steps, matrix, bias, scale = STEPS[backend], products.as_matrix(x), _fp32(bias), _fp32(scale)
    dtype = products.compute_dtype(matrix, backend)
    y = x.new_empty((*x.shape[:-1], weights.shape(weight)[0]))
    rows_of_y = products.as_matrix(y)
    z = torch.empty_like(rows_of_y) if keep_z else None
    for x_c, y_c, z_c in _chunks(dtype, matrix, rows_of_y, z):
        x_c = _factor(steps, x_c, scale if scale_on == "input" else None, dtype)
        target = y_c if z_c is None else z_c
        if dtype != x.dtype:
            target = torch.empty_like(y_c, dtype=dtype)
        if scale_on == "output":
            products.linear(target, x_c, weight, backend)
            if z_c is not None and target is not z_c:
                z_c.copy_(target)
            steps.apply(target, bias, scale, y_c)
        elif bias is not None and weight[0].dtype == dtype:
            products.linear(target, x_c, weight, backend, bias=bias.to(dtype))
            if target is not y_c:
                y_c.copy_(target)
        else:
            products.linear(target, x_c, weight, backend)
            if bias is not None or target is not y_c:
                steps.apply(target, bias, None, y_c)
    return [y] if z is None else [y, z]


def _fwd_fake(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    scale_on: str,
    keep_z: bool,
    backend: str,
) -> list[Tensor]:
    columns = weights.shape(weight)[0]
    y = x.new_empty((*x.shape[:-1], columns))
    return [y, x.new_empty((math.prod(x.shape[:-1]), columns))] if keep_z else [y]


def _bwd(
    backend: str,
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    scale_on: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
) -> list[Tensor]:
    """The gradients of x and weight, in their dtypes, and of bias and scale, in fp32: those that are needed."""
    steps, matrix, bias, scale = STEPS[backend], products.as_matrix(grad), _fp32(bias), _fp32(scale)
    dtype = products.compute_dtype(matrix, backend, grad=True)
    columns, features = weights.shape(weight)
    on_input, on_output = (scale if scale_on == side else None for side in ("input", "output"))
    grad_x = grad.new_empty((*grad.shape[:-1], features)) if need_x else None
    grad_weight = grad.new_empty((columns, features), dtype=dtype) if need_weight else None
    grad_bias = grad.new_zeros(columns, dtype=torch.float32) if need_bias else None
    grad_scale = torch.zeros_like(scale) if need_scale and scale is not None else None
    need_g = need_x or (need_scale and scale_on == "input")
    matrices = (
        matrix,
        None if x is None else products.as_matrix(x),
        z,
        None if grad_x is None else products.as_matrix(grad_x),
    )
    for i, (grad_c, x_c, z_c, dx) in enumerate(_chunks(dtype, *matrices)):
        # dz, the gradient of z = x Wᵀ: a matrix of its own where it is not that of y, in the right dtype already.
        own = (need_g or need_weight) and (on_output is not None or dtype != grad.dtype)
        out = torch.empty_like(grad_c, dtype=dtype) if own else None
        if out is not None or need_bias or z is not None:
            steps.read_grad(grad_c, z_c, bias, on_output, out, grad_bias, grad_scale if z is not None else None)
        dz = grad_c if out is None else out
        if need_g:
            # g, the gradient of the product's left factor: x, or x ⊙ scale.
            g = dz.new_empty((dz.shape[0], features)) if dx is None or dtype != dx.dtype else dx
            products.linear_grad(g, dz, weight, backend)
            if on_input is not None:
                steps.read_grad(g, x_c if need_scale else None, None, on_input, dx, None, grad_scale)
            elif dx is not None and dx is not g:
                dx.copy_(g)
        if grad_weight is not None and x_c is not None:
            factor = _factor(steps, x_c, on_input, dtype)
            torch.addmm(grad_weight, dz.t(), factor, beta=float(i > 0), out=grad_weight)
    if grad_weight is not None:
        grad_weight = grad_weight.to(grad.dtype)
    return [found for found in (grad_x, grad_weight, grad_bias, grad_scale) if found is not None]


def _bwd_fake(
    grad: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    scale: Tensor | None,
    scale_on: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    backend: str,
) -> list[Tensor]:
    columns, features = weights.shape(weight)
    found = []
    if need_x:
        found.append(grad.new_empty((*grad.shape[:-1], features)))
    if need_weight:
        found.append(grad.new_empty((columns, features)))
    if need_bias:
        found.append(grad.new_empty(columns, dtype=torch.float32))
    if need_scale:
        found.append(grad.new_empty(features if scale_on == "input" else columns, dtype=torch.float32))
    return found


def _chunks(dtype: torch.dtype, *matrices: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Rows of the matrices that go together: all, or so many as a product in another `dtype` takes."""
    first: Any = matrices[0]
    if dtype == first.dtype:
        return [matrices]
    chunks = products.row_chunks(first, dtype)
    return (tuple(None if matrix is None else matrix[rows] for matrix in matrices) for rows in chunks)


def _fp32(vector: Tensor | None) -> Tensor | None:
    if vector is None or (vector.dtype == torch.float32 and vector.is_contiguous()):
        return vector
    return vector.to(torch.float32).contiguous()


def _factor(steps: Steps, x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product's left factor, x or x ⊙ scale, in the product's dtype."""
    if scale is None:
        return x if x.dtype == dtype else x.to(dtype)
    scaled = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    steps.apply(x, None, scale, scaled)
    return scaled


_FWD = backends.define(
    "bias_scale_linear_fwd",
    "(Tensor x, Tensor[] weight, Tensor? bias, Tensor? scale, str scale_on, bool keep_z) -> Tensor[]",
    _fwd_fake,
    {name: partial(_fwd, name) for name in STEPS},
)
_BWD = backends.define(
    "bias_scale_linear_bwd",
    "(Tensor grad, Tensor? x, Tensor? z, Tensor[] weight, Tensor? bias, Tensor? scale, str scale_on, bool need_x, "
    "bool need_weight, bool need_bias, bool need_scale) -> Tensor[]",
    _bwd_fake,
    {name: partial(_bwd, name) for name in STEPS},
)


class _BiasScaleLinear(torch.autograd.Function):
    """Saves one matrix at most: z = x Wᵀ for a trained scale on the output, x for one on the input.

    A trained weight needs x as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        scale_on: str,
        backend: str,
        *weight: Tensor,
    ) -> Tensor:
        _, _, need_scale, _, _, need_weight, *_ = ctx.needs_input_grad
        on_input, on_output = (need_scale and scale_on == side for side in ("input", "output"))
        y, *z = _FWD(x, weight, bias, scale, scale_on, on_output, backend)
        ctx.save_for_backward(
            x if on_input or need_weight else None, *(z or [None]), bias if on_output else None, scale, *weight
        )
        ctx.settings = scale_on, backend, None if bias is None else bias.dtype
        return y

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale_on, backend, bias_dtype = ctx.settings
        x, z, bias, scale, *weight = ctx.saved_tensors
        need_x, need_bias, need_scale, _, _, need_weight, *_ = ctx.needs_input_grad
        found = iter(
            _BWD(grad, x, z, weight, bias, scale, scale_on, need_x, need_weight, need_bias, need_scale, backend)
        )
        grad_x = next(found) if need_x else None
        grad_weight = next(found) if need_weight else None
        grad_bias = next(found).to(bias_dtype) if need_bias else None
        grad_scale = next(found).to(scale.dtype) if need_scale else None
        return grad_x, grad_bias, grad_scale, None, None, grad_weight, *[None] * (len(weight) - 1)


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """x factor, for packed fp32 x [..., K] and factor [K, N]."""
    out = x.new_empty((*x.shape[:-1], factor.shape[1]))
    products.multiply(products.as_matrix(out), products.as_matrix(x), factor, "cpu")
    return out


def _fwd_packed(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, keep_z: bool = False
) -> tuple[Tensor, Tensor]:
    """y, and z = x Wᵀ if it is to be kept: if not, y takes its place."""
    tiled = products.tiles_f32(x.numel() // x.shape[-1], "cpu")
    z = _multiply(x, weight.t()) if tiled else F.linear(x, weight)
    y = torch.empty_like(z) if keep_z else z
    extension.module().bias_scale_linear_fwd_cpu(z, bias, scale, y, torch.get_num_threads())
    return y, z


class _Packed(torch.autograd.Function):
    """`_BiasScaleLinear` in few steps, for packed fp32 on the CPU, a frozen weight and a scale on the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
        need_scale = ctx.needs_input_grad[3]
        y, z = _fwd_packed(x, weight, bias, scale, need_scale)
        ctx.save_for_backward(weight, z if need_scale else None, bias if need_scale else None, scale)
        return y

    @staticmethod
    @backends.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, z, bias, scale = ctx.saved_tensors
        need_x, _, need_bias, need_scale = ctx.needs_input_grad
        if _cpp_packed()("*n *n *n=? n=", grad, z, scale) < 0:
            z = None if z is None else products.as_matrix(z)
            needs = need_x, False, need_bias, need_scale
            found = iter(_BWD(grad, None, z, [weight], bias, scale, "output", *needs, "cpu"))
            return tuple(next(found) if need else None for need in needs)
        grad_z = torch.empty_like(grad) if need_x else None
        grad_bias = torch.zeros_like(scale) if need_bias else None
        grad_scale = torch.zeros_like(scale) if need_scale else None
        kernel = extension.module().bias_scale_linear_bwd_cpu
        kernel(grad, z, bias, scale, grad_z, grad_bias, grad_scale, torch.get_num_threads())
        if grad_z is None:
            return None, None, grad_bias, grad_scale
        tiled = products.tiles_f32(grad_z.numel() // grad_z.shape[-1], "cpu")
        return _multiply(grad_z, weight) if tiled else grad_z @ weight, None, grad_bias, grad_scale


_APPLY_PACKED = backends.straight(_Packed)


def bias_scale_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_on: str = "output",
    *,
    backend: str | None = None,
) -> Tensor:
    """scale ⊙ (x Wᵀ + bias), (x ⊙ scale) Wᵀ + bias, or x Wᵀ + bias: `reference` says what exactly.

    Bias and scale cost one pass over the output (or the input), and their gradients one pass over the gradient and
    what it is multiplied with, which writes the gradient for the product as well. Saved for backward: z = x Wᵀ if a
    scale on the output is trained, x if one on the input is (or a dense `weight`); with neither, no matrix.
    Differentiable once, except on the reference.

    Args:
        x: [..., K] (fp32, fp16, bf16; fp64 on the reference; any strides, any number of rows).
        weight: [N, K], dense, in the dtype of x, frozen or trained; or quantised and frozen (`nf4_quantize`,
            `int8_quantize`).
        bias: [N] (any floating dtype), or None.
        scale (any floating dtype): [N] on the output, [K] on the input, None for "none".
        scale_on: "output" (the paper), "input" (the 65B code) or "none" (the 7B code).
        backend: "cpu", "triton" or "reference"; default: the fastest that can.

    Returns:
        [..., N] in the dtype of x; under autocast in autocast's, to which x and a dense weight are cast.

    Raises:
        ValueError, TypeError: an argument is wrong.
        BackendUnavailable: the backend asked for cannot run this call.

    Numerics: bias and scale act in fp32, but for a bias that the product itself adds, in the product's dtype. Their
    gradients are summed in fp32 and have their own dtypes. Deterministic, on any number of threads.

    Source: Gao et al., "LLaMA-Adapter V2" (arXiv 2304.15010), and its code: see `reference`.
    """
    if _is_packed(x, weight, bias, scale, scale_on, backend):
        arguments: Any = x, weight, bias, scale
        bias_is_trained = bias is not None and bias.requires_grad
        if torch.is_grad_enabled() and (bias_is_trained or x.requires_grad or arguments[3].requires_grad):
            y: Tensor = _APPLY_PACKED(*arguments)
            return y
        return _fwd_packed(*arguments)[0]
    if _is_small(x, weight, bias, scale, scale_on, backend):
        return reference(x, weight, bias, scale, scale_on)
    call = check(x, weight, bias, scale, scale_on)
    chosen = OP.select(call, backends.machine(call.device), backend)
    if chosen == "reference":
        return reference(*call[:5])
    parts = weights.tensors(call.weight)
    if call.differentiated:
        return _BiasScaleLinear.apply(call.x, call.bias, call.scale, scale_on, chosen, *parts)
    return _FWD(call.x, parts, call.bias, call.scale, scale_on, False, chosen)[0]
