"""nn.QFormer against transformers' Blip2QFormerModel, eager and with SDPA, in the size of BLIP-2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from mmfast.benchmarks import harness
from mmfast.nn import QFormer

# B, N: images of 257 states of EVA ViT-g; 32 queries, 12 layers of width 768.
SHAPES = {"cpu": [(4, 257), (1, 257), (1, 32)], "cuda": [(64, 257), (8, 257), (1, 257)]}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
QUERIES = 32


def models(dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The same weights thrice; without dropout, which draws other numbers in each."""
    found: dict[str, nn.Module] = {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = Blip2QFormerConfig(use_qformer_text_input=False, attn_implementation=attention)
        found[attention] = Blip2QFormerModel(config).to(device, dtype).eval()
    return found | {"QFormer": QFormer.from_transformers(found["eager"])}


def providers(timed: dict[str, nn.Module], queries: Tensor, states: Tensor, mode: str) -> dict[str, harness.Provider]:
    """What is timed: `mode` is "forward" or "both"; the states are frozen, as features of an encoder are."""
    batched = queries.expand(states.size(0), -1, -1)
    grad = torch.randn(batched.shape, device=states.device).to(states.dtype)
    names = sorted(dict(timed["QFormer"].named_parameters()))

    def run(model: nn.Module) -> list[Tensor]:
        ours = isinstance(model, QFormer)
        with torch.set_grad_enabled(mode == "both"):
            out = model(queries, states) if ours else model(batched, encoder_hidden_states=states).last_hidden_state
        if mode == "forward":
            return [out]
        parameters = dict(model.named_parameters())
        return list(torch.autograd.grad(out, [queries, *(parameters[name] for name in names)], grad))

    return {name: lambda model=model: run(model) for name, model in timed.items()}


def main() -> None:
    options = harness.arguments(__doc__)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES[options.device]:
        timed_models = models(dtype, options.device)
        for batch, length in SHAPES[options.device][: 1 if options.quick else None]:
            queries = torch.randn(1, QUERIES, 768, device=options.device).to(dtype).requires_grad_()
            states = torch.randn(batch, length, 1408, device=options.device).to(dtype)
            for mode in ("forward", "both"):
                timed = providers(timed_models, queries, states, mode)
                case = f"{mode} {batch}x{length} {str(dtype).removeprefix('torch.')}"
                gate(timed, 1e-4 if dtype == torch.float32 else 5e-2, case)
                for name, timing in harness.measure(timed, options.device, options.rounds).items():
                    rows.append({"case": case, "provider": name, **timing})
    harness.report("q_former", rows, options)


def gate(timed: dict[str, harness.Provider], limit: float, what: str) -> None:
    """`harness.gate` on results put together: gradients of keys' biases are zero but for rounding."""
    joint = {name: lambda run=run: [torch.cat([x.flatten() for x in run()])] for name, run in timed.items()}
    harness.gate(joint, limit, what)


if __name__ == "__main__":
    main()
