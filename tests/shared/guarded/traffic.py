"""Counts bytes, FLOPs and launches: of PyTorch's ops by a dispatch mode, of our kernels where they are called.

A byte counts once for each op or kernel that is given it, read or written: what one pass over memory is. What a kernel
does inside, in registers, caches and scratch memory of its own, is not seen; the instruction counts are there for that.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mmfast.ops import backends, extension

aten = torch.ops.aten

# Their results are memory that nobody has written yet.
_EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# Their first argument is overwritten and not read.
_OVERWRITES = {aten.copy_, aten.zero_, aten.fill_}
# Of their first argument only the rows are read, or written, that the result, or the values, has.
_GATHERS, _SCATTERS = {aten.index}, {aten.index_put_, aten.index_put, aten._index_put_impl_}
_ADDS_PRODUCT = {aten.addmm, aten.addmm_, aten.baddbmm}

# What our C++ kernels write; all else that they are given they read, and what has a `+` they read as well.
WRITES = {
    "bias_scale_linear_bwd_cpu": "out +grad_bias +grad_scale",
    "bias_scale_linear_fwd_cpu": "y",
    "dropout_cpu": "out",
    "flash_attention_bwd_cpu": "+grad_query grad_key grad_value",
    "gated_cross_attention_bwd_cpu": "grad_query grad_key grad_value",
    "gated_cross_attention_fwd_cpu": "out lse",
    "gated_residual_bwd_cpu": "grad_y grad_gate",
    "gated_residual_fwd_cpu": "out",
    "int8_dequantize_cpu": "out",
    "int8_linear_cpu": "out",
    "int8_quantize_cpu": "values scale",
    "linear_cross_entropy_rows": "+logits losses correct",
    "lora_linear_bwd_cpu": "grad_x grad_a grad_b",
    "lora_linear_fwd_cpu": "s out",
    "lora_linear_rows_cpu": "out",
    "low_rank_expand": "out",
    "low_rank_product": "out",
    "low_rank_read": "projected outer",
    "mixture_adapter_bwd_cpu": "grad_x grad_down grad_down_bias grad_up",
    "mixture_adapter_fwd_cpu": "y z",
    "nf4_dequantize_cpu": "out",
    "nf4_linear_cpu": "out",
    "nf4_quantize_cpu": "packed absmax",
    "product_f32": "out",
    "quantized_grad": "out",
    "quantized_linear": "out",
    "resampler_attention_bwd_cpu": "grad_query grad_media_key grad_media_value grad_latent_key grad_latent_value",
    "resampler_attention_fwd_cpu": "out lse",
    "rms_norm_bwd_cpu": "grad_x grad_weight",
    "rms_norm_fwd_cpu": "y sum rstd",
    "rope_cpu": "to",
    "spatio_temporal_pool_bwd_cpu": "grad_features",
    "spatio_temporal_pool_fwd_cpu": "pooled",
    "swiglu_bwd_cpu": "grad_gate grad_up",
    "swiglu_fwd_cpu": "out",
    "zero_init_attention_bwd_cpu": "grad_query grad_key grad_value grad_act",
    "zero_init_attention_fwd_cpu": "out",
}


class Traffic(TorchDispatchMode):
    """Counts within its context. An op of ours is one op, unless `inside` is entered as well.

    Attributes:
        read, written: bytes.
        flops: of PyTorch's ops, as `torch.utils.flop_counter` has them.
        launches: of ops that touch memory, and of our kernels, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.flops = 0
        self.launches: Counter[str] = Counter()

    def row(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "written": self.written,
            "flops": self.flops,
            "launches": dict(sorted(self.launches.items())),
        }

    def count(self, name: str, reads: Iterable[Region], writes: Iterable[Region]) -> None:
        self.launches[name] += 1
        self.read += _bytes(reads)
        self.written += _bytes(writes)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        packet = op.overloadpacket
        if packet in _EMPTY:
            result.zero_()  # what kernels that are counted and not run leave behind is the same each time
        if formula := flop_registry.get(packet):
            self.flops += formula(*args, **kwargs, out_val=result)
        reads, writes = _operands(op, args, kwargs, result)
        if writes:
            self.count(f"{op.namespace}.{packet.__name__}", map(region, reads), map(region, writes))
        return result


# Where memory lies, its extents and strides in elements, and the bytes of one.
Region = tuple[int, tuple[int, ...], tuple[int, ...], int]


def region(tensor: Tensor) -> Region:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size()


def _bytes(regions: Iterable[Region]) -> int:
    """Of distinct regions; an extent along which memory repeats counts once."""
    sizes = {}
    for address, shape, strides, width in regions:
        extents = [1 if stride == 0 else extent for extent, stride in zip(shape, strides, strict=True)]
        size = width * torch.Size(extents).numel()
        sizes[address] = max(size, sizes.get(address, 0))
    return sum(sizes.values())


def _operands(op: Any, args: Any, kwargs: Any, result: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an op of PyTorch's dispatcher reads and writes."""
    packet, schema = op.overloadpacket, op._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    mutated = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    outs = {a.name for a in schema if a.is_out}
    reads = [x for name, value in given.items() if name not in outs for x in _tensors(value)]
    held = {x.untyped_storage().data_ptr() for x in reads}
    writes = [x for name in mutated for x in _tensors(given.get(name))]
    if packet not in _EMPTY and not mutated:
        writes = [x for x in _tensors(result) if x.untyped_storage().data_ptr() not in held]  # no views
    first, name = args[0] if args else None, packet.__name__
    if name.startswith("new_") or name.endswith("_like"):  # shape and dtype alone
        reads = []
    elif packet in _OVERWRITES or (packet in _ADDS_PRODUCT and given.get("beta") == 0):
        reads = [x for x in reads if x is not first]
    elif packet in _GATHERS:
        reads = [x for x in reads if x is not first] + writes
    elif packet in _SCATTERS:
        reads = [x for x in reads if x is not first]
        writes = _tensors(given["values"])
    return reads, [x for x in writes if x.numel()]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


OnCall = Callable[[str, tuple[Any, ...]], None]


@contextlib.contextmanager
def inside(traffic: Traffic, on_call: OnCall | None = None) -> Iterator[None]:
    """Within the context `traffic` sees what our ops are made of: C++ kernels, Triton kernels and PyTorch's ops.

    Triton kernels are counted and not run, so that what comes out is no result: zeros, where they would have written.

    Args:
        on_call: is told the name and the arguments of each call of a C++ kernel before it is made.
    """
    overheard, module = backends._overheard, extension.module
    backends._overheard = lambda argument: False
    extension.module = lambda: _Kernels(module(), traffic, on_call)
    try:
        with _triton_counted(traffic):
            yield
    finally:
        backends._overheard, extension.module = overheard, module


class _Kernels:
    """The compiled extension, each of whose kernels is counted when it is called."""

    def __init__(self, module: Any, traffic: Traffic, on_call: OnCall | None) -> None:
        self._module, self._traffic, self._on_call = module, traffic, on_call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self._module, name)
        names = re.findall(r"[(,] ?(\w+): ", kernel.__doc__.splitlines()[0])

        def run(*args: Any) -> Any:
            args = tuple(map(_described, args))
            given = dict(zip(names, args, strict=False))
            written, read_too = _declared(name, given)
            reads, writes = [], []
            for argument, value in given.items():
                found = [region_of_view(view) for view in _views(value)]
                writes += found if argument in written else []
                reads += found if argument not in written or argument in read_too else []
            self._traffic.count(name, reads, writes)
            if self._on_call is not None:
                self._on_call(name, args)
            return kernel(*args)

        return run


def _declared(kernel: str, given: dict[str, Any]) -> tuple[set[str], set[str]]:
    """The arguments that a call of a kernel writes, and those of them that it reads as well."""
    names = WRITES[kernel].split()
    read_too = {name[1:] for name in names if name.startswith("+")}
    written = {name.removeprefix("+") for name in names}
    if given.get("add"):  # what is added to is read
        read_too |= {"outer"}
    if given.get("write_gradient") is False:  # logits are overwritten only by a gradient
        written -= {"logits"}
    return written, read_too


def _described(value: Any) -> Any:
    """`mmfast.ops.extension.described` in place of tensors."""
    if isinstance(value, list):
        return [_described(part) for part in value]
    return extension.described(value) if isinstance(value, Tensor) else value


def is_view(value: Any) -> bool:
    """Whether this is what `mmfast.ops.extension.described` makes of a tensor."""
    return isinstance(value, tuple) and len(value) == 4 and isinstance(value[3], tuple) and isinstance(value[0], int)


def _views(value: Any) -> list[extension.Description]:
    if isinstance(value, list):
        return [view for part in value for view in _views(part)]
    return [value] if is_view(value) else []


_WIDTHS = {code: dtype.itemsize for dtype, code in extension.DTYPE_CODES.items()}


def region_of_view(view: extension.Description) -> Region:
    address, code, shape, strides = view
    return address, tuple(shape), tuple(strides), _WIDTHS[code]


@contextlib.contextmanager
def _triton_counted(traffic: Traffic) -> Iterator[None]:
    try:
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:  # then no op runs on Triton
        yield
        return
    run = InterpretedFunction.run

    def count(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [x for x in (*args, *options.values()) if isinstance(x, Tensor)]
        # Which of them a kernel writes its signature does not say.
        traffic.count(kernel.__name__, map(region, tensors), ())

    InterpretedFunction.run = count
    try:
        yield
    finally:
        InterpretedFunction.run = run
