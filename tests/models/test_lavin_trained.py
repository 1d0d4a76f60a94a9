"""LaVIN's folders: saved and opened, converted from the published layout and back, on 4 bits, in a chat."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmfast.adapt import quantize_checkpoint
from mmfast.generate import ChatSession
from mmfast.generate.batch import answer_batch
from mmfast.models import Lavin, open_model
from mmfast.models.convert import convert
from mmfast.models.export import export
from mmfast.models.lavin_original import original_state
from mmfast.nn import QuantizedLinear

QUESTION = {"id": "q", "messages": [{"role": "user", "content": "what is it?"}]}


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(seed: int | None, text: str = "what is it?") -> Any:
    image = [] if seed is None else [{"type": "image", "image": picture(seed)}]
    turns = [{"role": "user", "content": [*image, {"type": "text", "text": text}]}]
    return {"id": f"sample-{seed}", "messages": turns}


def moved(model: Lavin, amount: float = 0.3) -> Lavin:
    """Every tensor that trains away from its first value."""
    with torch.no_grad():
        for part in ("vision_adapters", "connector", "modality", "adapters"):
            for parameter in model.part_parameters(part).values():
                parameter.add_(torch.randn_like(parameter), alpha=amount)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    encoded = [model.processor.encode(sample(seed), add_generation_prompt=True) for seed in (3, None)]
    batch = model.processor.collate(encoded)
    del batch["labels"]
    return model(**batch).logits


def test_save_and_open(llm: Path, encoder: Path, tmp_path: Path) -> None:
    settings = {"vision_blocks": [1, 3], "temperature": 2.0, "bottleneck_size": 4, "connector_size": 6, "dropout": 0.2}
    model = moved(Lavin.from_parts(llm, encoder, vision_routing="first_image", **settings))
    model.processor.max_length = 99
    model.save_trained(tmp_path / "model")
    opened = open_model(tmp_path)
    assert isinstance(opened, Lavin)
    assert torch.equal(logits(opened), logits(model))
    assert opened.describe() == model.describe()
    assert opened.processor.max_length == 99
    assert {name: getattr(opened.config, name) for name in settings} == settings
    assert opened.vision_adapters[0].dropout == 0.2
    with pytest.raises(ValueError, match="holds a model of the system 'lavin'; 'llava' is accepted"):
        open_model_as_llava(tmp_path / "model")


def open_model_as_llava(folder: Path) -> None:
    from mmfast.models import Llava

    Llava.from_pretrained(folder)


def test_another_size_is_refused_before_it_is_opened(
    llm: Path, encoder: Path, write_llm: Callable[..., Path], write_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    Lavin.from_parts(llm, encoder).save_trained(tmp_path)
    with pytest.raises(ValueError, match="projector is for 48, your language model is 64"):
        open_model(tmp_path, llm=write_llm(hidden_size=64))
    with pytest.raises(ValueError, match="projector reads features 32 wide, your encoder gives 64"):
        open_model(tmp_path, encoder=write_encoder(hidden_size=64))
    with pytest.raises(ValueError, match=r"6 missing: adapters\.2\.down_weight"):
        open_model(tmp_path, llm=write_llm(num_hidden_layers=3))


def test_images_are_squeezed_and_normalised(llm: Path, encoder: Path, tmp_path: Path) -> None:
    processor: Any = Lavin.from_parts(llm, encoder).processor
    image = picture(1, (30, 50))
    (pixels,) = processor.encode(sample(1), add_generation_prompt=True).media
    assert pixels.shape == (3, 16, 16)
    part: Any = {"type": "image", "image": image}
    pixels = processor.read_media(part, None, "a")
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=1e-5)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    assert torch.equal(again.read_media(part, None, "a"), pixels)


def test_tokens_of_samples_with_and_without_image(llm: Path, encoder: Path) -> None:
    processor: Any = Lavin.from_parts(llm, encoder).processor
    for seed, expected in (
        (1, "Image: ###Instruction: who?\nResponse:"),
        (None, "Image: N/A Instruction: who?\nResponse:"),
    ):
        ids = processor.encode(sample(seed, "who?"), add_generation_prompt=True).input_ids
        text = "".join("#" if i == processor.image_token_id else processor.tokenizer.decode([i]) for i in ids)
        assert text == expected


def test_answers_do_not_depend_on_the_batch(llm: Path, encoder: Path) -> None:
    model = moved(Lavin.from_parts(llm, encoder))
    samples = [sample(seed, text) for seed, text in ((1, "who?"), (None, "where is it?"), (2, "a"), (3, "who?"))]
    together = answer_batch(model, samples, batch_size=4, max_new_tokens=6)
    assert together == answer_batch(model, samples, batch_size=1, max_new_tokens=6)
    session = ChatSession(model, max_new_tokens=6)
    assert session.send("who?", [picture(1)]) == together[0]


def test_on_four_bits(tiny_llm: Path, tiny_clip: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_llm, tmp_path / "llm")
    model = moved(Lavin.from_parts(tmp_path / "llm", tiny_clip), 0.1)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 2 * 7
    model.set_stage(model.stages()["instruct"])
    encoded = [model.processor.encode({**sample(seed), **answered(seed)}) for seed in (1, None)]
    model.train()(**model.processor.collate(encoded)).loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.eval().save_trained(tmp_path / "run")
    assert torch.equal(logits(open_model(tmp_path / "run")), logits(model))
    with pytest.raises(TypeError, match=r"the layer is a QuantizedLinear; .*merge or dequantise it first"):
        model.fold("text")
    assert torch.equal(logits(open_model(tmp_path / "run")), logits(model))


def answered(seed: int | None) -> Any:
    turns = sample(seed)["messages"]
    return {"messages": [*turns, {"role": "assistant", "content": "a cat"}]}


# ---- the published layout


def published_shapes(
    layers: int, hidden: int, blocks: int, vision: int, inner: int = 128
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint, from lavin/mm_adapter.py:19-33 and lavin/model.py:198-220, 254-255."""
    shapes: dict[str, tuple[int, ...]] = {
        "adapter_proj.conv_A.weight": (inner, vision),
        "adapter_proj.conv_A.bias": (inner,),
        "adapter_proj.conv_B.weight": (hidden, inner),
        "adapter_proj.conv_B.bias": (hidden,),
        "adapter_modality_embedding.weight": (2, hidden),
    }
    prefixes = [(f"layers.{i}.", hidden) for i in range(layers)]
    prefixes += [(f"backbone.visual.transformer.resblocks.{i}.", vision) for i in range(blocks)]
    for prefix, width in prefixes:
        shapes |= {
            f"{prefix}adapter_attn.conv_A.weight": (8, width, 1),
            f"{prefix}adapter_attn.conv_A.bias": (8,),
            f"{prefix}adapter_attn.conv_B.weight": (width, 4, 1),
            f"{prefix}adapter_attn.conv_B.bias": (width,),
            f"{prefix}adapter_attn.conv_D.weight": (width, 4, 1),
            f"{prefix}adapter_attn.conv_D.bias": (width,),
            f"{prefix}adapter_attn.expert_weights.weight": (2, width),
            f"{prefix}adapter_attn.expert_weights.bias": (2,),
        }
    return shapes


@pytest.mark.parametrize(("size", "layers", "hidden", "count"), [("7b", 32, 4096, 453), ("13b", 40, 5120, 517)])
def test_names_and_shapes_are_the_published_ones(size: str, layers: int, hidden: int, count: int) -> None:
    model = Lavin.skeleton(f"huggyllama/llama-{size}", "openai/clip-vit-large-patch14")
    tensors, names = original_state(model)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == published_shapes(layers, hidden, 24, 1024)
    assert len(tensors) == count
    assert set(names) == set(model.trained_state())


@pytest.fixture(scope="module")
def bases(write_llm: Callable[..., Path], write_encoder: Callable[..., Path]) -> tuple[Path, Path]:
    """As many layers as the 7B and CLIP's ViT-L have."""
    return write_llm(num_hidden_layers=32), write_encoder(num_hidden_layers=24)


def write(path: Path, prefix: str = "module.", arguments: Any = None, **shapes: Any) -> dict[str, Tensor]:
    """A checkpoint as training writes it, in float16 as evaluation does."""
    tensors = {
        name: torch.randn(shape).mul(0.1).half()
        for name, shape in published_shapes(
            **{"layers": 32, "hidden": 48, "blocks": 24, "vision": 32, **shapes}
        ).items()
    }
    content = {"model": {prefix + name: tensor for name, tensor in tensors.items()}, "epoch": 19, "scaler": None}
    content["optimizer"] = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    if arguments:
        content["args"] = argparse.Namespace(**arguments)
    torch.save(content, path)
    return tensors


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_round_trip_is_bit_exact(prefix: str, bases: tuple[Path, Path], tmp_path: Path) -> None:
    llm, encoder = map(str, bases)
    tensors = write(tmp_path / "checkpoint-19.pth", prefix, {"temperature": 5.0, "adapter_scale": 1.0})
    names = convert(str(tmp_path / "checkpoint-19.pth"), str(tmp_path / "run"), llm, encoder, system="lavin")
    assert names["adapters.31.up_bias"] == "layers.31.adapter_attn.conv_B.bias, conv_D.bias"
    description = json.loads((tmp_path / "run" / "mmfast.json").read_text())
    assert (description["temperature"], description["vision_routing"]) == (5.0, "first_image")
    model = Lavin.from_pretrained(tmp_path / "run")
    assert logits(model).isfinite().all()
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to="original") == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["checkpoint-0.pth"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        back = torch.load(tmp_path / "out" / "checkpoint-0.pth", weights_only=True)
    assert back["args"].temperature == 5.0
    assert back["args"].n_prompt == 6
    assert back["model"].keys() == tensors.keys()
    assert all(torch.equal(back["model"][name], tensor.float()) for name, tensor in tensors.items())


def test_temperature_without_arguments_is_the_published_one(bases: tuple[Path, Path], tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-19.pth")
    model, _ = Lavin.from_original(tmp_path, *bases)
    assert model.config.temperature == 10.0
    assert model.processor.template.name == "lavin"


def refused(bases: tuple[Path, Path], path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lavin.from_original(path, *bases)


def test_other_checkpoints_are_refused(bases: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-19.pth"
    with pytest.raises(FileNotFoundError, match="is a folder with 0 files"):
        Lavin.from_original(tmp_path, *bases)
    torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, path)
    refused(bases, path, r"adapters for 0 layers as layers\.<i>\.adapter_attn.*is it a checkpoint of LaVIN\?")
    path.write_bytes(b"no checkpoint")
    refused(bases, path, "is not a file of tensors and plain values")
    write(path, hidden=64)
    refused(bases, path, "projector is for 64, your language model is 48")
    write(path, layers=40)
    refused(bases, path, r"48 unexpected: adapters\.32\.down_weight")
    write(path, arguments={"adapter_scale": 0.5})
    refused(bases, path, "adapter_scale 0.5; 1 is accepted")
    write(path)
    content = torch.load(path, weights_only=True)
    tensors = content["model"]
    for change, message in (
        ({"module.layers.3.adapter_attn.conv_D.bias": None}, r"layers\.3\..*missing \['conv_D.bias'\]"),
        ({"module.adapter_proj.conv_A.bias": None}, r"lacks \['adapter_proj.conv_A.bias'\] and has \[\]"),
        ({"module.gate": torch.zeros(1)}, r"lacks \[\] and has \['gate'\]"),
        (
            {"module.layers.3.adapter_attn.conv_A.weight": torch.zeros(8, 47, 1)},
            r"layers\.3\..*conv_B.weight is \[48, 4, 1\]",
        ),
    ):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        torch.save({**content, "model": changed}, path)
        refused(bases, path, message)


def test_a_wrong_setting_is_refused(llm: Path, encoder: Path) -> None:
    with pytest.raises(TypeError, match=r"there is no setting \['temprature'\]; vision_blocks, vision_routing"):
        Lavin.from_parts(llm, encoder, temprature=5.0)


def test_what_the_layout_cannot_hold(llm: Path, encoder: Path, tmp_path: Path) -> None:
    model = Lavin.from_parts(llm, encoder, vision_blocks=[3])
    with pytest.raises(ValueError, match=r"takes blocks \[3\]; .* of the blocks \[1, 2, 3\]"):
        model.to_original(tmp_path)
    model = Lavin.from_parts(llm, encoder)
    model.trained_parts.add("language_model")
    with pytest.raises(ValueError, match="also trained language_model"):
        model.to_original(tmp_path)
