"""The processor of high resolution: tokens from headers alone, exact pixels, and errors that name the sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmfast.data import AnyresProcessor, EncodedDataset, check_supervision, get_template, pinpoints_up_to

PINPOINTS = pinpoints_up_to(4, 8)
CROP = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}


@pytest.fixture
def processor(make_tokenizer: Any, image_processor: Any) -> AnyresProcessor:
    template = get_template("short")
    return AnyresProcessor(make_tokenizer("sentencepiece"), image_processor, template, PINPOINTS, tokens_per_image=4)


def ask(*images: Any) -> Any:
    content: list[Any] = [{"type": "image", "image": image} for image in images]
    question = {"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}
    return {"id": "cat-1", "messages": [question, {"role": "assistant", "content": "A cat."}]}


@pytest.mark.parametrize("size", [(12, 8), (8, 8), (9, 31), (30, 7), (64, 64)])
def test_pixels_are_those_of_transformers(processor: AnyresProcessor, size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    theirs = LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=[list(canvas) for canvas in PINPOINTS])
    inputs = theirs.preprocess([image], return_tensors="pt")
    (tiled,) = processor.encode(ask(image)).media
    assert torch.equal(tiled.pixel_values, inputs["pixel_values"][0])
    assert list(tiled.size) == inputs["image_sizes"][0].tolist()
    assert tiled.pixel_values.dtype == torch.float32


def test_collate_joins_the_views_of_all_samples(processor: AnyresProcessor, media: Path) -> None:
    samples = [ask("red.png", "sub/blue.png"), ask(), ask("red.png")]
    encoded = [processor.encode(sample, media_folder=media) for sample in samples]
    batch = processor.collate(encoded)
    assert batch["image_sizes"].tolist() == [[8, 12], [8, 8], [8, 12]]
    views = [processor.anyres.num_views(size) for size in batch["image_sizes"].tolist()]
    assert batch["pixel_values"].shape == (sum(views), 3, 8, 8)
    tokens = (batch["input_ids"] == processor.image_token_id).sum(-1)
    assert tokens.tolist() == [sum(item.media_tokens) for item in encoded]
    assert encoded[0].media_tokens == [processor.anyres.num_tokens(size) for size in [(8, 12), (8, 8)]]
    assert "pixel_values" not in processor.collate([encoded[1]])


def test_tokens_are_counted_from_headers(processor: AnyresProcessor, media: Path) -> None:
    """A file cut behind its header is counted, and found when it is decoded."""
    sample = ask("broken.png")
    counted = processor.encode(sample, media_folder=media, load_media=False)
    assert counted.media == [] and counted.media_tokens == [processor.anyres.num_tokens((64, 64))]
    dataset = EncodedDataset([sample, ask("red.png")], processor, media)
    assert check_supervision(dataset).longest == len(counted.input_ids)
    with pytest.raises(ValueError, match=r"sample 'cat-1': cannot read image '.*broken.png'"):
        processor.encode(sample, media_folder=media)


@pytest.mark.parametrize(("name", "message"), [("missing.png", "does not exist"), ("text.png", "cannot read image")])
def test_broken_files_are_named_when_counted(processor: AnyresProcessor, media: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^sample 'cat-1'.*{name}.*{message}|^sample 'cat-1'.*{message}.*{name}"):
        processor.encode(ask(name), media_folder=media, load_media=False)


def test_images_without_breadth_are_named(processor: AnyresProcessor) -> None:
    with pytest.raises(ValueError, match=r"^sample 'cat-1': anyres: an image of 900x1 pixels is too long"):
        processor.encode(ask(Image.new("RGB", (900, 1))), load_media=False)
    with pytest.raises(ValueError, match=r"^sample 'cat-1': anyres: an image has 0x4 pixels"):
        processor.encode(ask(Image.new("RGB", (0, 4))), load_media=False)


def test_orientation_behind_the_pixels_is_refused(processor: AnyresProcessor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = tmp_path / "plain.png", tmp_path / "turned.png"
    Image.new("RGB", (12, 8)).save(plain)
    Image.new("RGB", (12, 8)).save(turned, exif=exif)
    data = turned.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = plain.read_bytes().index(b"IEND") - 4
    moved = plain.read_bytes()
    (tmp_path / "moved.png").write_bytes(moved[:end] + chunk + moved[end:])
    assert processor.encode(ask("turned.png"), media_folder=tmp_path).media[0].size == (12, 8)
    with pytest.raises(ValueError, match=r"sample 'cat-1': image 'moved.png' has its EXIF orientation behind"):
        processor.encode(ask("moved.png"), media_folder=tmp_path)


def test_saves_and_opens(processor: AnyresProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    opened = AnyresProcessor.from_pretrained(tmp_path)
    assert isinstance(opened, AnyresProcessor) and opened.anyres == processor.anyres
    assert opened.settings() == processor.settings()
    sample = ask(Image.effect_noise((20, 12), 90).convert("RGB"))
    before, after = processor.encode(sample), opened.encode(sample)
    assert before.input_ids == after.input_ids
    assert torch.equal(before.media[0].pixel_values, after.media[0].pixel_values)


def test_takes_the_image_processor_of_llava_next(make_tokenizer: Any, image_processor: Any) -> None:
    theirs = LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=PINPOINTS)
    arguments = (make_tokenizer("sentencepiece"), theirs, get_template("short"))
    processor = AnyresProcessor(*arguments, PINPOINTS, tokens_per_image=4)
    assert not hasattr(processor.image_processor, "image_grid_pinpoints")
    assert processor.image_processor.crop_size == image_processor.crop_size
    with pytest.raises(ValueError, match=r"the image processor has image_grid_pinpoints .* but the model"):
        AnyresProcessor(*arguments, PINPOINTS[1:], tokens_per_image=4)


def test_refuses_settings_that_do_not_fit(make_tokenizer: Any, image_processor: Any) -> None:
    def make(**changes: Any) -> AnyresProcessor:
        settings = {"image_grid_pinpoints": PINPOINTS, "tokens_per_image": 4, **changes}
        return AnyresProcessor(make_tokenizer("sentencepiece"), image_processor, get_template("short"), **settings)

    with pytest.raises(ValueError, match=r"a view has 5 tokens; .* drop the class token"):
        make(tokens_per_image=5)
    arguments = (make_tokenizer("sentencepiece"), CLIPImageProcessor(**{**CROP, "size": {"shortest_edge": 9}}))
    with pytest.raises(ValueError, match=r"resizes to .*9.* and crops to .*8.*; one square is accepted"):
        AnyresProcessor(*arguments, get_template("short"), PINPOINTS, tokens_per_image=4)
    with pytest.raises(ValueError, match=r"image_grid_pinpoints has \(8, 12\)"):
        make(image_grid_pinpoints=[(8, 12)])
    with pytest.raises(ValueError, match="pad_to_square is True, but with high resolution"):
        make(pad_to_square=True)
    processor = make(pad_to_square=False)
    with pytest.raises(ValueError, match="leave it out"):
        processor.pad_to_square = True
