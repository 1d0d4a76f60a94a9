"""How the form of an answer is asked for: LLaVA-1.5's prompts for short answers and for multiple choice.

Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", section 3.2; LLaVA `docs/Evaluation.md`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import cast

from mmfast.data.samples import Message, Sample, TextPart, content_parts

ANSWER_FORMATS = {
    "short": "\nAnswer the question using a single word or phrase.",
    "letter": "\nAnswer with the option's letter from the given choices directly.",
}
"""What is written behind a question, by name."""


def with_answer_format(sample: Sample, name: str) -> Sample:
    """`sample` with the format's text behind its last question.

    Args:
        sample: with a user turn.
        name: one of `ANSWER_FORMATS`.

    Raises:
        ValueError: no such format, or no question.
    """
    if name not in ANSWER_FORMATS:
        raise ValueError(
            f"with_answer_format: there is no answer format {name!r}; accepted are {', '.join(ANSWER_FORMATS)}"
        )
    messages = list(sample["messages"])
    questions = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not questions:
        raise ValueError(f"with_answer_format: sample '{sample['id']}' has no question; a user turn is needed")
    last = questions[-1]
    parts, ending = list(content_parts(messages[last])), ANSWER_FORMATS[name]
    if parts and parts[-1]["type"] == "text":
        ending = cast(TextPart, parts.pop())["text"].rstrip() + ending
    messages[last] = cast(Message, {**messages[last], "content": [*parts, {"type": "text", "text": ending}]})
    return cast(Sample, {**sample, "messages": messages})


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """A question with its options on lines of their own, "A. ", "B. " and so on, that asks for the letter.

    Raises:
        ValueError: not 2 to 26 options.
    """
    if not 2 <= len(options) <= len(string.ascii_uppercase):
        raise ValueError(
            f"multiple_choice: {len(options)} options; 2 to {len(string.ascii_uppercase)} are accepted, a letter each"
        )
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, *lines]) + ANSWER_FORMATS["letter"]
