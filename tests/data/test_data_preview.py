"""An encoded sample as people see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfast.data import Processor, format_sample, write_pictures


def sample(question: str, answer: str, *images: Any) -> Any:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
    return {"id": "a/b", "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def test_what_is_learned_stands_outside_of_brackets(
    make_processor: Callable[..., Processor], media: Path, kind: str
) -> None:
    processor = make_processor(kind)
    shown = sample("What is it?", "A cat on a mat.", "red.png", "sub/blue.png")
    encoded = processor.encode(shown, media_folder=media)
    head, text = format_sample(shown, encoded, processor).split("\n", 1)
    tokens, learned = len(encoded.input_ids), encoded.supervised_tokens
    assert head == f"a/b: {tokens} tokens, {learned} supervised, image x4, image x4"
    begin = processor.tokenizer.bos_token if encoded.input_ids[0] == processor.tokenizer.bos_token_id else ""
    end = processor.tokenizer.eos_token
    space = " " if kind.startswith("sentencepiece") else ""  # its first token is "▁USER"
    assert text == f"[{begin or ''}{space}USER: <image x4><image x4>\nWhat is it? ASSISTANT:] A cat on a mat.{end}"


def test_grey_is_by_the_codes_of_terminals(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor()
    shown = sample("What?", "A cat.")
    text = format_sample(shown, processor.encode(shown), processor, plain=False)
    assert "\x1b[90m<s> USER: What? ASSISTANT:\x1b[0m A cat.</s>" in text


def test_codes_in_the_data_do_nothing(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor("byte-level")
    shown = sample("red\x1b[31m\x07", "A\x9bcat.")
    text = format_sample(shown, processor.encode(shown), processor)
    assert r"red\x1b[31m\x07" in text and r"A\x9bcat." in text
    assert not set("\x1b\x07\x9b") & set(text)


def test_what_was_cut_is_counted(make_processor: Callable[..., Processor]) -> None:
    processor = make_processor(max_length=30)
    shown = sample("What?", "A cat. " * 20)
    encoded = processor.encode(shown)
    assert encoded.cut_tokens == len(make_processor().encode(shown).input_ids) - 30
    assert f", {encoded.cut_tokens} more cut off\n" in format_sample(shown, encoded, processor)


def test_pictures_are_what_the_encoder_gets(
    make_processor: Callable[..., Processor], media: Path, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    shown = sample("What?", "A cat.", Image.fromarray(pixels), "red.png")
    encoded = make_processor().encode(shown, media_folder=media)
    paths = write_pictures(encoded, make_processor(), tmp_path / "out", "3")
    assert [path.name for path in paths] == ["3-0.png", "3-1.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), pixels)  # of the encoder's size: nothing is lost
    assert Image.open(paths[1]).size == (8, 8)
    assert Image.open(paths[1]).getpixel((4, 4)) == (255, 0, 0)


def test_text_alone_writes_nothing(make_processor: Callable[..., Processor], tmp_path: Path) -> None:
    encoded = make_processor().encode(sample("What?", "A cat."))
    assert write_pictures(encoded, make_processor(), tmp_path / "out", "0") == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(30, 20), (9, 14)])
def test_pictures_of_high_resolution_are_its_views(size: tuple[int, int], tmp_path: Path, image_processor: Any,
                                                   make_tokenizer: Callable[[str], Any]) -> None:  # fmt: skip
    from mmfast.data import AnyresProcessor, get_template

    processor = AnyresProcessor(
        make_tokenizer("sentencepiece"), image_processor, get_template("short"), [[8, 16], [16, 8]], tokens_per_image=4
    )
    encoded = processor.encode(sample("What?", "A cat.", Image.new("RGB", size, (10, 200, 30))))
    paths = write_pictures(encoded, processor, tmp_path, "0")
    assert [path.name for path in paths] == ["0-0-0.png", "0-0-1.png", "0-0-2.png"]
    assert all(Image.open(path).size == (8, 8) for path in paths)
    assert Image.open(paths[0]).getpixel((4, 4)) == (10, 200, 30)
