"""MiniGPT-4 and MiniGPT-v2: features, what trains, dropout of a frozen Q-Former, saving, batches, chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import Blip2VisionConfig

from mmfast.connectors import VisualQFormer, write_q_former
from mmfast.encoders import EvaEncoder
from mmfast.generate import ChatSession, answer_batch
from mmfast.models import MiniGPT4, MiniGPT4Config, Stage, open_model

SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 20}
SETTINGS: dict[str, Any] = {"num_queries": 3, "q_former_sizes": SIZES, "template": "minigpt4"}


def randomize(module: torch.nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.eval()


@pytest.fixture(scope="module")
def eva(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tower of BLIP-2, of 4 x 4 patches, and its image processor."""
    folder = tmp_path_factory.mktemp("eva")
    torch.manual_seed(0)
    config = Blip2VisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    randomize(EvaEncoder.from_config(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def q_former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a pretrained Q-Former in LAVIS's layout."""
    path = tmp_path_factory.mktemp("q_former") / "blip2.pth"
    torch.manual_seed(1)
    write_q_former(randomize(VisualQFormer(24, 3, **SIZES)).state_dict(), path)
    return path


@pytest.fixture
def model(llm: Path, eva: Path, q_former: Path) -> MiniGPT4:
    return MiniGPT4.from_parts(llm, eva, q_former=q_former, **SETTINGS)


@pytest.fixture
def merging(llm: Path, eva: Path) -> MiniGPT4:
    """The variant without a Q-Former, on images of twice the size."""
    return MiniGPT4.from_parts(llm, eva, "four_patches", image_size=32, template="minigpt_v2")


def picture(seed: int, side: int = 16) -> Image.Image:
    return Image.linear_gradient("L").rotate(70 * seed).resize((side, side)).convert("RGB")


def sample(name: str, question: str, answer: str | None, *images: Image.Image) -> Any:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    messages: list[Any] = [{"role": "user", "content": content}]
    return {"id": name, "messages": messages + ([{"role": "assistant", "content": answer}] if answer else [])}


def batch(model: MiniGPT4) -> dict[str, torch.Tensor]:
    processor: Any = model.processor
    samples = [
        sample("a", "Who?", "Ann.", picture(0)),
        sample("b", "Who is that?", "Bob and Ann.", picture(1), picture(2)),
        sample("c", "No image?", "None."),
    ]
    return processor.collate([processor.encode(item) for item in samples])


def test_features_are_the_linear_map_of_the_queries_that_read_the_image(model: MiniGPT4) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        hidden = model.encoder.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        queries = model.q_former.q_former(model.q_former.query_tokens, model.q_former.ln_vision(hidden))
        expected = F.linear(queries, model.connector.weight, model.connector.bias).flatten(0, 1)
        torch.testing.assert_close(model.media_features(pixels), expected)
    assert model.features_per_medium == 3
    assert hidden.shape == (2, 17, 24)  # the class token is one of what the queries read


def test_features_without_a_q_former_are_the_linear_map_of_four_patches(merging: MiniGPT4) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = F.layer_norm(merging.encoder(pixels)[:, 1:], (24,))
        merged = torch.cat([patches[:, i::4] for i in range(4)], -1)
        expected = F.linear(merged, merging.connector.weight, merging.connector.bias).flatten(0, 1)
        torch.testing.assert_close(merging.media_features(pixels), expected)
    assert merging.features_per_medium == 16
    assert merging.processor.read_media({"type": "image", "image": picture(0, 50)}, None, "a").shape == (3, 32, 32)


def test_a_connector_of_zeros_makes_the_loss_independent_of_the_image(model: MiniGPT4) -> None:
    inputs = batch(model)
    other = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
    assert model(**inputs).loss != model(**other).loss
    torch.nn.init.zeros_(model.connector.weight)
    assert torch.equal(model(**inputs).loss, model(**other).loss)


@pytest.mark.parametrize(("stage", "trained"), [("q_former", {"q_former", "connector"}), ("finetune", {"connector"})])
def test_gradients_of_the_first_step_are_those_of_the_stage(model: MiniGPT4, stage: str, trained: set[str]) -> None:
    model.set_stage(model.stages()[stage])
    model.train()(**batch(model)).loss.backward()
    for name, parameter in model.named_parameters():
        if name.partition(".")[0] in trained:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_gradients_of_lora_and_the_connector_without_a_q_former(merging: MiniGPT4) -> None:
    assert set(merging.stages()) == {"pretrain", "finetune", "finetune_lora"}
    merging.set_stage(merging.stages()["finetune_lora"])
    lora = merging.part_parameters("lora")
    assert {name.split(".")[-2] for name in lora} == {"q_proj", "v_proj"}
    assert {p.shape[0] for name, p in lora.items() if name.endswith("lora_a")} == {64}
    merging.train()(**batch(merging)).loss.backward()
    given = {name for name, p in merging.named_parameters() if p.grad is not None}
    assert given == {*lora, "connector.weight", "connector.bias"}
    assert all(p.grad.any() for name, p in lora.items() if name.endswith("lora_b"))


def test_text_alone_gives_what_trains_a_gradient_of_zeros(model: MiniGPT4) -> None:
    model.set_stage(model.stages()["pretrain"])
    processor: Any = model.processor
    inputs = processor.collate([processor.encode(sample("c", "No image?", "None."))])
    model.train()(**inputs).loss.backward()
    assert model.connector.weight.grad is not None and not model.connector.weight.grad.any()


def test_a_frozen_q_former_drops_nothing_out(model: MiniGPT4) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    model.set_stage(model.stages()["finetune"])
    features = model.train().media_features(pixels)
    assert torch.equal(features, model.media_features(pixels))
    model.set_stage(model.stages()["q_former"])
    assert not torch.equal(model.train().media_features(pixels), model.media_features(pixels))
    assert torch.equal(model.eval().media_features(pixels), features)


def test_labels_are_the_answer_and_its_end_alone(model: MiniGPT4) -> None:
    processor: Any = model.processor
    encoded = processor.encode(sample("a", "Describe this image in detail.", "A dog.", picture(0)))
    learned = [token for token in encoded.labels if token != -100]
    assert processor.tokenizer.decode(learned) == "A dog.###"
    before = "###Human: <Img></Img> Describe this image in detail. ###Assistant: "
    assert len(encoded.input_ids) == len(before) + 3 + len("A dog.###")  # this tokenizer's tokens are characters


def test_padding_changes_nothing(model: MiniGPT4, tiny: Any) -> None:
    inputs, images = batch(model), (1, 2, 0)
    logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
    for index, row in enumerate(tiny.rows_of(inputs, images)):
        alone = model(**{name: x for name, x in row.items() if name != "labels"}).logits[0]
        torch.testing.assert_close(logits[index, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_answers_of_a_batch_and_of_a_chat_are_those_of_one_at_a_time(model: MiniGPT4) -> None:
    samples = [sample(str(i), "Who? " * (i + 1), None, *[picture(i)] * (i % 3)) for i in range(4)]
    alone = [answer_batch(model, [item], 1, 8)[0] for item in samples]
    assert answer_batch(model, samples, 4, 8) == alone
    assert ChatSession(model, max_new_tokens=8).send("Who? Who? ", [picture(1)]) == alone[1]


def test_a_pretrained_q_former_is_named_and_not_saved(model: MiniGPT4, q_former: Path, tmp_path: Path) -> None:
    randomize(model.connector)
    model.save_trained(tmp_path)
    assert load_file(tmp_path / "trained.safetensors").keys() == {"connector.weight", "connector.bias"}
    description = json.loads((tmp_path / "mmfast.json").read_text())
    assert (description["system"], description["q_former"]) == ("minigpt4", str(q_former))
    opened = open_model(tmp_path)
    inputs = batch(model)
    assert isinstance(opened, MiniGPT4)
    assert torch.equal(opened(**inputs).loss, model(**inputs).loss)
    description["q_former"] = str(q_former) + ".gone"
    (tmp_path / "mmfast.json").write_text(json.dumps(description))
    with pytest.raises(FileNotFoundError, match=r"was trained on the q_former .*\.gone', which is not there"):
        open_model(tmp_path)
    moved = MiniGPT4.from_pretrained(tmp_path, q_former=q_former)
    assert torch.equal(moved(**inputs).loss, model(**inputs).loss)
    assert moved.base_names["q_former"] == str(q_former)


def test_a_q_former_of_its_own_is_saved(llm: Path, eva: Path, tmp_path: Path) -> None:
    model = MiniGPT4.from_parts(llm, eva, **SETTINGS).eval()
    randomize(model.q_former)
    model.save_trained(tmp_path)
    opened = open_model(tmp_path)
    inputs = batch(model)
    assert torch.equal(opened(**inputs).loss, model(**inputs).loss)


def test_the_variant_without_a_q_former_comes_back_with_its_lora(merging: MiniGPT4, tmp_path: Path) -> None:
    merging.set_stage(merging.stages()["finetune_lora"])
    with torch.no_grad():
        for parameter in merging.part_parameters("lora").values():
            parameter.normal_(0.0, 0.1)
    merging.eval().save_trained(tmp_path)
    opened = open_model(tmp_path)
    inputs = batch(merging)
    assert opened.config.image_size == opened.encoder.image_size == 32
    assert torch.equal(opened(**inputs).loss, merging(**inputs).loss)


def test_skeleton_counts_a_pretrained_q_former_without_its_file() -> None:
    names = ("Vision-CAIR/vicuna-7b", "Salesforce/blip2-flan-t5-xxl")
    model = MiniGPT4.skeleton(*names, q_former="Salesforce/blip2-flan-t5-xxl")
    counts = {part: sum(p.numel() for p in model.part_parameters(part).values()) for part in model.parts}
    assert counts["q_former"] == 105_137_664 + 24_576 + 2 * 1408
    assert counts["connector"] == 3_149_824
    assert counts["encoder"] == 985_894_528 + 39 * 1408


def test_errors(
    llm: Path, eva: Path, q_former: Path, encoder: Path, write_llm: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="connector is 'linear'; accepted are q_former, four_patches"):
        MiniGPT4.from_parts(llm, eva, "linear")
    with pytest.raises(ValueError, match="'four_patches', which has no Q-Former, but q_former is"):
        MiniGPT4.from_parts(llm, eva, "four_patches", q_former=q_former)
    with pytest.raises(
        ValueError, match=r"the Q-Former in .*blip2\.pth: the tensors do not fit .*query_tokens \(\[1, 3"
    ):
        MiniGPT4.from_parts(llm, eva, q_former=q_former, num_queries=4, q_former_sizes=SIZES)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        MiniGPT4.from_parts(llm, eva, q_former=tmp_path / "nothing.pth", **SETTINGS)
    with pytest.raises(ValueError, match="a CLIP tower for images of 16; that size is accepted"):
        MiniGPT4.from_parts(llm, encoder, image_size=32, **SETTINGS)
    with pytest.raises(ValueError, match="image_size is 30; a multiple of the patch's 4"):
        MiniGPT4.from_parts(llm, eva, image_size=30, **SETTINGS)
    MiniGPT4.from_parts(llm, eva, **SETTINGS).save_trained(tmp_path)
    with pytest.raises(ValueError, match="is for the language model of width 48, yours has 32"):
        MiniGPT4.from_pretrained(tmp_path, llm=write_llm(hidden_size=32))
    with pytest.raises(ValueError, match="is for the encoder of width 24, yours has 32"):
        MiniGPT4.from_pretrained(tmp_path, encoder=encoder)
    with pytest.raises(ValueError, match="trains language_model; accepted are q_former, connector, lora"):
        MiniGPT4.from_parts(llm, eva, **SETTINGS).set_stage(Stage("all", "plain", {"language_model": 1.0}))


def test_config_comes_back_from_its_dict() -> None:
    config = MiniGPT4Config(connector="four_patches", image_size=448, num_queries=7)
    again = MiniGPT4Config.from_dict(config.to_dict())
    assert again.vision_config.model_type == "blip_2_vision_model"
    assert (again.connector, again.image_size, again.vision_config.image_size, again.num_queries) == (
        "four_patches",
        448,
        448,
        7,
    )
