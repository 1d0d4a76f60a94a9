"""The compiled extension `mmfast._C`: loaded when first needed, absent without harm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch.autograd import forward_ad

# The codes of DType in csrc/tensor_view.h.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int64: 4,
    torch.int32: 5,
    torch.bool: 6,
    torch.uint8: 7,
    torch.int8: 8,
}

Description = tuple[int, int, tuple[int, ...], tuple[int, ...]]
View = torch.Tensor | Description
# The classes of tensors that C++ reads by itself, where PyTorch has the table by which it does.
_read_by_cpp: tuple[type, ...] = ()


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        found = importlib.import_module("mmfast._C")
    except ImportError as error:
        return None, f"the compiled extension mmfast._C cannot be imported ({error})"
    listeners = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack, forward_ad.__dict__
    found.ask(described, *listeners)
    if table := getattr(torch.Tensor, "__dlpack_c_exchange_api__", None):
        global _read_by_cpp
        if found.take_tensors(torch.Tensor, torch.nn.Parameter, table):
            _read_by_cpp = torch.Tensor, torch.nn.Parameter
    return found, ""


def missing(part: str) -> str | None:
    """Why the extension cannot serve `part` ("cpu" or "cuda"); None if it can."""
    module, reason = _load()
    if module is None:
        return reason
    if part == "cuda" and not module.has_cuda:
        return "the compiled extension was built without CUDA (nvcc not found, or MMFAST_CUDA=OFF)"
    return None


@cache
def module() -> ModuleType:
    """`mmfast._C`.

    Raises:
        ImportError: it is not built; the message says why.
    """
    found, reason = _load()
    if found is None:
        raise ImportError(reason)
    return found


@cache
def fits() -> Callable[..., int]:
    """What `mmfast.ops.backends.fits` asks of C++; without the extension, a function that returns -1."""
    found, _ = _load()
    return (lambda pattern, *tensors: -1) if found is None else found.fits


@cache
def packed() -> Callable[..., int]:
    """What `mmfast.ops.backends.packed` asks of C++; without the extension, a function that returns -1."""
    found, _ = _load()
    return (lambda pattern, *tensors: -1) if found is None else found.packed


@cache
def overheard() -> Callable[[], bool]:
    """Whether somebody is to hear of a kernel: a dispatch mode, torch.func, forward-mode differentiation.

    C++ finds out in half the time. Without the extension it is assumed, which costs a call the dispatcher's time.
    """
    found, _ = _load()
    return (lambda: True) if found is None else found.overheard


@cache
def labelled() -> Callable[..., int]:
    """Of (hidden, weight, labels, ignore_index) of linear_cross_entropy: rows · V · H if a check could find nothing and
    a row has a label; else -1. Without the extension, a function that returns -1.
    """
    found, _ = _load()
    return (lambda *arguments: -1) if found is None else found.labelled


@cache
def quantized_linear_row() -> Callable[..., bool]:
    """Of (x, weight, bias or None, out, threads): fills out [..., N] with x Wᵀ + bias for one packed row x [..., K] and
    an NF4Weight or Int8Weight, and says whether it did: not if anything is wrong, nor without the extension.
    """
    found, _ = _load()
    return (lambda *arguments: False) if found is None else found.quantized_linear_row


def has_amx() -> bool:
    """Whether the C++ kernels multiply bfloat16 in AMX tiles here."""
    found, _ = _load()
    return found is not None and found.has_amx()


def has_avx512() -> bool:
    """Whether the C++ kernels may use AVX-512 here."""
    found, _ = _load()
    return found is not None and found.has_avx512()


@cache
def has_sgemm() -> bool:
    """Whether C++ can call the product of fp32 matrices that PyTorch uses on a CPU."""
    found, _ = _load()
    return found is not None and found.has_sgemm()


# The marker that torch.compiler.assume_constant_result sets; calling that would import all of Dynamo.
has_amx._dynamo_marked_constant = True  # type: ignore[attr-defined]
has_avx512._dynamo_marked_constant = True  # type: ignore[attr-defined]


def view(tensor: torch.Tensor) -> View:
    """What C++ takes for a tensor: on a CPU itself, where C++ can read it; else `described`."""
    return tensor if type(tensor) in _read_by_cpp and tensor.is_cpu else described(tensor)


def described(tensor: torch.Tensor) -> Description:
    """(address, dtype code, shape, strides in elements)."""
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def optional_view(tensor: torch.Tensor | None) -> View | None:
    """`view` of a tensor that may be absent."""
    return None if tensor is None else view(tensor)


def stream(device: torch.device) -> int:
    """The address of PyTorch's current CUDA stream on `device`."""
    return torch.cuda.current_stream(device).cuda_stream
