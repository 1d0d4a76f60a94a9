"""Clips: what their frames show, right answers, no hints, and descriptions that tell all."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmfast.data.videos import frame_indices
from mmfast.world import chance_accuracy, samples
from mmfast.world.clips import CLIP_KINDS, NUM_FRAMES, Clip, ask_clip, describe_clip, draw_clip, draw_frames, rows
from mmfast.world.digits import digits_of, enlarge, load_split
from mmfast.world.questions import POSITIONS, is_held_out

CLIP = Clip(labels=(3, 7, 1, 4), order=(2, 0, 3, 1))
PLACE = re.compile("|".join(POSITIONS))


def question_of(sample: dict) -> str:
    return "".join(part["text"] for part in sample["messages"][0]["content"] if part["type"] == "text").strip()


def right_answer(text: str, labels: tuple[int, ...], order: tuple[int, ...]) -> str:
    """The answer, worked out from the question's words alone."""
    digit = dict(zip(POSITIONS, labels, strict=True))
    sequence = [labels[place] for place in order]
    named = [int(found) for found in re.findall(r"\d", text)]
    if len(named) == 2:
        return str(min(named, key=sequence.index))
    if PLACE.search(text):
        asked = digit[PLACE.findall(text)[0]]
        return ("even", "odd")[asked % 2] if "even" in text else str(asked)
    return str(sequence[-1 if "last" in text else 0])


def test_clip_sequence_is_in_order_of_time() -> None:
    assert CLIP.sequence == (1, 3, 4, 7)


def test_draw_frames_show_one_digit_after_another() -> None:
    frames = draw_frames("test", CLIP, np.random.default_rng(0))
    assert (frames.shape, frames.dtype) == ((NUM_FRAMES, 32, 32), np.uint8)
    taken = [frames[index] for index in frame_indices(NUM_FRAMES, 8)]
    for index, frame in enumerate(taken):
        place = CLIP.order[index // 2]
        cells = [frame[:16, :16], frame[:16, 16:], frame[16:, :16], frame[16:, 16:]]
        candidates = 255 * enlarge(load_split("test").pixels[digits_of("test", CLIP.labels[place])])
        assert np.abs(candidates - cells[place]).max(axis=(1, 2)).min() <= 0.5
        assert not any(cells[other].any() for other in range(4) if other != place)


@pytest.mark.parametrize("name", ["clips-train", "clips-test", "cliptext-train", "cliptext-test"])
def test_samples_answers_are_right(name: str) -> None:
    kinds, forms = Counter(), set()
    for sample in samples(name)[:400]:
        lines = question_of(sample).split("\n")
        question = next(line for line in lines if not line.startswith(("[", "first ")))
        assert sample["answer"] == right_answer(question, sample["labels"], sample["order"]), sample
        kinds[sample["kind"]] += 1
        forms.add(re.sub(r"\d", "0", PLACE.sub("there", question)))
    assert set(kinds) == set(CLIP_KINDS)
    assert len(forms) == 18


@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_ask_clip_gives_no_hint(kind: str) -> None:
    rng = np.random.default_rng(0)
    answers = defaultdict(Counter)
    chances = {}
    for _ in range(20_000):
        question = ask_clip(rng, draw_clip(rng), kind)
        answers[question.text][question.answer] += 1
        chances[question.text] = question.chance
    for text, counts in answers.items():
        total, fair = counts.total(), chances[text]
        if total >= 50:
            assert len(counts) <= round(1 / fair)
            assert max(counts.values()) / total <= fair + 5 * (fair * (1 - fair) / total) ** 0.5


def test_time_says_nothing_of_space() -> None:
    """The order of the digits does not tell where they stand: a question of space needs the spatial tokens."""
    rng = np.random.default_rng(0)
    first = Counter(draw_clip(rng).order for _ in range(12_000))
    assert len(first) == 24
    assert max(first.values()) < 500 + 5 * 500**0.5


def test_ask_clip_refuses_another_kind() -> None:
    with pytest.raises(ValueError, match="no clip question of kind 'colour'; accepted are space, time, order"):
        ask_clip(np.random.default_rng(0), CLIP, "colour")


def test_describe_clip_tells_all() -> None:
    rng = np.random.default_rng(0)
    frames, patches = " 1 1 3 3 4 4 7 7", " 3 3 7 7 3 3 7 7 1 1 4 4 1 1 4 4"
    assert rows(CLIP) == f"[{frames}{patches}]"
    words = "first 1 bottom left, then 3 top left, then 4 bottom right, last 7 top right"
    assert {describe_clip(rng, CLIP) for _ in range(50)} == {rows(CLIP), words}


def test_cliptext_splits_share_no_digits() -> None:
    assert all(is_held_out(sample["labels"]) for sample in samples("cliptext-test")[:100])
    assert not any(is_held_out(sample["labels"]) for sample in samples("cliptext-train")[:500])


def test_clips_stand_where_video_chatgpt_has_them() -> None:
    def kinds(sample: dict) -> list[str]:
        return [part["type"] for part in sample["messages"][0]["content"]]

    train, test = samples("clips-train"), samples("clips-test")
    assert [kinds(train[index]) for index in range(2)] == [["text", "video"], ["video", "text"]]
    assert [kinds(test[index]) for index in range(2)] == [["text", "video"], ["text", "video"]]
    assert train[0]["messages"][0]["content"][0]["text"].endswith("\n")


def test_chance_accuracy_is_that_of_guessing() -> None:
    rng = np.random.default_rng(0)
    right = total = 0
    for sample in samples("clips-test"):
        text = question_of(sample)
        named = re.findall(r"\d", text)
        if len(named) == 2:
            options = named
        elif "even" in text:
            options = ["even", "odd"]
        else:
            options = [str(digit) for digit in range(10)]
        for _ in range(20):
            right += str(rng.choice(options)) == sample["answer"]
            total += 1
    assert abs(right / total - chance_accuracy("clips-test")) < 0.015
