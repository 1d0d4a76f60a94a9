"""Nothing below the lowest trained parameter keeps a graph: neither the encoder nor the layers below adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmfast.data import Sample
from mmfast.models import LoraSpec, get_system
from mmfast.models.base import MultimodalModel

DEPTH = 3


@pytest.fixture
def open_system(write_llm: Callable[..., Path], write_encoder: Callable[..., Path]) -> Callable[..., MultimodalModel]:
    llm, encoder = write_llm(num_hidden_layers=DEPTH), write_encoder(image_size=16, patch_size=4)

    def open_one(system: str, **settings: Any) -> MultimodalModel:
        torch.manual_seed(0)
        return get_system(system).from_parts(llm, encoder, **settings).train()

    return open_one


def batch_of(model: Any, images: bool) -> dict[str, torch.Tensor]:
    content: list[Any] = [{"type": "text", "text": "what?"}]
    if images:
        content.insert(0, {"type": "image", "image": Image.linear_gradient("L").convert("RGB")})
    answer = {"role": "assistant", "content": "it"}
    sample: Sample = {"id": "a", "messages": [{"role": "user", "content": content}, answer]}
    return model.processor.collate([model.processor.encode(sample)])


@contextmanager
def graphs(model: Any) -> Iterator[dict[str, list[bool]]]:
    """Whether what each layer of the encoder and of the language model gives has a graph."""
    found: dict[str, list[bool]] = {"encoder": [], "language_model": []}

    def watch(part: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            found[part].append((output[0] if isinstance(output, tuple) else output).requires_grad)

        return hook

    encoder_layers = next(module for module in model.encoder.modules() if isinstance(module, nn.ModuleList))
    layers = {"encoder": encoder_layers, "language_model": model.get_decoder().layers}
    hooks = [layer.register_forward_hook(watch(part)) for part, of_part in layers.items() for layer in of_part]
    yield found
    for hook in hooks:
        hook.remove()


def run(model: Any, images: bool = True) -> tuple[dict[str, list[bool]], set[str]]:
    """Where graphs are in a forward, and which tensors get a gradient."""
    with graphs(model) as found:
        model(**batch_of(model, images)).loss.backward()
    return found, {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("stage", ["instruct", "instruct_images"])
def test_prompts_in_the_upper_layers(
    stage: str, images: bool, checkpointing: bool, open_system: Callable[..., MultimodalModel]
) -> None:
    model = open_system("llama_adapter", version="v1", prompt_layers=1, visual_width=8)
    model.set_stage(model.stages()[stage])
    if checkpointing:
        model.gradient_checkpointing_enable()
    found, trained = run(model, images)
    # Recomputed, a layer runs once more.
    assert found["language_model"][:DEPTH] == [False, False, True]
    assert not any(found["encoder"])
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("base_dtype", [None, "nf4"])
@pytest.mark.parametrize("images", [True, False])
def test_lora_in_the_upper_layers(
    images: bool, base_dtype: str | None, open_system: Callable[..., MultimodalModel]
) -> None:
    model: Any = open_system("llava", base_dtype=base_dtype)
    model.add_lora(LoraSpec(rank=2, alpha=4))
    model.requires_grad_(False)
    upper = {name: p for name, p in model.part_parameters("lora").items() if f"layers.{DEPTH - 1}." in name}
    for parameter in upper.values():
        parameter.requires_grad_(True)
    found, trained = run(model, images)
    assert found == {"encoder": [False] * len(found["encoder"]), "language_model": [False, False, True]}
    assert trained == upper.keys()


@pytest.mark.parametrize(
    ("system", "stage", "settings"),
    [
        ("llava", "align", {}),
        ("minigpt4", "pretrain", {"connector": "four_patches"}),
        ("minigpt4", "pretrain", {"q_former_sizes": {"hidden_size": 32, "num_layers": 2, "num_heads": 2}}),
    ],
)
def test_the_connector_alone(
    system: str, stage: str, settings: dict[str, Any], open_system: Callable[..., MultimodalModel]
) -> None:
    model: Any = open_system(system, **settings)
    model.set_stage(model.stages()[stage])
    assert not model.frozen_features(batch_of(model, True)["pixel_values"]).requires_grad
    found, trained = run(model)
    assert found["language_model"] == [True] * DEPTH
    assert found["encoder"]
    assert not any(found["encoder"])
    assert trained == set(model.part_parameters("connector"))


@pytest.mark.parametrize("output", ["loss", "logits"])
def test_text_alone_gives_the_connector_zeros_without_a_graph(
    output: str, open_system: Callable[..., MultimodalModel]
) -> None:
    """A gradient all the same: processes that train together agree on which parameters have one."""
    model: Any = open_system("llava")
    model.set_stage(model.stages()["align"])
    batch = batch_of(model, False)
    if output == "logits":
        del batch["labels"]
    with graphs(model) as found:
        model(**batch)[output].sum().backward()
    assert found["language_model"] == [False] * DEPTH
    gradients = [parameter.grad for parameter in model.part_parameters("connector").values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
