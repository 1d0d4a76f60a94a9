"""nn.QFormer against transformers' Blip2QFormerModel, eager and with SDPA, in the size of BLIP-2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.benchmarks import harness
from mmfast.nn import QFormer

# B, N: images of 257 states of EVA ViT-g; 32 queries, 12 layers of width 768.
SHAPES = {"cpu": [(1, 257), (4, 257), (1, 32)], "cuda": [(64, 257), (1, 257), (8, 257)]}
DTYPES = {"cpu": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16,)}
QUERIES, LAYERS, SIZE, STATES = 32, 12, 768, 1408


def arguments(shape: tuple[int, int], dtype: torch.dtype, device: str) -> list[Any]:
    """Three models that share their parameters, queries to train, and states, which are frozen."""
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    models: list[nn.Module] = []
    for attention in ("eager", "sdpa"):
        config = Blip2QFormerConfig(use_qformer_text_input=False, attn_implementation=attention)
        # Without dropout, which draws other numbers in each.
        models.append(Blip2QFormerModel(config).to(device, dtype).eval())
    models.append(QFormer.from_transformers(models[0]))
    weights = models[0].state_dict(keep_vars=True)
    for model in models[1:]:
        names = model.state_dict()
        model.load_state_dict({name: weights[name] for name in names}, assign=True)
    queries = torch.randn(1, QUERIES, SIZE, device=device).to(dtype).requires_grad_()
    return [*models, queries, torch.randn(*shape, STATES, device=device).to(dtype)]


def theirs(which: int, *given: Any) -> Tensor:
    *models, queries, states = given
    batched = queries.expand(states.size(0), -1, -1)
    result: Tensor = models[which](batched, encoder_hidden_states=states).last_hidden_state
    return result


PROVIDERS = {
    "eager (transformers)": partial(theirs, 0),
    "transformers with SDPA": partial(theirs, 1),
    "mmfast": lambda eager, sdpa, ours, queries, states: ours(queries, states),
}


def flops(batch: int, states: int, mode: str) -> int:
    """Self-attention and feed-forward in every layer, cross-attention in every other; states are frozen."""
    of_states = LAYERS // 2 * 4 * states * STATES * SIZE
    crossing = LAYERS // 2 * (4 * QUERIES * SIZE * SIZE + 4 * QUERIES * states * SIZE)
    rest = crossing + LAYERS * (24 * QUERIES * SIZE * SIZE + 4 * QUERIES * QUERIES * SIZE)
    return batch * {"forward": of_states + rest, "both": 2 * of_states + 3 * rest}[mode]


def cases(device: str, quick: bool) -> Iterator[harness.Case]:
    for index, shape in enumerate(harness.chosen(SHAPES, device, quick)):
        for dtype in DTYPES[device][: 1 if index or quick else None]:
            weights = LAYERS * 12 * SIZE * SIZE + LAYERS // 2 * (2 * SIZE + 2 * STATES) * SIZE
            for mode in harness.modes():
                passes = 3 if mode == "both" else 1
                yield harness.Case(
                    op="q_former",
                    name=f"{shape[0]}x{shape[1]} {harness.kind_of(dtype)}",
                    mode=mode,
                    arguments=partial(arguments, shape, dtype, device),
                    providers=PROVIDERS,
                    limit=1e-4 if dtype == torch.float32 else 5e-2,
                    bytes=(passes * weights + min(passes, 2) * shape[0] * shape[1] * STATES) * dtype.itemsize,
                    flops=flops(*shape, mode),
                    dtype=dtype,
                    # Gradients of keys' biases are zero but for rounding.
                    jointly=True,
                    device=device,
                )
