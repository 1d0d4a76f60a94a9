"""High resolution against transformers' LLaVA-NeXT: the same ids, pixels, logits and words, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from mmfast.data import AnyresProcessor, get_template
from mmfast.models import Llava, LlavaConfig, LoraSpec
from mmfast.models.export import export
from mmfast.models.llava_original import read_newline

PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16]]
PATCH = 4
AREA = (16 // PATCH) ** 2
# Questions with the sizes (width, height) of their images; in all, five images of five sizes.
QUESTIONS = (("Which?", [(20, 16), (9, 30)]), ("Why is it so?", []), ("Who", [(40, 41)]), ("What", [(5, 7), (33, 16)]))


def picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    samples = []
    for name, sizes in QUESTIONS:
        content: list[Any] = [{"type": "image", "image": picture(*size)} for size in sizes]
        content.append({"type": "text", "text": name})
        samples.append({"id": name, "messages": [{"role": "user", "content": content}]})
    return samples


@pytest.fixture(scope="module")
def next_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-NeXT as transformers writes it, with the image token inside the vocabulary."""
    folder = tmp_path_factory.mktemp("llava-next")
    config = LlavaNextConfig(
        text_config=tiny.text_config(vocab_size=tiny.vocabulary + 8),
        vision_config=tiny.vision_config(patch_size=PATCH),
        image_token_index=tiny.image_token_id,
        image_seq_length=AREA,
        image_grid_pinpoints=PINPOINTS,
    )
    tiny.randomize(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 16, "width": 16}
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=PINPOINTS
    )
    LlavaNextProcessor(image_processor, tokenizer, PATCH, "default", num_additional_image_tokens=1).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def clip(write_encoder: Callable[..., Path]) -> Path:
    return write_encoder(patch_size=PATCH)


def collated(model: Llava, samples: list[Any], side: Any = "left") -> dict[str, torch.Tensor]:
    processor: Any = model.processor
    processor.template = get_template("short")
    batch = processor.collate([processor.encode(sample, add_generation_prompt=True) for sample in samples], side)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def randomized(model: Llava) -> Llava:
    with torch.no_grad():
        for part in model.trained_parts:
            for parameter in model.part_parameters(part).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def assert_same_model(ours: Llava, theirs: Any, samples: list[Any]) -> None:
    """Logits of a left-padded batch and greedy words, and of each sample alone."""
    rows = ours.get_input_embeddings().weight.shape[0]
    batch = collated(ours, samples)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad():
        expected = theirs(**batch).logits[..., :rows]
        logits = ours(**batch).logits
        real = batch["attention_mask"].bool()
        assert ((logits - expected)[real].norm() / expected[real].norm()).item() < 1e-5
        words = theirs.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        assert torch.equal(ours.generate(**batch, **options), words)
        for row, sample in enumerate(samples):
            single = ours(**collated(ours, [sample])).logits[0]
            assert ((single - logits[row, real[row]]).norm() / single.norm()).item() < 1e-5


def test_opens_what_transformers_wrote(tiny: Any, next_folder: Path, samples: list[Any]) -> None:
    ours = Llava.from_pretrained(next_folder)
    assert isinstance(ours.processor, AnyresProcessor)
    assert ours.config.image_grid_pinpoints == PINPOINTS
    assert ours.image_newline is not None and ours.image_newline.dtype == torch.float32
    theirs = LlavaNextForConditionalGeneration.from_pretrained(next_folder).eval()
    assert torch.equal(ours.image_newline, theirs.model.image_newline)
    assert_same_model(ours, theirs, samples)


def test_processor_is_transformers(tiny: Any, next_folder: Path, samples: list[Any]) -> None:
    theirs = AutoProcessor.from_pretrained(next_folder)
    ours = Llava.from_pretrained(next_folder)
    batch = collated(ours, samples, "right")
    texts, images = [], []
    for sample in samples:
        *pictures, question = sample["messages"][0]["content"]
        images += [picture["image"] for picture in pictures]
        separator = "\n" if pictures else ""
        texts.append(f"USER: {'<image>' * len(pictures)}{separator}{question['text']} ASSISTANT:")
    inputs = theirs(images=images, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], inputs["input_ids"])
    assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
    assert torch.equal(batch["image_sizes"], inputs["image_sizes"])
    views = [ours.anyres.num_views(size) for size in batch["image_sizes"].tolist()]  # type: ignore[union-attr]
    assert len(set(views)) > 1
    expected = torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], views, strict=True)])
    assert torch.equal(batch["pixel_values"], expected)


def test_opens_the_published_layout(next_folder: Path, samples: list[Any], tmp_path: Path) -> None:
    """Names and files of llava-hf/llava-v1.6-*: the tower's inner prefix, settings that later releases dropped."""
    for path in next_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    inner = "vision_tower.vision_model."
    published = {
        name if inner in name else name.replace("vision_tower.", inner): tensor for name, tensor in state.items()
    }
    expected = {"image_newline", f"{inner}embeddings.class_embedding", "language_model.model.embed_tokens.weight"}
    assert expected | {"language_model.lm_head.weight", "multi_modal_projector.linear_2.bias"} <= set(published)
    save_file(published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_image_newline_parameter": True}))
    (tmp_path / "processor_config.json").unlink()
    image_processor = {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": 16, "width": 16},
        "do_pad": True,
        "image_grid_pinpoints": PINPOINTS,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": 16},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor))
    ours, again = (Llava.from_pretrained(folder) for folder in (next_folder, tmp_path))
    before, after = collated(ours, samples), collated(again, samples)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        assert torch.equal(again(**after).logits, ours(**before).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_writes_what_transformers_opens(
    write_llm: Callable[..., Path], clip: Path, samples: list[Any], tmp_path: Path, family: str
) -> None:
    ours = Llava.from_parts(write_llm(family), clip, image_grid_pinpoints=PINPOINTS)
    ours.add_lora(LoraSpec(rank=2, alpha=4))
    randomized(ours).eval()
    ours.save_pretrained(tmp_path)
    theirs, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(ours, theirs.eval(), samples)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), LlavaNextProcessor)
    alone = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert alone["image_processor_type"].startswith("LlavaNext") and alone["image_grid_pinpoints"] == PINPOINTS
    again = Llava.from_pretrained(tmp_path)
    assert_same_model(again, theirs, samples)
    before, after = collated(ours, samples), collated(again, samples)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_round_trip_changes_no_weight(next_folder: Path, tmp_path: Path) -> None:
    Llava.from_pretrained(next_folder).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (next_folder, tmp_path))
    assert "image_newline" in {name.rpartition(".")[2] for name in before}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    configs = [LlavaNextConfig.from_pretrained(folder).to_dict() for folder in (next_folder, tmp_path)]
    for config in configs:
        config["text_config"].pop("dtype")
        config["vision_config"].pop("dtype")
    assert configs[0] == configs[1]


def test_trained_model_opens_again(llm: Path, clip: Path, samples: list[Any], tmp_path: Path) -> None:
    model = randomized(Llava.from_parts(llm, clip, image_grid_pinpoints=PINPOINTS, unpad_rounding="original")).eval()
    assert set(model.trained_state()) == {
        "image_newline",
        *(f"connector.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")),
    }
    model.processor.max_length = 200  # type: ignore[union-attr]
    model.save_trained(tmp_path)
    opened = Llava.from_pretrained(tmp_path)
    assert opened.anyres == model.anyres and opened.processor.anyres == model.anyres  # type: ignore[union-attr]
    assert opened.processor.max_length == 200  # type: ignore[union-attr]
    batch = collated(model, samples)
    with torch.no_grad():
        assert torch.equal(opened(**batch).logits, model(**batch).logits)


def test_trains_on_top_of_a_transformers_folder(next_folder: Path, samples: list[Any], tmp_path: Path) -> None:
    model = Llava.from_pretrained(next_folder)
    model.set_stage(replace(model.stages()["instruct_lora"], lora=LoraSpec(rank=2, alpha=4)))
    randomized(model).eval().save_trained(tmp_path)
    batch = collated(model, samples)
    with torch.no_grad():
        assert torch.equal(Llava.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("images", [True, False])
def test_gradients_of_the_newline(llm: Path, clip: Path, samples: list[Any], images: bool) -> None:
    """In the embeddings it is the sum over all row ends; a batch of text alone gives zero in the end, not None."""
    model = Llava.from_parts(llm, clip, image_grid_pinpoints=PINPOINTS)
    model.set_stage(model.stages()["align"])
    newline: Any = model.image_newline
    assert newline.requires_grad and not any(p.requires_grad for p in model.language_model.parameters())
    batch = collated(model, samples if images else samples[1:2], "right")
    embeds = model.embed(**{name: batch[name] for name in batch if name != "attention_mask"})
    assert embeds.requires_grad == images
    (embeds if images else model(**batch).logits).sum().backward()
    rows = 0.0
    for width, height in (size for _, sizes in QUESTIONS for size in sizes) if images else ():
        index = model.anyres.feature_index([(height, width)])  # type: ignore[union-attr]
        rows += (index == AREA * model.anyres.num_views((height, width))).sum()  # type: ignore[union-attr]
    torch.testing.assert_close(newline.grad, torch.full_like(newline, float(rows)))
    assert (rows > 0) == images


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_other_merges_have_no_newline(llm: Path, clip: Path, samples: list[Any], tmp_path: Path, merge: str) -> None:
    model = Llava.from_parts(llm, clip, image_grid_pinpoints=PINPOINTS, patch_merge=merge).eval()
    assert model.image_newline is None
    batch = collated(model, samples)
    assert (batch["input_ids"] == model.config.image_token_id).sum() == AREA * len(batch["pixel_values"])
    with torch.no_grad():
        features = model.media_features(batch["pixel_values"], batch["image_sizes"])
        views = model.connector(model.encoder(batch["pixel_values"])).flatten(0, 1)
    torch.testing.assert_close(features.sort(0).values, views.sort(0).values)
    assert torch.equal(features, views) == (merge == "flat")
    with pytest.raises(ValueError, match=f"patch_merge is '{merge}' .* has only 'spatial_unpad'"):
        model.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_refuses_views_that_do_not_fit_the_sizes(llm: Path, clip: Path, samples: list[Any]) -> None:
    model = Llava.from_parts(llm, clip, image_grid_pinpoints=PINPOINTS)
    batch = collated(model, samples)
    with pytest.raises(ValueError, match=r"shape \[\d+, 3, 16, 16\] but image_sizes makes 0 views"):
        model(**{**batch, "image_sizes": None})
    with pytest.raises(ValueError, match="image_sizes makes"):
        model(**{**batch, "pixel_values": batch["pixel_values"][1:]})
    with pytest.raises(ValueError, match="image tokens"):
        model(**{**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 104, 5)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_grid_pinpoints": [[16, 33]]}, r"image_grid_pinpoints has \[16, 33\]; .* the tile's 16 pixels"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is empty"),
        ({"image_grid_pinpoints": PINPOINTS, "patch_merge": "max"}, "merge is 'max'"),
        (
            {"image_grid_pinpoints": PINPOINTS, "vision_feature_select_strategy": "full"},
            "'full' with image_grid_pinpoints",
        ),
    ],
)
def test_refuses_canvases_before_any_weight_is_read(
    llm: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, message: str
) -> None:
    monkeypatch.setattr("mmfast.encoders.ClipEncoder.from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        Llava.from_parts(llm, clip, **settings)


def test_refuses_an_image_processor_of_another_size(llm: Path, write_encoder: Callable[..., Path]) -> None:
    larger = write_encoder(image_size=32)
    with pytest.raises(ValueError, match="crops to the encoder's image_size"):
        Llava.from_parts(llm, larger, image_grid_pinpoints=[[32, 64]])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_grid_pinpoints", [[16, 20]], "config.json.*image_grid_pinpoints has"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy 'full'; 'default' is accepted"),
        ("projector_hidden_act", "relu", "projector_hidden_act 'relu'"),
        ("image_grid_pinpoints", [[16, 32]], "the image processor has image_grid_pinpoints"),
    ],
)
def test_refuses_other_configurations(next_folder: Path, tmp_path: Path, name: str, value: Any, message: str) -> None:
    for path in next_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=message):
        Llava.from_pretrained(tmp_path)


def test_refuses_a_newline_of_another_size_and_none(next_folder: Path, tmp_path: Path) -> None:
    for path in next_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("image_newline"))
    save_file({**state, name: torch.zeros(40)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"image_newline is \[40\] but config.json makes it \[48\]"):
        Llava.from_pretrained(tmp_path)
    del state[name]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights .*image_newline"):
        Llava.from_pretrained(tmp_path)


def test_plain_configuration_has_nothing_of_it(tiny: Any) -> None:
    model = tiny.llava()
    assert model.anyres is None and model.image_newline is None and model.media_inputs == ("pixel_values",)
    assert not any("newline" in name for name in model.state_dict())
    assert LlavaConfig().image_grid_pinpoints is None


def save_run(folder: Path, llm: Path, clip: Path, **settings: Any) -> Llava:
    model = Llava.from_parts(llm, clip, image_grid_pinpoints=PINPOINTS, **settings)
    model.set_stage(replace(model.stages()["instruct_lora"], lora=LoraSpec(rank=2, alpha=4)))
    randomized(model).eval().save_trained(folder)
    return model


def test_export_to_transformers(llm: Path, clip: Path, samples: list[Any], tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", llm, clip)
    assert export(str(tmp_path / "run"), str(tmp_path / "out")) < 1e-4
    theirs, report = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_model(model, theirs.eval(), samples)


def test_export_to_the_original_repository(llm: Path, clip: Path, tmp_path: Path) -> None:
    model = save_run(tmp_path / "run", llm, clip, unpad_rounding="original")
    out = tmp_path / "out"
    assert export(str(tmp_path / "run"), str(out), to="original") < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == ("anyres", "spatial_unpad")
    assert config["image_grid_pinpoints"] == [[width, height] for height, width in PINPOINTS]  # (width, height)
    assert torch.equal(load_file(out / "model.safetensors")["model.image_newline"], model.image_newline)
    with pytest.raises(ValueError, match=r"no model\.image_newline"):
        read_newline(tmp_path / "run" / "nothing")


def test_a_wrong_newline_is_seen_in_the_drift(
    llm: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "run", llm, clip, unpad_rounding="original")
    monkeypatch.setattr("mmfast.models.export.read_newline", lambda _: torch.zeros(48))
    assert export(str(tmp_path / "run"), str(tmp_path / "out"), to="original") > 1e-3


def test_layouts_refuse_the_other_rounding(llm: Path, clip: Path, tmp_path: Path) -> None:
    for rounding, other in (("original", "hf"), ("transformers", "original")):
        save_run(tmp_path / rounding, llm, clip, unpad_rounding=rounding)
        with pytest.raises(ValueError, match=f"unpad_rounding (is )?'{rounding}'"):
            export(str(tmp_path / rounding), str(tmp_path / "out"), to=other)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
