"""Small language models, batches and a training step: what the tests of `mmfast.optimize` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def make(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**{**SIZES, **options})).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model.train()


def tokens(seed: int = 0, batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def labelled() -> dict[str, Tensor]:
    """A padded batch in which some tokens are not supervised."""
    ids, mask = tokens(), torch.ones(3, 11, dtype=torch.long)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each gradient within a tolerance relative to its norm."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def watch(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of what a projection is called with from now on, without a hook."""
    shapes: list[tuple[int, ...]] = []
    plain: Any = type(module)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return plain.forward(self, x, *args, **kwargs)

    module.__class__ = type(plain.__name__, (plain,), {"forward": forward})
    return shapes
