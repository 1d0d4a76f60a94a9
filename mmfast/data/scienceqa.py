"""ScienceQA's questions as samples, written as LaVIN asks and answers them (its format QCM-ALE).

Source: https://github.com/lupantech/ScienceQA (the files); LaVIN `util/base_prompt.py`, `util/datasets.py` (the texts).
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from mmfast.data.samples import Part, Sample, check_media_path

__all__ = ["load_scienceqa", "scienceqa_answer", "scienceqa_question"]

_LETTERS = string.ascii_uppercase


def load_scienceqa(
    path: str | os.PathLike[str], split: str, media_folder: str | os.PathLike[str] | None = None
) -> list[Sample]:
    """Reads one split of ScienceQA's `problems.json`.

    A sample has, beside its conversation, `answer` (the letter), `choices`, and `kind` (the subject). Its image is
    `<the problem's split>/<problem>/<image>` in the media folder. Render it with the template `lavin_scienceqa`, which
    ends the question with "Response:".

    Args:
        path: The file: problems by their ids. A `pid_splits.json` beside it says which are in a split; without one the
            field `split` of each problem does.
        split: "train", "val", "test" or another one that the files have.
        media_folder: Folder of the splits' images. None: `images` beside the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: broken JSON, no such split, or a problem that lacks a field or has one of another form; names it.
    """
    path = Path(path)
    problems = _read_object(path)
    splits = path.parent / "pid_splits.json"
    if splits.is_file():
        names: dict[str, list[str]] = _read_object(splits)
    else:
        names = {}
        for name, problem in problems.items():
            names.setdefault(str(_field(problem, "split", str, f"{path}: problem '{name}'")), []).append(name)
    if split not in names:
        raise ValueError(f"{path}: there is no split {split!r}; accepted are {', '.join(sorted(names))}")
    folder = path.parent / "images" if media_folder is None else Path(media_folder)
    samples = []
    for name in names[split]:
        where = f"{path}: problem '{name}'"
        if name not in problems:
            raise ValueError(f"{where} of split {split!r} is not in the file; are both files of one release?")
        samples.append(_sample(problems[name], name, split, folder, where))
    if not samples:
        raise ValueError(f"{path}: the split {split!r} is empty; one with a problem at least is accepted")
    return samples


def scienceqa_question(problem: Mapping[str, Any]) -> str:
    """Question, context and options of a problem, without the caption that the code leaves out by default."""
    context = (problem.get("hint") or "").strip() or "N/A"
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, problem["choices"], strict=False))
    return f"Question: {problem['question']}\nContext: {context}\nOptions: {options}".replace("  ", " ")


def scienceqa_answer(problem: Mapping[str, Any]) -> str:
    """What is learned: the letter, then lecture and solution with their line breaks written out.

    Without these two it ends in "BECAUSE:", as in the published training, where taking it off had no effect.
    """
    lecture, solution = ((problem.get(key) or "").replace("\n", "\\n") for key in ("lecture", "solution"))
    text = f"The answer is {_LETTERS[problem['answer']]}. BECAUSE: {lecture} {solution}"
    return text.replace("  ", " ").strip()


def _sample(problem: Any, name: str, split: str, folder: Path, where: str) -> Sample:
    _field(problem, "question", str, where)
    choices = _field(problem, "choices", list, where)
    answer = _field(problem, "answer", int, where)
    if not 1 < len(choices) <= len(_LETTERS) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer is {answer} of {len(choices)} choices; one of 2 to 26 is accepted")
    parts: list[Part] = [{"type": "text", "text": scienceqa_question(problem)}]
    if problem.get("image"):
        image = f"{problem.get('split', split)}/{name}/{problem['image']}"
        check_media_path(image, folder, where)
        parts.insert(0, {"type": "image", "image": image})
    return cast(
        Sample,
        {
            "id": f"scienceqa-{name}",
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": scienceqa_answer(problem)},
            ],
            "answer": _LETTERS[answer],
            "choices": choices,
            "kind": problem.get("subject") or "science",
        },
    )


def _field(problem: Any, name: str, kind: type, where: str) -> Any:
    value = problem.get(name) if isinstance(problem, Mapping) else None
    if not isinstance(value, kind):
        raise ValueError(
            f"{where}: {name} is {value!r}; a {kind.__name__} is accepted, as in ScienceQA's problems.json"
        )
    return value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON: {error}; ScienceQA's file is accepted") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; an object of problems, or of splits, is accepted")
    return content
