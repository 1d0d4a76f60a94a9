"""nn.PerceiverResampler against OpenFlamingo's eager module, as it is and with PyTorch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.nn import PerceiverResampler

# B · T, N, D: six layers, 64 latents, 8 heads of 64.
SHAPES = {
    "cpu": [(1, 2056, 1024), (8, 257, 1024), (1, 257, 1024), (1, 64, 256), (1, 4, 64)],
    "cuda": [(64, 257, 1024), (8, 2056, 1024), (1, 16448, 1024)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
Forward = Callable[[PerceiverResampler, Tensor], Tensor]


def eager_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """mlfoundations/open_flamingo, open_flamingo/src/helpers.py:54-63."""
    scores = torch.einsum("bhid,bhjd->bhij", query * query.size(-1) ** -0.5, key)
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)


def eager(resampler: PerceiverResampler, media: Tensor, attend: Any = eager_attention) -> Tensor:
    """The module as OpenFlamingo runs it (helpers.py:41-65, 107-132), with the weights of `resampler`."""
    x = media.flatten(0, 1)
    latents = resampler.latents.repeat(x.size(0), 1, 1)
    for layer in resampler.layers:
        attention, feed_forward = layer
        normed, heads = attention.norm_latents(latents), attention.num_heads
        query = attention.to_q(normed)
        key, value = attention.to_kv(torch.cat((attention.norm_media(x), normed), -2)).chunk(2, -1)
        query, key, value = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (query, key, value))
        out = attend(query, key, value).transpose(1, 2).flatten(2)
        latents = attention.to_out(out) + latents
        latents = feed_forward(latents) + latents
    return resampler.norm(latents)[:, None]


def providers(resampler: PerceiverResampler, media: Tensor, mode: str) -> dict[str, harness.Provider]:
    """What is timed: `mode` is "forward" or "both"; the media are frozen, as features of an encoder are."""
    forwards: dict[str, Forward] = {
        "OpenFlamingo": eager,
        "OpenFlamingo with SDPA": lambda r, x: eager(r, x, F.scaled_dot_product_attention),
        "PerceiverResampler": lambda r, x: r(x),
    }
    parameters = list(resampler.parameters())
    grad = torch.randn(media.size(0), 1, *resampler.latents.shape, device=media.device).to(media.dtype)

    def run(forward: Forward) -> Any:
        if mode == "forward":
            with torch.no_grad():
                return [forward(resampler, media)]
        return torch.autograd.grad(forward(resampler, media), parameters, grad)

    return {name: lambda forward=forward: run(forward) for name, forward in forwards.items()}


def gate(timed: dict[str, harness.Provider], tolerance: float) -> None:
    """Raises unless all providers agree with the first."""
    (_, first), *others = timed.items()
    expected = first()
    scale = max(float(torch.linalg.vector_norm(x.double())) for x in expected)
    for name, run in others:
        for found, wanted in zip(run(), expected, strict=True):
            error = torch.linalg.vector_norm(found.double() - wanted) / scale
            if not error <= tolerance:
                raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for count, media_tokens, size in SHAPES[options.device][: 1 if options.quick else None]:
        for dtype in DTYPES[options.device]:
            torch.manual_seed(0)
            resampler = PerceiverResampler(size).to(options.device, dtype)
            media = torch.randn(count, 1, media_tokens, size, device=options.device).to(dtype)
            for mode in ("forward", "both"):
                timed = providers(resampler, media, mode)
                gate(timed, 1e-4 if dtype == torch.float32 else 5e-2)
                rounds = options.rounds * (1 if count * media_tokens > 1024 else 3)
                case = f"{mode} {count}x{media_tokens}x{size} {str(dtype).removeprefix('torch.')}"
                for name, timing in harness.measure(timed, options.device, rounds).items():
                    rows.append({"case": case, "provider": name, **timing})
    harness.report("perceiver_resampler", rows, options)


if __name__ == "__main__":
    main()
