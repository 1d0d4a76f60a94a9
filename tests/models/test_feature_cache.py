"""Features of frozen parts on the disk, in every system that has them: they stand for the media, exactly."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmfast.data import Sample
from mmfast.models import LlamaAdapter, LlamaAdapterConfig, get_system
from mmfast.models.base import MultimodalModel

PINPOINTS = [[16, 32], [32, 16], [32, 32]]
FORMS: dict[str, dict[str, Any]] = {
    "llava": {},
    "llava-anyres": {"image_grid_pinpoints": PINPOINTS},
    "minigpt4": {"q_former_sizes": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}},
    "minigpt4-four": {"connector": "four_patches"},
    "llama_adapter-v1": {"version": "v1", "prompt_layers": 1},
    "llama_adapter-v2": {
        "version": "v2",
        "prompt_layers": 1,
        "visual_width": 32,
        "visual_heads": 2,
        "visual_depth": 1,
        "visual_length": 3,
    },
}
STAGES = {
    "llava": "align",
    "llava-anyres": "align",
    "minigpt4": "pretrain",
    "minigpt4-four": "pretrain",
    "llama_adapter-v1": "instruct_images",
    "llama_adapter-v2": "joint",
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def open_form(llm: Path, write_encoder: Callable[..., Path]) -> Callable[..., MultimodalModel]:
    # A row of four patches, which one of the connectors joins.
    folder = write_encoder(image_size=16, patch_size=4)

    def open_one(form: str, encoder: Path = folder, **options: Any) -> MultimodalModel:
        torch.manual_seed(0)
        settings = {**FORMS[form], **options}
        model = get_system(form.partition("-")[0]).from_parts(llm, encoder, **settings)
        model.set_stage(model.stages()[STAGES[form]])
        return model

    return open_one


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def ask(image: Any, name: str = "a") -> Sample:
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    return {
        "id": name,
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}],
    }


def batch_of(model: MultimodalModel, *samples: Sample) -> dict[str, torch.Tensor]:
    return model.processor.collate([model.processor.encode(sample) for sample in samples])


@forms
@torch.no_grad()
def test_features_stand_for_the_media(form: str, open_form: Callable[..., MultimodalModel], tmp_path: Path) -> None:
    model = open_form(form)
    samples = [ask(picture(seed, (16 + 8 * seed, 16)), str(seed)) for seed in range(3)]
    # Each medium is encoded by itself, so the losses are compared of batches of one.
    expected = [model(**batch_of(model, sample)).loss for sample in samples]
    together = model(**batch_of(model, *samples)).loss
    assert model.fill_feature_cache(tmp_path, [samples[0], *samples]) == 3
    batch = batch_of(model, *samples)
    assert "pixel_values" not in batch
    assert batch["has_features"].tolist() == [True] * 3
    encode = model.encoder.forward
    model.encoder.forward = None
    assert [model(**batch_of(model, sample)).loss for sample in samples] == expected
    torch.testing.assert_close(model(**batch).loss, together, rtol=1e-5, atol=1e-6)
    # One that is lost is read, and encoded, among those that are there.
    model.encoder.forward = encode
    cache: Any = model.processor.cache
    key = model.processor.cache_key(samples[1]["messages"][0]["content"][0], None, "")
    cache.path(key).write_bytes(cache.path(key).read_bytes()[:-7])
    with pytest.warns(UserWarning, match="is damaged"):
        batch = batch_of(model, *samples)
    assert batch["has_features"].tolist() == [True, False, True]
    torch.testing.assert_close(model(**batch).loss, together, rtol=1e-5, atol=1e-6)


@forms
def test_it_knows_weights_dtype_and_preprocessing(
    form: str, open_form: Callable[..., MultimodalModel], write_encoder: Callable[..., Path], tmp_path: Path
) -> None:
    samples = [ask(picture(1))]
    assert open_form(form).fill_feature_cache(tmp_path, samples) == 1
    others = [
        open_form(form, write_encoder(image_size=16, patch_size=4)),
        open_form(form, dtype=torch.bfloat16),
    ]
    padded = open_form(form)
    if form == "llava-anyres":
        others.append(open_form(form, image_grid_pinpoints=PINPOINTS[:1]))
    else:
        padded.processor.pad_to_square = True
        others.append(padded)
    if form == "minigpt4":
        training = open_form(form)
        training.set_stage(training.stages()["q_former"])
        others.append(training)
    assert [other.fill_feature_cache(tmp_path, samples) for other in others] == [1] * len(others)
    same = open_form(form)
    with torch.autocast("cpu", torch.bfloat16):
        assert same.fill_feature_cache(tmp_path, samples) == 1
    assert same.fill_feature_cache(tmp_path, samples) == 0


def test_a_trained_q_former_is_not_cached(open_form: Callable[..., MultimodalModel], tmp_path: Path) -> None:
    model: Any = open_form("minigpt4")
    model.set_stage(model.stages()["q_former"])
    sample = ask(picture(1))
    model.fill_feature_cache(tmp_path, [sample])
    model.train()
    batch = batch_of(model, sample)
    assert batch["features"].shape == (1, 17, 32)  # the encoder's
    model(**batch).loss.backward()
    assert model.q_former.query_tokens.grad.abs().max() > 0
    # Frozen again, its weights are another revision; and no dropout is left from training.
    model.set_stage(model.stages()["pretrain"])
    assert model.processor.cache is None
    assert model.fill_feature_cache(tmp_path, [sample]) == 1
    with torch.no_grad():
        assert torch.equal(batch_of(model, sample)["features"], model.eval().frozen_features(**pixels(model, sample)))


def pixels(model: Any, sample: Sample) -> dict[str, torch.Tensor]:
    model.processor.cache = None
    return {"pixel_values": batch_of(model, sample)["pixel_values"]}


def test_workers_read_and_processes_share(open_form: Callable[..., MultimodalModel], tmp_path: Path) -> None:
    model = open_form("llava")
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
    samples = [ask(f"{seed}.png", str(seed)) for seed in range(5)]
    cache = tmp_path / "cache"
    assert [model.fill_feature_cache(cache, samples, tmp_path, rank, 2) for rank in range(2)] == [2, 3]
    assert model.fill_feature_cache(cache, samples, tmp_path) == 0
    picture(9).resize((8, 8)).save(tmp_path / "3.png")
    assert model.fill_feature_cache(cache, samples, tmp_path, num_workers=1) == 1
    assert not list(cache.rglob(".tmp-*"))


def test_a_cut_file_is_made_again(open_form: Callable[..., MultimodalModel], tmp_path: Path) -> None:
    model, samples = open_form("llava"), [ask(picture(1))]
    model.fill_feature_cache(tmp_path, samples)
    (file,) = tmp_path.rglob("*.safetensors")
    features = load_file(file)["features"].clone()  # it was the file itself, mapped
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"is damaged .*made again"):
        assert model.fill_feature_cache(tmp_path, samples) == 1
    assert torch.equal(load_file(file)["features"], features)


def test_a_full_disk_says_so(open_form: Callable[..., MultimodalModel], tmp_path: Path) -> None:
    model = open_form("llava")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=r"feature cache: .* cannot be written .*make room"):
            model.fill_feature_cache(tmp_path, [ask(picture(1))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_system_that_trains_in_its_encoder_has_none(llm: Path, encoder: Path, tmp_path: Path) -> None:
    model = get_system("lavin").from_parts(llm, encoder)
    with pytest.raises(ValueError, match="no features can be cached, since adapters train inside its encoder"):
        model.fill_feature_cache(tmp_path, [ask(picture(1))])


@torch.no_grad()
def test_rows_without_an_image_see_the_blank_one(tiny: Any) -> None:
    sizes = {"visual_depth": 1, "visual_heads": 2, "visual_width": 24, "prompt_layers": 1}
    parts = tiny.text_config(), tiny.vision_config(projection_dim=20)
    model = tiny.randomize(LlamaAdapter(LlamaAdapterConfig(*parts, "v2_multimodal_7b", blank_image=True, **sizes)))
    pixels, rows = torch.randn(2, 3, 16, 16), torch.tensor([2, 0])
    expected = model.visual_prompts(3, pixels, rows)["prompt_bias"]
    features = model.frozen_features(pixels)
    given = torch.tensor([True, True])
    torch.testing.assert_close(model.visual_prompts(3, None, rows, features, given)["prompt_bias"], expected)
    mixed = model.visual_prompts(3, pixels[:1], rows, features[1:], torch.tensor([False, True]))["prompt_bias"]
    torch.testing.assert_close(mixed, expected)
    assert (expected[0] - expected[1]).norm() > 1e-2
