"""Exact match: an answer is right if it is the reference, but for case, surrounding space and a final period."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["exact_match", "normalize_answer", "score"]


def normalize_answer(text: str) -> str:
    """Lower case, without surrounding white space and without a final period."""
    return text.strip().removesuffix(".").rstrip().lower()


def exact_match(answer: str, reference: str) -> bool:
    """Whether both are the same after `normalize_answer`."""
    return normalize_answer(answer) == normalize_answer(reference)


def score(
    answers: Sequence[str], references: Sequence[str], kinds: Sequence[str | None] | None = None
) -> dict[str, Any]:
    """Counts exact matches.

    Args:
        answers: What the model said.
        references: What is right, one for each answer.
        kinds: The kind of each question, None for questions without one; None if there are no kinds at all.

    Returns:
        `{"n", "accuracy", "per_kind": {kind: {"n", "accuracy"}}}`, kinds in alphabetical order.

    Raises:
        ValueError: If the lengths differ or there is nothing to score.
    """
    kinds = [None] * len(answers) if kinds is None else kinds
    if not len(answers) == len(references) == len(kinds) or not answers:
        raise ValueError(
            f"score: {len(answers)} answers, {len(references)} references and {len(kinds)} kinds; the same number of "
            "each, at least one, is accepted"
        )
    marks = [exact_match(answer, right) for answer, right in zip(answers, references, strict=True)]
    by_kind: dict[str, list[bool]] = {}
    for kind, mark in zip(kinds, marks, strict=True):
        if kind is not None:
            by_kind.setdefault(kind, []).append(mark)
    return {**_share(marks), "per_kind": {kind: _share(by_kind[kind]) for kind in sorted(by_kind)}}


def _share(marks: Sequence[bool]) -> dict[str, Any]:
    return {"n": len(marks), "accuracy": sum(marks) / len(marks)}
