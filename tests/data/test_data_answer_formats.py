"""Prompts for short answers and multiple choice, by the texts of LLaVA's evaluation files."""

from __future__ import annotations

from typing import Any

import pytest

from mmfast.data import multiple_choice, validate_sample, with_answer_format

SHORT = "\nAnswer the question using a single word or phrase."
IMAGE = {"type": "image", "image": "cat.jpg"}


def sample(*contents: Any) -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"id": "q", "messages": messages, "answer": "black"}


def test_the_format_stands_behind_the_last_question() -> None:
    before = sample([IMAGE, {"type": "text", "text": "A cat?"}], "Yes.", "Which colour? ", "Black.")
    after = with_answer_format(before, "short")
    validate_sample(after)
    assert after["messages"][2]["content"] == [{"type": "text", "text": "Which colour?" + SHORT}]
    assert [after["messages"][turn] for turn in (0, 1, 3)] == [before["messages"][turn] for turn in (0, 1, 3)]
    assert after["answer"] == "black"
    assert before["messages"][2]["content"] == "Which colour? "


def test_images_stay_where_they_are() -> None:
    text = {"type": "text", "text": "Which colour?"}
    first = with_answer_format(sample([IMAGE, text]), "short")
    assert first["messages"][0]["content"] == [IMAGE, {"type": "text", "text": "Which colour?" + SHORT}]
    last = with_answer_format(sample([text, IMAGE]), "short")
    assert last["messages"][0]["content"] == [text, IMAGE, {"type": "text", "text": SHORT}]


def test_multiple_choice_is_the_published_text() -> None:
    expected = "Which is a fruit?\nA. carrot\nB. pear\nAnswer with the option's letter from the given choices directly."
    assert multiple_choice("Which is a fruit?", ["carrot", "pear"]) == expected
    listed = sample("Which is a fruit?\nA. carrot\nB. pear")
    assert with_answer_format(listed, "letter")["messages"][0]["content"] == [{"type": "text", "text": expected}]


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer format 'long'; accepted are short, letter"):
        with_answer_format(sample("Why?"), "long")
    with pytest.raises(ValueError, match="sample 'q' has no question"):
        with_answer_format(sample(), "short")
    for options in ([], ["one"], [str(number) for number in range(27)]):
        with pytest.raises(ValueError, match=f"{len(options)} options; 2 to 26"):
            multiple_choice("Which?", options)
