"""ScienceQA's files: what becomes of a problem, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmfast.data import get_template
from mmfast.data.scienceqa import load_scienceqa
from mmfast.data.templates import MediaPiece, Piece

PROBLEMS: dict[str, dict[str, Any]] = {
    "1": {
        "question": "Which is  furthest north?",
        "choices": ["Ohio", "Maine", "Texas"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "subject": "social science",
        "lecture": "Maps have\nfour directions.",
        "solution": "Look  up.",
        "split": "train",
    },
    "2": {
        "question": "Is ice solid?",
        "choices": ["yes", "no"],
        "answer": 0,
        "hint": "It is cold.",
        "image": None,
        "subject": "natural science",
        "lecture": "",
        "solution": "",
        "split": "test",
    },
}


def write(folder: Path, **changes: Any) -> Path:
    problems = {**PROBLEMS, "1": {**PROBLEMS["1"], **changes}}
    (folder / "problems.json").write_text(json.dumps(problems))
    return folder / "problems.json"


def test_a_problem_becomes_a_sample(tmp_path: Path) -> None:
    (sample,) = load_scienceqa(write(tmp_path), "train")
    question = "Question: Which is furthest north?\nContext: N/A\nOptions: (A) Ohio (B) Maine (C) Texas"
    answer = "The answer is B. BECAUSE: Maps have\\nfour directions. Look up."
    assert sample == {
        "id": "scienceqa-1",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "train/1/image.png"}, {"type": "text", "text": question}],
            },
            {"role": "assistant", "content": answer},
        ],
        "answer": "B",
        "choices": ["Ohio", "Maine", "Texas"],
        "kind": "social science",
    }
    pieces = get_template("lavin_scienceqa").render(sample["messages"])
    texts = [piece.text for piece in pieces if isinstance(piece, Piece)]
    assert [type(piece) for piece in pieces[:2]] == [Piece, MediaPiece]
    assert texts == ["Image: ", question, "\nResponse:", answer]


def test_a_problem_without_image(tmp_path: Path) -> None:
    (sample,) = load_scienceqa(write(tmp_path), "test")
    pieces = get_template("lavin_scienceqa").render(sample["messages"])
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    assert text == (
        "Image: N/A Question: Is ice solid?\nContext: It is cold.\nOptions: (A) yes (B) no\nResponse:"
        "The answer is A. BECAUSE:"
    )


def test_a_file_of_splits_decides(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "pid_splits.json").write_text(json.dumps({"minitrain": ["2", "1"], "test": ["3"]}))
    samples = load_scienceqa(path, "minitrain")
    assert [sample["id"] for sample in samples] == ["scienceqa-2", "scienceqa-1"]
    assert samples[1]["messages"][0]["content"][0]["image"] == "train/1/image.png"  # type: ignore[index]
    with pytest.raises(ValueError, match="there is no split 'train'; accepted are minitrain, test"):
        load_scienceqa(path, "train")
    with pytest.raises(ValueError, match="problem '3' of split 'test' is not in the file"):
        load_scienceqa(path, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 3}, "problem '1': answer is 3 of 3 choices; one of 2 to 26 is accepted"),
        ({"answer": "B"}, "problem '1': answer is 'B'; a int is accepted"),
        ({"choices": None}, "problem '1': choices is None; a list is accepted"),
        ({"question": None}, "problem '1': question is None; a str is accepted"),
        ({"image": "../../etc/passwd"}, "leaves the media folder"),
    ],
)
def test_malformed_problems(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_scienceqa(write(tmp_path, **changes), "train")


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list; an object of problems"):
        load_scienceqa(tmp_path / "list.json", "train")
    (tmp_path / "cut.json").write_text('{"1": ')
    with pytest.raises(ValueError, match="broken JSON"):
        load_scienceqa(tmp_path / "cut.json", "train")
