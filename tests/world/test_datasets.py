"""The data sets: right answers, no hints, the same sample everywhere, nothing made before it is asked for."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import product

import numpy as np
import pytest

from mmfast.data import validate_sample
from mmfast.world import chance_accuracy, datasets, samples
from mmfast.world.clips import NUM_FRAMES
from mmfast.world.datasets import SIZES
from mmfast.world.questions import KINDS, POSITIONS, Labels, ask, check_all_digits, describe, grid, is_held_out

PLACE = re.compile("|".join(POSITIONS))


def right_answer(text: str, labels: Labels) -> str:
    """The answer, worked out from the question's words alone."""
    digit = dict(zip(POSITIONS, labels, strict=True))
    places = PLACE.findall(text)
    if len(places) == 2 and text.startswith("which"):
        return max(places, key=digit.__getitem__)
    if len(places) == 2:
        first, second = (digit[place] for place in places)
        return "yes" if (first < second if "smaller" in text else first > second) else "no"
    if "even" in text:
        return ("even", "odd")[digit[places[0]] % 2]
    if places:
        return str(digit[places[0]])
    return "yes" if int(re.findall(r"\d", text)[0]) in labels else "no"


def question_of(sample: dict) -> str:
    return sample["messages"][0]["content"][-1]["text"].rsplit("\n", 1)[-1]


@pytest.mark.parametrize("name", ["questions-train", "questions-test", "text-test"])
def test_samples_answers_are_right(name: str) -> None:
    kinds = Counter()
    for sample in samples(name)[:400]:
        assert sample["answer"] == right_answer(question_of(sample), sample["labels"]), sample
        assert sample["messages"][1]["content"] == [{"type": "text", "text": sample["answer"]}]
        kinds[sample["kind"]] += 1
    assert set(kinds) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_ask_gives_no_hint(kind: str) -> None:
    rng = np.random.default_rng(0)
    answers = defaultdict(Counter)
    for _ in range(4000):
        labels = tuple(int(label) for label in rng.choice(10, 4, replace=False))
        question = ask(rng, labels, kind)
        answers[question.text][question.answer] += 1
    fair = 0.1 if kind == "position" else 0.5
    for counts in answers.values():
        total = counts.total()
        assert max(counts.values()) / total <= fair + 5 * (fair * (1 - fair) / total) ** 0.5


def test_ask_compares_no_equal_digits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = ask(rng, (4, 4, 4, 5), "comparison").text
        assert "bottom right" in text
        assert ask(rng, (4, 4, 4, 4)).kind != "comparison"
    with pytest.raises(ValueError, match=r"\(4, 4, 4, 4\) are all equal"):
        ask(rng, (4, 4, 4, 4), "comparison")
    with pytest.raises(ValueError, match="no question of kind 'colour'"):
        ask(rng, (1, 2, 3, 4), "colour")


def test_describe_tells_all_digits() -> None:
    rng = np.random.default_rng(0)
    forms = set()
    for _ in range(300):
        text = describe(rng, (3, 7, 1, 4))
        numbers = "".join(re.findall(r"\d", text))
        if len(numbers) == 16:
            assert numbers == "3377337711441144"
        elif text.count("is") == 4:
            told = dict(re.findall(r"(\w+ \w+) is (\d)", text))
            assert told == {"top left": "3", "top right": "7", "bottom left": "1", "bottom right": "4"}
        else:
            assert numbers == "3714"
        forms.add(text)
    assert len(forms) > 10
    assert grid((3, 7, 1, 4)) in forms


def test_check_all_digits_tells_which_are_there() -> None:
    answer = check_all_digits((3, 7, 3, 0)).answer
    assert answer == "0 yes 1 no 2 no 3 yes 4 no 5 no 6 no 7 yes 8 no 9 no"


def test_samples_text_splits_share_no_digits() -> None:
    held_out = {labels for labels in product(range(10), repeat=4) if is_held_out(labels)}
    assert 900 < len(held_out) < 1100
    assert all(sample["labels"] in held_out for sample in samples("text-test"))
    assert not any(sample["labels"] in held_out for sample in samples("text-train")[:500])


@pytest.mark.parametrize("name", SIZES)
def test_samples_have_the_form_of_samples(name: str) -> None:
    data = samples(name)
    assert len(data) == SIZES[name]
    for sample in data[:20]:
        validate_sample(sample)
        media = [part for part in sample["messages"][0]["content"] if part["type"] != "text"]
        kind = "video" if name.startswith("clip") else "image"
        assert [part["type"] for part in media] == ([] if "text" in name else [kind])
        frames = [frame for part in media for frame in ([part["image"]] if kind == "image" else part["video"])]
        assert len(frames) == (0 if "text" in name else 1 if kind == "image" else NUM_FRAMES)
        size = (64, 32) if name.startswith("wide") else (32, 32)
        assert all((frame.mode, frame.size) == ("RGB", size) for frame in frames)
    assert len({sample["id"] for sample in data[:100]}) == 100


@pytest.mark.parametrize("name", SIZES)
def test_samples_are_decided_by_name_and_index(name: str) -> None:
    def content(sample: dict) -> list:
        parts = sample["messages"][0]["content"] + sample["messages"][1]["content"]
        shown = [part[part["type"]] for part in parts]
        frames = [[image] if hasattr(image, "tobytes") else image for image in shown]
        return [[frame if isinstance(frame, str) else frame.tobytes() for frame in part] for part in frames]

    data = samples(name)
    alone = content(data[17])
    assert content(samples(name)[17]) == alone
    assert content(data[:20][17]) == alone
    assert content(data[17 - len(data)]) == alone
    assert content(data[18]) != alone


def test_wide_pictures_have_the_digits_in_one_half() -> None:
    halves = set()
    for sample in samples("wide-test")[:40]:
        (picture,) = (part["image"] for part in sample["messages"][0]["content"] if part["type"] == "image")
        cells = np.asarray(picture.convert("L")).reshape(2, 16, 2, 2, 16).any((1, 4))
        (half,) = np.flatnonzero(cells.any((0, 2))).tolist()
        assert cells[:, half].all()  # a digit in each of its quarters
        halves.add(half)
    assert halves == {0, 1}


def test_samples_of_two_data_sets_differ() -> None:
    first = {name: [sample["labels"] for sample in samples(name)[:30]] for name in SIZES}
    assert len({str(labels) for labels in first.values()}) == len(SIZES)


def test_samples_are_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = datasets.draw_canvas
    monkeypatch.setattr(datasets, "draw_canvas", lambda *arguments: drawn.append(1) or draw(*arguments))
    data = samples("questions-train")
    assert len(data) == 20_000
    assert not drawn
    next(iter(data))
    assert data[12_345]["id"] == "questions-train-12345"
    assert len(drawn) == 2


def test_samples_refuse_what_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="no data set 'questions'; accepted are captions-train"):
        samples("questions")
    with pytest.raises(IndexError, match="questions-test has 1000 samples, so there is no sample 1000"):
        samples("questions-test")[1000]
    with pytest.raises(IndexError, match="no sample -1001"):
        samples("questions-test")[-1001]


def test_chance_accuracy_is_that_of_guessing() -> None:
    rng = np.random.default_rng(0)
    right = total = 0
    for sample in samples("questions-test"):
        if sample["kind"] == "position":
            options = [str(digit) for digit in range(10)]
        elif sample["kind"] == "parity":
            options = ["even", "odd"]
        else:
            options = PLACE.findall(question_of(sample)) if "which" in question_of(sample) else ["yes", "no"]
        for _ in range(20):
            right += str(rng.choice(options)) == sample["answer"]
            total += 1
    assert abs(right / total - chance_accuracy("questions-test")) < 0.015
    with pytest.raises(ValueError, match="captions-test has captions"):
        chance_accuracy("captions-test")
