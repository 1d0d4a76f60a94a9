"""The scorer of multiple-choice answers, and ScienceQA through `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmfast.data import get_template
from mmfast.evaluate import accuracy, evaluate
from mmfast.evaluate.choices import chosen_letter, score_choices
from mmfast.evaluate.samples import open_samples


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is B. BECAUSE: a map", "B"),
        ("well. The answer is C", "C"),
        ("The answer is A. The answer is B.", "A"),
        ("The answer is D.", None),
        ("The answer is Ohio.", None),
        ("B", None),
        ("", None),
    ],
)
def test_chosen_letter(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer, choices=3) == letter


def test_score_choices() -> None:
    asked = [{"choices": ["x", "y", "z"], "answer": "B", "kind": "nat"}] * 300
    answers = ["The answer is B."] * 100 + ["The answer is A."] * 50 + ["no idea"] * 150
    counts = score_choices(answers, asked)
    share = {"n": 300, "accuracy": 100 / 300}
    assert counts == {**share, "per_kind": {"nat": share}, "unreadable": 150}
    # A third of the draws meets the right one.
    drawn = score_choices(answers, asked, unreadable="random")
    assert drawn["unreadable"] == 150
    assert drawn["accuracy"] == pytest.approx(150 / 300, abs=0.05)
    assert drawn == score_choices(answers, asked, unreadable="random")
    with pytest.raises(ValueError, match="unreadable is 'skip'; 'wrong' and 'random' are accepted"):
        score_choices(answers, asked, unreadable="skip")  # type: ignore[arg-type]


def test_evaluate_scienceqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = {"question": "?", "choices": ["x", "y"], "answer": 0, "subject": "nat", "split": "test"}
    problems = {str(i): {**problem, "choices": ["x", "y", "z", "w"][: 2 + 2 * (i % 2)]} for i in range(4)}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    answers = ["The answer is A.", "The answer is B.", "The answer is A. BECAUSE: it is", "A"]
    monkeypatch.setattr("mmfast.generate.answer_batch", lambda *_, **__: answers)
    model: Any = SimpleNamespace(processor=SimpleNamespace(template=get_template("lavin_scienceqa")))
    data = f"scienceqa:{tmp_path}/problems.json:test"
    result = evaluate(model, data)
    assert (result["n"], result["accuracy"], result["unreadable"]) == (4, 0.5, 1)
    assert result["chance_accuracy"] == pytest.approx(3 / 8)
    assert accuracy.format_table({"with_images": result}).splitlines()[-1].split() == ["chance", "37.5%"]
    assert open_samples(data)[1] == str(tmp_path / "images")
