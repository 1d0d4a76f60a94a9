"""What is counted of a data set, and what is said of its bad samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfast.data import JsonSamples, Processor, allowed_bad, check_data, format_report

MakeProcessor = Callable[..., Processor]


def sample(id: str, *images: str, question: str = "What is it?", answer: str = "A cat.") -> dict[str, Any]:
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return {"id": id, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def opened(folder: Path, *records: Any) -> JsonSamples:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return JsonSamples(path, strict=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_are_those_of_the_encoded_samples(make_processor: MakeProcessor, media: Path, num_workers: int) -> None:
    processor = make_processor(max_length=40)
    records = [
        sample("none"),
        sample("one", "red.png", answer="A cat and a dog. " * 9),
        sample("two", "red.png", "sub/blue.png"),
        *(sample(f"n{index}", question=f"What is {index}?") for index in range(20)),
    ]
    samples = opened(media, *records)
    report = check_data(samples, processor, media, num_workers=num_workers)
    encoded = [processor.encode(item, media_folder=media) for item in samples]
    lengths = sorted(len(item.input_ids) + item.cut_tokens for item in encoded)
    assert report["samples"] == 23
    assert report["tokens"] == sum(len(item.input_ids) for item in encoded)
    assert report["supervised_tokens"] == sum(item.supervised_tokens for item in encoded)
    assert report["media"] == {"image": 3}
    assert encoded[1].cut_tokens == lengths[-1] - 40 > 0
    assert report["truncated"] == {"samples": 1, "tokens": encoded[1].cut_tokens, "ids": ["one"]}
    assert report["bad"] == {"samples": 0, "allowed": 0, "by_fault": {}, "list": []}
    found = report["lengths"]
    assert (found["shortest"], found["median"], found["longest"]) == (lengths[0], lengths[11], lengths[-1])
    for entry in found["histogram"]:
        assert entry["samples"] == sum(entry["from"] <= length <= entry["to"] for length in lengths)
    assert sum(entry["samples"] for entry in found["histogram"]) == 23


def test_every_fault_is_named(make_processor: MakeProcessor, media: Path) -> None:
    samples = opened(
        media,
        sample("good", "red.png"),
        sample("good", "red.png", question="Another?"),
        sample("lost", "lost.png", "gone.png"),
        sample("cut", "broken.png"),
        sample("out", "../red.png"),
        sample("long", question="What? " * 60),
        sample("crowd", *["red.png"] * 20),
        {"id": "empty", "messages": []},
        {"id": "film", "messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
                                    {"role": "assistant", "content": "x"}]},
        17,
    )  # fmt: skip
    report = check_data(samples, make_processor(max_length=60), media, max_bad="50%", num_workers=0)
    found = [(problem["id"], problem["fault"]) for problem in report["bad"]["list"]]
    assert found == [
        ("good#2", "duplicate id"),
        ("lost", "missing"),
        ("lost", "missing"),
        ("cut", "unreadable"),
        ("out", "outside"),
        ("long", "unsupervised"),
        ("crowd", "unusable"),
        ("empty", "malformed"),
        ("film", "unusable"),
        ("data-9", "malformed"),
    ]
    assert (report["bad"]["samples"], report["bad"]["allowed"]) == (9, 5)
    for name, text in (("lost.png", "does not exist"), ("gone.png", "does not exist"), ("broken.png", "cannot read")):
        assert any(name in p["error"] and text in p["error"] for p in report["bad"]["list"])
    printed = format_report(report)
    assert "9 of 10 samples are bad; 5 may be" in printed
    assert all(problem["error"] in printed for problem in report["bad"]["list"])


def test_repeated_content_is_named_and_not_bad(make_processor: MakeProcessor, media: Path) -> None:
    samples = opened(media, sample("a", "red.png"), sample("b", "sub/blue.png"), sample("c", "red.png"), sample("d"))
    report = check_data(samples, make_processor(), media, num_workers=0)
    assert report["repeated"] == {"samples": 1, "ids": [["a", "c"]]}
    assert report["bad"]["samples"] == 0
    assert "c as a" in format_report(report)


def test_long_lists_are_shortened_for_people_alone(make_processor: MakeProcessor, media: Path) -> None:
    report = check_data(opened(media, *(sample(f"s{i}", f"{i}.png") for i in range(30))), make_processor(), media, 30)
    assert len(report["bad"]["list"]) == 30
    printed = format_report(report)
    assert printed.count("does not exist") == 10
    assert "and 20 more" in printed


@pytest.mark.parametrize(
    ("max_bad", "samples", "allowed"),
    [(0, 9, 0), (3, 9, 3), ("3", 9, 3), ("0.1%", 1000, 1), ("0.1%", 999, 0), ("12.5 %", 8, 1), ("100%", 7, 7)],
)
def test_allowed_bad(max_bad: int | str, samples: int, allowed: int) -> None:
    assert allowed_bad(max_bad, samples) == allowed


@pytest.mark.parametrize("max_bad", [-1, "-1", "101%", "x", "", "%", "0.1", True, "nan%"])
def test_allowed_bad_refuses(max_bad: Any) -> None:
    with pytest.raises(ValueError, match=r"max_bad is .*; a number of samples, or a share such as 0.1%, is accepted"):
        allowed_bad(max_bad, 10)
