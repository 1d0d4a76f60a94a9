"""spatio_temporal_pool against plain PyTorch, torch.compile and the numpy code of Video-ChatGPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.benchmarks import harness
from mmfast.ops import spatio_temporal_pool
from mmfast.ops.backends import machine
from mmfast.ops.spatio_temporal_pool import OP, check, reference

# B, T, N, D: clips of Video-ChatGPT (CLIP ViT-L/14, 100 frames of 256 patches), shorter ones, and very small ones.
SHAPES = {
    "cpu": [(2, 100, 256, 1024), (1, 16, 256, 1024), (1, 8, 256, 1024), (1, 8, 64, 256), (1, 8, 16, 64), (1, 2, 4, 8)],
    "cuda": [(32, 100, 256, 1024), (8, 100, 256, 1024), (1, 100, 256, 1024), (8, 8, 576, 1024), (1, 8, 64, 256)],
}
DTYPES = {"cpu": (torch.bfloat16, torch.float32, torch.float16), "cuda": (torch.bfloat16, torch.float32)}


def two_means(features: Tensor) -> Tensor:
    """What one writes without thinking: two passes over the features."""
    return torch.cat([features.mean(2), features.mean(1)], 1)


def numpy_means(features: Tensor) -> Tensor:
    """As Video-ChatGPT stores its training features: fp16 arrays, one clip at a time."""
    clips = [np.concatenate([np.mean(clip, 1), np.mean(clip, 0)]) for clip in features.numpy()]
    return torch.from_numpy(np.stack(clips))


def implementations(features: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The reference first: ratios are against it. `auto` is what a call without `backend` runs."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"reference": reference, "two torch.mean": two_means}
    try:
        compiled = torch.compile(two_means, dynamic=False)
        compiled(features)
        found["torch.compile"] = compiled
    except Exception as error:  # no C++ compiler, or no Triton: the row is left out, and said so
        print(f"torch.compile does not work here: {type(error).__name__}")
    call, on = check(features), machine(features.device)
    for backend in OP.backends[:-1]:
        # The interpreter proves kernels, it does not time them.
        if backend.refusal(call, on, by_name=True) is None and not (on.triton_interpreted and backend.name == "triton"):
            found[backend.name] = lambda x, name=backend.name: spatio_temporal_pool(x, backend=name)
    found["auto"] = spatio_temporal_pool
    return found


def providers(features: Tensor, mode: str) -> dict[str, harness.Provider]:
    """What is timed: `mode` is "forward", "backward" or "both"."""
    timed: dict[str, harness.Provider] = {}
    if mode == "forward":
        for name, pool in implementations(features).items():
            timed[name] = lambda pool=pool: pool(features)
        if features.dtype == torch.float16 and features.device.type == "cpu":
            timed["numpy fp16"] = lambda: numpy_means(features)
        timed["copy of the features"] = features.clone
        return timed
    features = features.detach().requires_grad_()
    grad = torch.randn_like(reference(features.detach()))
    for name, pool in implementations(features).items():
        if mode == "backward":
            output = pool(features)
            timed[name] = lambda out=output: torch.autograd.grad(out, features, grad, retain_graph=True)[0]
        else:
            timed[name] = lambda pool=pool: torch.autograd.grad(pool(features), features, grad)[0]
    return timed


def gate(timed: dict[str, harness.Provider], tolerance: float) -> None:
    """Raises unless all providers agree with the first."""
    (_, first), *others = timed.items()
    expected = first().double()
    for name, run in others:
        if name != "copy of the features":
            error = torch.linalg.vector_norm(run().double() - expected) / torch.linalg.vector_norm(expected)
            if not error <= tolerance:
                raise AssertionError(f"{name}: relative error {error:.2e}, allowed {tolerance:.2e}")


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    shapes = SHAPES[options.device][: 1 if options.quick else None]
    for shape in shapes:
        for dtype in DTYPES[options.device]:
            features = torch.randn(shape, device=options.device).to(dtype)
            for mode in ("forward", "backward", "both"):
                timed = providers(features, mode)
                gate(timed, 1e-5 if dtype == torch.float32 else 1e-2)
                rounds = options.rounds * (1 if features.numel() > 1 << 20 else 20)
                case = f"{mode} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
                for name, timing in harness.measure(timed, options.device, rounds).items():
                    rows.append({"case": case, "provider": name, **timing})
    harness.report("spatio_temporal_pool", rows, options)


if __name__ == "__main__":
    main()
