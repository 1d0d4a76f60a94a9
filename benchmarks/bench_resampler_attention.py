"""resampler_attention against PyTorch's attention on the concatenation, OpenFlamingo's eager form and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import resampler_attention
from mmfast.ops.backends import machine
from mmfast.ops.resampler_attention import OP, check, reference

# B, N: videos of 8 frames of CLIP ViT-L/14, images, a few tokens; 8 heads of 64, 64 queries that are latents too.
SHAPES = {
    "cpu": [(1, 2056), (8, 257), (8, 2056), (1, 257), (1, 64), (1, 4)],
    "cuda": [(64, 257), (8, 2056), (1, 16448), (1, 257)],
}
HEADS, QUERIES, DIM = 8, 64, 64
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16,)}
Attention = Callable[..., Tensor]


def open_flamingo(
    query: Tensor, media_key: Tensor, media_value: Tensor, latent_key: Tensor, latent_value: Tensor
) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:41-65, between its projections."""
    query = query * query.size(-1) ** -0.5
    key, value = torch.cat((media_key, latent_key), -2), torch.cat((media_value, latent_value), -2)
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def flex_attention(
    query: Tensor, media_key: Tensor, media_value: Tensor, latent_key: Tensor, latent_value: Tensor
) -> Tensor:
    """FlexAttention on the concatenation."""
    from torch.nn.attention.flex_attention import flex_attention

    key, value = torch.cat((media_key, latent_key), -2), torch.cat((media_value, latent_value), -2)
    out: Tensor = flex_attention(query, key, value)
    return out


def inputs(batch: int, media: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Halves of joint projections, as a module has them."""
    found = [torch.randn(batch, QUERIES, HEADS, DIM, device=device).to(dtype).transpose(1, 2)]
    for length in (media, QUERIES):
        joint = torch.randn(batch, length, 2, HEADS, DIM, device=device).to(dtype)
        found += [half.transpose(1, 2) for half in joint.unbind(2)]
    return found


def implementations(tensors: list[Tensor], with_compile: bool) -> dict[str, Attention]:
    """The reference first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Attention] = {"SDPA on the concatenation": reference, "OpenFlamingo": open_flamingo}
    for name, function in {"torch.compile": open_flamingo, "FlexAttention": flex_attention}.items():
        try:
            if with_compile:
                compiled = torch.compile(function, dynamic=False)
                compiled(*tensors)
                found[name] = compiled
        except Exception as error:  # no C++ compiler, no Triton, no backward: the row is left out, and said so
            print(f"{name} does not work here: {str(error).splitlines()[0]}")
    call, on = check(*tensors), machine(tensors[0].device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[backend.name] = lambda *x, name=backend.name: resampler_attention(*x, backend=name)
    found["auto"] = resampler_attention
    return found


def providers(tensors: list[Tensor], mode: str, with_compile: bool) -> dict[str, harness.Provider]:
    """What is timed: `mode` is "forward" or "both"."""
    if mode == "forward":
        return {name: lambda run=run: run(*tensors) for name, run in implementations(tensors, with_compile).items()}
    leaves = [x.detach().requires_grad_() for x in tensors]
    grad = torch.randn_like(tensors[0])
    return {
        name: lambda run=run: torch.autograd.grad(run(*leaves), leaves, grad)
        for name, run in implementations(leaves, with_compile).items()
    }


def gate(timed: dict[str, harness.Provider], tolerance: float) -> None:
    """Raises unless all providers agree with the first."""
    (_, first), *others = timed.items()
    expected = first()
    for name, run in others:
        for found, wanted in zip(run(), expected, strict=True):
            error = torch.linalg.vector_norm(found.double() - wanted) / torch.linalg.vector_norm(wanted.double())
            if not error <= tolerance:
                raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    shapes = SHAPES[options.device][: 1 if options.quick else None]
    for batch, media in shapes:
        for dtype in DTYPES[options.device]:
            tensors = inputs(batch, media, dtype, options.device)
            for mode in ("forward", "both"):
                timed = providers(tensors, mode, with_compile=(batch, media) == shapes[0])
                gate(timed, 1e-4 if dtype == torch.float32 else 3e-2)
                rounds = options.rounds * (1 if batch * media > 4096 else 3)
                case = f"{mode} {batch}x{media} {str(dtype).removeprefix('torch.')}"
                for name, timing in harness.measure(timed, options.device, rounds).items():
                    rows.append({"case": case, "provider": name, **timing})
    harness.report("resampler_attention", rows, options)


if __name__ == "__main__":
    main()
