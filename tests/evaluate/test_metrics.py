"""Exact match and its counts."""

from __future__ import annotations

import pytest

from mmfast.evaluate import exact_match, score


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("7", "7", True),
        (" Top Left.\n", "top left", True),
        ("yes .", "Yes", True),
        ("", "", True),
        ("top  left", "top left", False),
        ("7 7", "7", False),
        ("", "7", False),
        ("3.5", "35", False),
        ("no..", "no", False),
    ],
)
def test_exact_match(answer: str, reference: str, right: bool) -> None:
    assert exact_match(answer, reference) is right


def test_score_counts_each_kind() -> None:
    result = score(["1", "2", "yes", "no", "x"], ["1", "3", "yes", "yes", "x"], ["a", "a", "b", "b", None])
    assert result == {
        "n": 5,
        "accuracy": 0.6,
        "per_kind": {"a": {"n": 2, "accuracy": 0.5}, "b": {"n": 2, "accuracy": 0.5}},
    }
    assert score(["a"], ["b"]) == {"n": 1, "accuracy": 0.0, "per_kind": {}}


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_score_refuses_what_does_not_match(answers: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"{len(answers)} answers, {len(references)} references"):
        score(answers, references)
