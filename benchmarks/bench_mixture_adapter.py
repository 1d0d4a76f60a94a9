"""Times mixture_adapter, forward and backward, against LaVIN's convolutions, the best forms of it in eager PyTorch, and
torch.compile.

python benchmarks/bench_mixture_adapter.py --rounds 15 --out benchmarks/results/cpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import mixture_adapter
from mmfast.ops.backends import machine
from mmfast.ops.mixture_adapter import ACTIVATIONS, OP, check, reference

Run = Callable[[], list[Tensor]]


class Case(NamedTuple):
    """`samples` × `tokens` rows of `features`; `experts` with 1 and one group are a plain adapter without a router."""

    samples: int
    tokens: int
    features: int
    dtype: torch.dtype
    backward: bool = True
    ranks: int = 8
    experts: int = 2
    groups: int = 2
    activation: str = "identity"

    def __str__(self) -> str:
        kind, mode = str(self.dtype).removeprefix("torch."), "" if self.backward else " forward"
        plain = f" plain {self.activation}" if self.experts == 1 else ""
        return f"{self.samples}x{self.tokens}x{self.features} r={self.ranks}{plain} {kind}{mode}"


class Tensors(NamedTuple):
    """Parameters in fp32, as they are trained."""

    x: Tensor
    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    router: Tensor | None
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:6] if tensor is not None]


def tensors(case: Case, device: str) -> Tensors:
    torch.manual_seed(0)

    def trained(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).requires_grad_(case.backward)

    shape = case.samples, case.tokens, case.features
    x = torch.randn(shape, device=device).to(case.dtype).requires_grad_(case.backward)
    router = torch.rand(case.samples, case.experts, device=device).requires_grad_(case.backward)
    return Tensors(
        x,
        trained(case.ranks, case.features, scale=case.features**-0.5),
        trained(case.ranks),
        trained(case.experts, case.features, case.ranks // case.groups, scale=0.3),
        trained(case.experts, case.features),
        router if case.experts > 1 else None,
        torch.randn(shape, device=device).to(case.dtype),
    )


# ---- what one would write in PyTorch


def convolutions(t: Tensors, case: Case) -> Tensor:
    """LaVIN's form: 1 × 1 convolutions on a transposed view, everything in the dtype of x."""
    x, weights = t.x.transpose(1, 2), [None] * case.experts if t.router is None else t.router.to(case.dtype).unbind(1)
    h = F.conv1d(x, t.down.to(case.dtype)[..., None], t.down_bias.to(case.dtype))
    h, y = ACTIVATIONS[case.activation](h), x
    for up, bias, weight in zip(t.up.to(case.dtype), t.up_bias.to(case.dtype), weights, strict=True):
        update = F.conv1d(h, up[..., None], bias, groups=case.groups)
        y = y + (update if weight is None else update * weight[:, None, None])
    return y.transpose(1, 2).contiguous()


def dense(up: Tensor, groups: int) -> Tensor:
    """[..., H, R / groups] as [..., H, R] with zeros."""
    if groups == 1:
        return up
    parts, seen = up.chunk(groups, -2), up.shape[-1]
    return torch.cat([F.pad(part, (g * seen, (groups - 1 - g) * seen)) for g, part in enumerate(parts)], -2)


def per_expert(t: Tensors, case: Case, dtype: torch.dtype) -> Tensor:
    """A dense linear for each expert."""
    x = t.x.to(dtype)
    h = ACTIVATIONS[case.activation](F.linear(x, t.down.to(dtype), t.down_bias.to(dtype)))
    weights = [None] * case.experts if t.router is None else t.router.to(dtype).unbind(1)
    y = x
    for up, bias, weight in zip(dense(t.up.to(dtype), case.groups), t.up_bias.to(dtype), weights, strict=True):
        update = F.linear(h, up, bias)
        y = y + (update if weight is None else update * weight[:, None, None])
    return y.to(case.dtype)


def merged(t: Tensors, case: Case, dtype: torch.dtype) -> Tensor:
    """The experts of each sample merged into one dense update."""
    if t.router is None:
        return per_expert(t, case, dtype)
    x, router = t.x.to(dtype), t.router.to(dtype)
    h = ACTIVATIONS[case.activation](F.linear(x, t.down.to(dtype), t.down_bias.to(dtype)))
    up = dense((router @ t.up.to(dtype).flatten(1)).view(case.samples, case.features, -1), case.groups)
    bias = router @ t.up_bias.to(dtype)
    return (x + torch.baddbmm(bias[:, None], h, up.transpose(1, 2))).to(case.dtype)


def step(forward: Callable[[], Tensor], t: Tensors, backward: bool) -> list[Tensor]:
    """What is timed: the output, and the gradients of everything."""
    if not backward:
        with torch.no_grad():
            return [forward()]
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, t.leaves(), t.grad)]


def providers(case: Case, t: Tensors) -> dict[str, Run]:
    """`auto` is what a call without `backend` runs; "eager" begins the name of what PyTorch alone does uncompiled."""
    arguments: tuple[Any, ...] = (*t[:6], 1.0)
    found: dict[str, Run] = {}

    def add(name: str, forward: Callable[[], Tensor]) -> None:
        found[name] = partial(step, forward, t, case.backward)

    add("eager merged", lambda: merged(t, case, case.dtype))
    if t.router is not None:
        add("eager per expert", lambda: per_expert(t, case, case.dtype))
    if case.dtype != torch.float32:
        add("eager merged fp32", lambda: merged(t, case, torch.float32))
    add("eager reference", lambda: reference(*arguments, None, case.activation))
    # oneDNN's backward of these convolutions in bfloat16 corrupts the heap (torch 2.13, docs/facts.md).
    if t.x.device.type == "cuda" or case.dtype == torch.float32 or not case.backward:
        add("LaVIN convolutions", lambda: convolutions(t, case))
    if t.x.numel() >= 2**22:
        try:
            compiled = torch.compile(lambda: merged(t, case, case.dtype), dynamic=False)
            compiled()
            add("torch.compile merged", compiled)
        except Exception as failure:  # no compiler here: the row is left out, and said so
            print(f"  {case} torch.compile: left out, {type(failure).__name__}")
    call, on = check(*arguments, 0.0, case.activation), machine(t.x.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            add(
                f"mmfast:{backend.name}",
                lambda name=backend.name: mixture_adapter(*arguments, 0.0, case.activation, backend=name),
            )
    add("auto", lambda: mixture_adapter(*arguments, 0.0, case.activation))
    if case.tokens > 1:  # a training step of LaVIN
        add("auto, dropout 0.1", lambda: mixture_adapter(*arguments, 0.1, case.activation))
    return found


def gate(case: Case, found: dict[str, Run]) -> None:
    """Raises unless all providers agree with the definition."""
    expected = found["eager reference"]()
    # Where z is rounded to 16 bits, as in the eager forms, the slope of relu is another one for some z near 0: 3e-2.
    limit = 1e-4 if case.dtype == torch.float32 else 5e-2
    for name, run in found.items():
        if "dropout" not in name:
            for actual, e in zip(run(), expected, strict=True):
                error = (actual - e).float().norm() / e.float().norm()
                if not error <= limit:
                    raise AssertionError(f"{case} {name}: relative error {error:.1e}, allowed {limit:.1e}")


def rows_of(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each provider. `ratio` is the time of the fastest eager form over its own."""
    found = providers(case, tensors(case, options.device))
    gate(case, found)
    elements = case.samples * case.tokens * case.features
    timings = harness.measure(found, options.device, options.rounds * (1 if elements > 2**21 else 10))
    best = min(timing["ms"] for name, timing in timings.items() if name.startswith("eager"))
    return [
        {
            "case": str(case),
            "provider": name,
            **timing,
            "ratio": best / timing["ms"],
            "peak MiB": round(harness.peak_extra_bytes(found[name], options.device) / 2**20, 1),
        }
        for name, timing in timings.items()
    ]


FP32, BF16 = torch.float32, torch.bfloat16


def cases_of(device: str) -> list[Case]:
    if device == "cuda":
        shapes = [(8, 2048, 4096), (32, 512, 4096), (32, 257, 1024), (16, 1, 4096)]
        return [Case(*shape, BF16, backward) for shape in shapes for backward in (False, True)]
    shapes = [(1, 2048, 4096), (4, 257, 1024), (4, 64, 1024), (8, 1, 4096), (1, 1, 4096)]
    cases = [Case(*shape, dtype, backward) for dtype in (BF16, FP32) for shape in shapes for backward in (False, True)]
    for rows, ranks in ((1024, 16), (1024, 64), (1, 64)):
        plain = {"ranks": ranks, "experts": 1, "groups": 1, "activation": "relu"}
        cases += [Case(1, rows, 1024, dtype, backward, **plain) for dtype in (BF16, FP32) for backward in (False, True)]
    return cases


def main() -> None:
    options = harness.arguments(__doc__)
    cases = cases_of(options.device)
    rows = [row for case in cases[: 2 if options.quick else None] for row in rows_of(case, options)]
    harness.report("mixture_adapter", rows, options)


if __name__ == "__main__":
    main()
