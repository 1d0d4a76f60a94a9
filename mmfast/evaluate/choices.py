"""Multiple-choice answers of the form "The answer is B.": which letter was given, and how many are right."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from mmfast.evaluate.metrics import score

__all__ = ["chosen_letter", "score_choices"]

_PATTERN = re.compile(r"The answer is ([A-Z])\b")


def chosen_letter(answer: str, choices: int) -> str | None:
    """The letter that an answer gives first, None without one of the first `choices` letters.

    Source: LaVIN `eval.py:163-176, 367-409`.
    """
    found = _PATTERN.search(answer)
    return found[1] if found and ord(found[1]) - ord("A") < choices else None


def score_choices(
    answers: Sequence[str],
    samples: Sequence[Any],
    unreadable: Literal["wrong", "random"] = "wrong",
    seed: int = 0,
) -> dict[str, Any]:
    """Counts right letters.

    Args:
        answers: What the model said.
        samples: Each with `choices`, `answer` (the right letter) and, if it has one, `kind`.
        unreadable: An answer without a letter is wrong, or a choice is drawn for it, as the published figures have it.
        seed: Of that draw.

    Returns:
        As `score`, and the number of answers without a letter as "unreadable".

    Raises:
        ValueError: If `unreadable` is another word.
    """
    if unreadable not in ("wrong", "random"):
        raise ValueError(f"score_choices: unreadable is {unreadable!r}; 'wrong' and 'random' are accepted")
    draw = random.Random(seed)
    letters = [chosen_letter(answer, len(sample["choices"])) for answer, sample in zip(answers, samples, strict=True)]
    failed = letters.count(None)
    if unreadable == "random":
        letters = [
            letter or chr(ord("A") + draw.randrange(len(sample["choices"])))
            for letter, sample in zip(letters, samples, strict=True)
        ]
    references = [sample["answer"] for sample in samples]
    counts = score([letter or "" for letter in letters], references, [sample.get("kind") for sample in samples])
    return {**counts, "unreadable": failed}
