"""What the tests of ops share: which backends and dtypes can be tested here, and how near to float64 they must be."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast.ops import quantized_linear
from mmfast.ops.backends import machine
from mmfast.ops.weights import QuantizedWeight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# Added to 1.5 times eager's error: a quarter of the dtype's rounding unit, and in fp32 what the order of a sum makes.
FLOOR = {torch.float32: 5e-7, torch.float16: 2**-13, torch.bfloat16: 2**-10}

# ---- on the CPU, where Triton's kernels are interpreted

CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(machine(CPU).lacks("cpu")), reason="the extension is not built")),
    pytest.param(
        "triton", marks=pytest.mark.skipif(bool(machine(CPU).lacks("triton")), reason="no Triton interpreter")
    ),
]
# Triton's interpreter cannot multiply in bfloat16, and truncates where a GPU rounds to it.
INTERPRETED_DTYPES = DTYPES[:2]
KERNELS = [
    pytest.param(*backend.values, dtype, marks=backend.marks)
    for backend, dtype in itertools.product(BACKENDS, DTYPES)
    if backend.values != ("triton",) or dtype in INTERPRETED_DTYPES
]

# ---- each backend where it is at home: Triton on the GPU if there is one

ON_GPU = torch.cuda.is_available()
DEVICES = {"cpu": "cpu", "triton": "cuda" if ON_GPU else "cpu"}


def dtypes_of(backend: str) -> list[torch.dtype]:
    return DTYPES if backend == "cpu" or ON_GPU else INTERPRETED_DTYPES


def case(backend: str, *values: Any) -> Any:
    """A row of parameters that starts with a backend."""
    return pytest.param(backend, *values, marks=[pytest.mark.gpu] if DEVICES[backend] == "cuda" else [])


def skip_if_lacking(backend: str) -> None:
    if backend == "triton" and (reason := machine(torch.device(DEVICES[backend])).lacks("triton")):
        pytest.skip(reason)


def error(actual: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of `exact`."""
    exact = exact.to(actual.device)
    return float((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


def assert_as_near(found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, unit: float = 0.0) -> None:
    """`found` is as near to `exact` (float64) as `dtype` asks, and no worse than 1.5 times eager; norm and maximum.

    Args:
        unit: what the maximum may be in any case, over the largest number of `exact`.
    """
    assert found.shape == exact.shape
    if exact.numel() == 0:
        return
    found, eager = found.double().to(exact.device), eager.double().to(exact.device)
    for measure, least in ((torch.linalg.vector_norm, 0.0), (_largest, unit)):
        size, off, baseline = measure(exact).item(), measure(found - exact).item(), measure(eager - exact).item()
        allowed = max(1.5 * baseline, least * size) + FLOOR[dtype] * size
        assert off <= allowed, f"off by {off}, eager by {baseline}, size {size}"
    assert error(found, exact) <= TOLERANCE[dtype]


# ---- the linears of quantised weights


def run_linear(
    function: Any, x: Tensor, q: QuantizedWeight, bias: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """The output and the gradients of x and bias, for a fixed gradient of the output."""
    x = x.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    output = function(x, q, bias, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad.to(output))
    assert output.dtype == x.dtype
    found = [output.detach(), x.grad, *([] if bias is None else [bias.grad])]
    return [part for part in found if part is not None]


def assert_linear_close(linear: Any, backend: str, x: Tensor, q: QuantizedWeight, bias: Tensor | None = None) -> None:
    """Output and gradients are as near to the float64 definition as they must be, and no worse than eager's."""
    dtype = x.dtype
    exact = run_linear(quantized_linear.reference, x.double(), q, bias)
    eager = run_linear(quantized_linear.reference, x, q, bias)
    ours = run_linear(linear, x, q, bias, backend=backend)
    for found, baseline, wanted in zip(ours, eager, exact, strict=True):
        assert found.shape == wanted.shape
        size = torch.linalg.vector_norm(wanted.double()).item()
        error = torch.linalg.vector_norm(found.double() - wanted).item()
        allowed = 1.5 * torch.linalg.vector_norm(baseline.double() - wanted).item() + FLOOR[dtype] * size
        assert error <= allowed, f"error {error}, allowed {allowed}, size {size}"
        assert error <= TOLERANCE[dtype] * size
