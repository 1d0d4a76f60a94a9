"""Captions: MiniGPT-4's curated file, pairs of the first stage, and BLIP's cleaning of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmfast.data import load_image, load_samples
from mmfast.data.captions import ALIGNMENT_PROMPTS, clean_caption


def write(folder: Path, content: Any) -> Path:
    path = folder / "filter_cap.json"
    path.write_text(json.dumps(content, indent=1))
    return path


def test_load_reads_minigpt4s_curated_file(tmp_path: Path) -> None:
    annotations = [{"image_id": name, "caption": f"A Dog: number {name}."} for name in ("7", 8, "0009", "x", "y")]
    path = write(tmp_path, {"annotations": annotations})
    (tmp_path / "image").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "image" / "8.jpg")
    samples = load_samples(path)
    assert [sample["id"] for sample in samples] == ["7", "8", "0009", "x", "y"]
    question, answer = samples[1]["messages"]
    assert question == {
        "role": "user",
        "content": [{"type": "image", "image": "image/8.jpg"}, {"type": "text", "text": ALIGNMENT_PROMPTS[1]}],
    }
    assert answer == {"role": "assistant", "content": "A Dog: number 8."}
    asked: list[Any] = [sample["messages"][0]["content"] for sample in samples]
    assert [content[1]["text"] for content in asked] == [*ALIGNMENT_PROMPTS, ALIGNMENT_PROMPTS[0]]
    assert load_image(asked[1][0], tmp_path, "8").size == (4, 4)


def test_load_reads_pairs_and_cleans_their_captions(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "a.jpg", "caption": "A Dog!  (On grass)"}\n{"image": "b.jpg", "caption": "b"}\n')
    first, second = load_samples(path)
    assert first["id"] == "pairs-0"
    assert first["messages"][1]["content"] == "a dog on grass"
    assert second["messages"][0]["content"][0] == {"type": "image", "image": "b.jpg"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A Dog.", "a dog"),
        ('"What?" (he: said); #1 ~ *x*!', "what? he said 1 x"),
        ("a\n\nb \n", "a b"),
        ("it's 1,000-fold", "it's 1,000-fold"),
        ("word " * 60, " ".join(["word"] * 50)),
    ],
)
def test_clean_caption(caption: str, expected: str) -> None:
    assert clean_caption(caption) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": [{"caption": "a"}]}, r"sample 'filter_cap-0': its keys are \['caption'\]; a caption"),
        ([{"image": "a.jpg", "image_id": "a", "caption": "a"}], "either image .* or image_id"),
        ([{"image": "a.jpg", "caption": 1}], r"a caption \(text\)"),
        ([{"image_id": "../../a", "caption": "a"}], r"leaves the media folder"),
        ({"annotations": [{"image_id": "a", "caption": " "}]}, "the answer is empty"),
        ({"annotations": [3]}, "a record is 3; expected an object"),
        ({"annotations": []}, "no samples"),
    ],
)
def test_load_refuses_broken_captions(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(write(tmp_path, content))
