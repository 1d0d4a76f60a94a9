"""Evaluation of a model, with its answers given: what is asked, what is counted, what is written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmfast.data import get_template
from mmfast.evaluate import accuracy, ceiling, evaluate, evaluate_run
from mmfast.evaluate.samples import open_samples
from mmfast.world import chance_accuracy, samples

TEXT = {"type": "text", "text": "what is this?"}
SAMPLES = [
    {
        "id": "a",
        "messages": [{"role": "user", "content": [TEXT]}, {"role": "assistant", "content": "A cat."}],
    },
    {"id": "b", "answer": "dog", "kind": "animal", "messages": [{"role": "user", "content": [TEXT]}]},
    {
        "id": "c",
        "answer": "car",
        "kind": "thing",
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "c.png"}, TEXT]},
            {"role": "assistant", "content": "something else"},
        ],
    },
]


class Oracle:
    """Stands for `answer_batch`: says what it is told and remembers what it was asked."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers
        self.asked: list[Any] = []
        self.options: dict[str, Any] = {}

    def __call__(self, model: Any, questions: Any, batch_size: int, max_new_tokens: int, **options: Any) -> list[str]:
        self.asked = list(questions)
        self.options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, **options}
        return self.answers[: len(self.asked)]


@pytest.fixture
def model() -> Any:
    return SimpleNamespace(processor=SimpleNamespace(template=get_template("vicuna_v1")))


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "questions.json").write_text(json.dumps(SAMPLES))
    return str(tmp_path / "questions.json")


def oracle(monkeypatch: pytest.MonkeyPatch, *answers: str) -> Oracle:
    made = Oracle(list(answers))
    monkeypatch.setattr("mmfast.generate.answer_batch", made)
    return made


def test_one_reference_each_from_the_answer_or_the_last_turn(
    model: Any, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = oracle(monkeypatch, "a cat", "Dog.", "bus")
    result = evaluate(model, data, batch_size=2, max_new_tokens=5)
    assert result == {
        "data": data,
        "with_images": True,
        "answer_format": None,
        "n": 3,
        "accuracy": 2 / 3,
        "per_kind": {"animal": {"n": 1, "accuracy": 1.0}, "thing": {"n": 1, "accuracy": 0.0}},
        "chance_accuracy": None,
    }
    assert [message["role"] for sample in asked.asked for message in sample["messages"]] == ["user"] * 3
    assert asked.options["media_folder"] == str(Path(data).parent)
    assert (asked.options["batch_size"], asked.options["max_new_tokens"]) == (2, 5)
    assert evaluate(model, data, max_samples=1)["n"] == 1


def test_text_only_asks_the_same_without_images(model: Any, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = oracle(monkeypatch, "", "", "")
    evaluate(model, data, with_images=False)
    assert [sample["messages"][0]["content"] for sample in asked.asked] == [[TEXT]] * 3
    evaluate(model, data)
    assert asked.asked[2]["messages"][0]["content"][0]["type"] == "image"


def test_the_answer_format_stands_behind_every_question(model: Any, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = Oracle(["a cat", "dog", "car"])
    monkeypatch.setattr("mmfast.generate.answer_batch", oracle)
    for with_images in (True, False):
        result = evaluate(model, data, answer_format="short", with_images=with_images)
        assert (result["answer_format"], result["accuracy"]) == ("short", 1.0)
        endings = {sample["messages"][-1]["content"][-1]["text"] for sample in oracle.asked}
        assert endings == {"what is this?\nAnswer the question using a single word or phrase."}
    with pytest.raises(ValueError, match="no answer format 'long'"):
        evaluate(model, data, answer_format="long")


def test_a_sample_without_answer_is_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"id": "open", "messages": [{"role": "user", "content": "why?"}]}]))
    with pytest.raises(ValueError, match="sample 'open' has no answer to compare with"):
        evaluate(model, str(path))


def test_a_template_that_drops_questions_is_refused(model: Any, data: str) -> None:
    model.processor.template = get_template("plain")
    with pytest.raises(ValueError, match="'plain', which drops the question"):
        evaluate(model, data)


def test_evaluate_run_prints_and_writes(
    model: Any, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle(monkeypatch, "a cat", "dog", "bus")
    monkeypatch.setattr(accuracy, "_open", lambda run, *places: model)
    results = evaluate_run(str(tmp_path / "run"), data)
    assert json.loads((tmp_path / "run" / "evaluation-questions.json").read_text()) == results
    assert results.keys() == {"with_images", "text_only"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["kind", "questions", "with", "images", "text", "only"]
    assert printed[1].split() == ["animal", "1", "100.0%", "100.0%"]
    assert printed[3].split() == ["all", "3", "66.7%", "66.7%"]
    assert "text_only" not in evaluate_run(str(tmp_path), data, text_only=False, out=str(tmp_path / "o.json"))
    assert (tmp_path / "o.json").is_file()


def test_the_worlds_questions_bring_kinds_and_chance(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [sample["answer"] for sample in samples("questions-test")[:40]]
    oracle(monkeypatch, *right)
    result = evaluate(model, max_samples=40)
    assert result["accuracy"] == 1.0
    assert set(result["per_kind"]) == {"position", "parity", "presence", "comparison"}
    assert result["chance_accuracy"] == chance_accuracy("questions-test")


def test_open_samples_names_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none\.json"):
        open_samples(str(tmp_path / "none.json"))


def test_rules_answer_every_question_of_the_world() -> None:
    """With the true digits the ceiling's rules are always right, so what it measures is the encoder."""
    kinds: Counter[str] = Counter()
    for sample in samples("questions-test")[:400]:
        answer = ceiling.answer_from_digits(ceiling._question(sample), sample["kind"], sample["labels"])
        assert answer == sample["answer"], sample
        kinds[sample["kind"]] += 1
    assert min(kinds.values()) > 20
