"""What is asked and told about four digits: questions with short answers, captions, written descriptions.

All functions draw from the `numpy.random.Generator` they are given and from nothing else. Labels are four digits in
the order of `POSITIONS`. Questions are balanced: without the digits, no question tells more than chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

POSITIONS = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("position", "parity", "presence", "comparison")
# Reading a digit is the rarest to guess and the base of all others, so it is asked twice as often.
KIND_WEIGHTS = (0.4, 0.2, 0.2, 0.2)
CHANCE = {"position": 1 / 10, "parity": 1 / 2, "presence": 1 / 2, "comparison": 1 / 2, "counting": 1 / 10}

Labels = tuple[int, int, int, int]

_POSITION = (
    "what digit is {where}?",
    "which digit is {where}?",
    "what is the {where} digit?",
    "what number do you see {where}?",
    "read the {where} digit.",
)
_PARITY = (
    "is the {where} digit even or odd?",
    "is the digit {where} odd or even?",
    "even or odd: the {where} digit?",
)
_PRESENCE = (
    "is there a {digit}?",
    "do you see a {digit}?",
    "is any digit a {digit}?",
)
_COMPARISON_YES_NO = (
    "is {first} larger than {second}?",
    "is the {first} digit larger than the {second} digit?",
    "is {second} smaller than {first}?",
)
_COMPARISON_WHICH = (
    "which is larger, {first} or {second}?",
    "which digit is larger, {first} or {second}?",
)
_CAPTIONS = (
    "the digits are {0} {1} over {2} {3}",
    "the top row is {0} {1} and the bottom row is {2} {3}",
    "top left is {0}, top right is {1}, bottom left is {2}, bottom right is {3}",
)
_REQUESTS = (
    "describe the digits.",
    "what digits do you see?",
    "what are the four digits?",
)


class Question(NamedTuple):
    """A question about four digits with its one right answer.

    `chance` is how often an even guess among the answers that fit the question is right; None: `CHANCE` of its kind.
    """

    kind: str
    text: str
    answer: str
    chance: float | None = None


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def draw_labels(rng: np.random.Generator) -> Labels:
    """Four digits, each uniform in 0..9 and independent of the others."""
    first, second, third, fourth = (int(label) for label in rng.integers(0, 10, size=4))
    return first, second, third, fourth


def draw_text_labels(rng: np.random.Generator, split: str) -> Labels:
    """Four digits for a written description; a tenth of the 10,000 quadruples is kept for the test split."""
    while True:
        labels = draw_labels(rng)
        if is_held_out(labels) == (split == "test"):
            return labels


def is_held_out(labels: Labels) -> bool:
    """Whether descriptions of these four digits occur in the test split only."""
    number = labels[0] * 1000 + labels[1] * 100 + labels[2] * 10 + labels[3]
    # Multiplicative hashing (Knuth): spreads the held-out quadruples evenly over all digits and places.
    return (number * 2654435761 % 2**32) * 10 >> 32 == 0


def ask(
    rng: np.random.Generator,
    labels: Labels,
    kind: str | None = None,
    weights: tuple[float, float, float, float] = KIND_WEIGHTS,
) -> Question:
    """A question about `labels`, of `kind` or of a kind drawn from `KINDS` by their `weights`.

    Four equal digits cannot be compared: a drawn comparison then becomes a question of position.

    Raises:
        ValueError: an unknown kind, or a comparison of four equal digits.
    """
    if kind is None:
        kind = str(rng.choice(KINDS, p=weights))
        if kind == "comparison" and len(set(labels)) == 1:
            kind = "position"
    if kind == "comparison":
        return _ask_comparison(rng, labels)
    if kind == "presence":
        return _ask_presence(rng, labels)
    if kind not in KINDS:
        raise ValueError(f"world: there is no question of kind {kind!r}; accepted are {', '.join(KINDS)}; choose one")
    place = int(rng.integers(4))
    if kind == "position":
        return Question(kind, pick(rng, _POSITION).format(where=POSITIONS[place]), str(labels[place]))
    return Question(kind, pick(rng, _PARITY).format(where=POSITIONS[place]), parity(labels[place]))


def parity(digit: int) -> str:
    """ "even" or "odd"."""
    return "odd" if digit % 2 else "even"


def _ask_presence(rng: np.random.Generator, labels: Labels) -> Question:
    present = bool(rng.integers(2))
    candidates = [digit for digit in range(10) if (digit in labels) == present]
    digit = candidates[int(rng.integers(len(candidates)))]
    return Question("presence", pick(rng, _PRESENCE).format(digit=digit), "yes" if present else "no")


def _ask_comparison(rng: np.random.Generator, labels: Labels) -> Question:
    pairs = [(a, b) for a in range(4) for b in range(4) if labels[a] != labels[b]]
    if not pairs:
        raise ValueError(f"world: the digits {labels} are all equal; a comparison needs two that differ; draw again")
    a, b = pairs[int(rng.integers(len(pairs)))]
    first, second = POSITIONS[a], POSITIONS[b]
    if rng.integers(2):
        text = pick(rng, _COMPARISON_YES_NO).format(first=first, second=second)
        return Question("comparison", text, "yes" if labels[a] > labels[b] else "no")
    text = pick(rng, _COMPARISON_WHICH).format(first=first, second=second)
    return Question("comparison", text, first if labels[a] > labels[b] else second)


def ask_without_digits(rng: np.random.Generator) -> Question:
    """A question that brings its own digits: "which is larger, 3 or 7?"."""
    a, b = (int(digit) for digit in rng.choice(10, size=2, replace=False))
    form = int(rng.integers(4))
    if form == 0:
        return Question("comparison", f"which is larger, {a} or {b}?", str(max(a, b)))
    if form == 1:
        return Question("comparison", f"is {a} larger than {b}?", "yes" if a > b else "no")
    if form == 2:
        return Question("parity", f"is {a} even or odd?", parity(a))
    return Question("counting", f"what comes after {a}?", str((a + 1) % 10))


def caption(rng: np.random.Generator, labels: Labels) -> str:
    """A sentence that names all four digits, in one of three forms."""
    return pick(rng, _CAPTIONS).format(*labels)


def request_caption(rng: np.random.Generator) -> str:
    """A question that a caption answers."""
    return pick(rng, _REQUESTS)


def check_all_digits(labels: Labels) -> Question:
    """Whether each of the ten digits is there, in one answer: "0 no 1 yes 2 no ...". Text only, for training."""
    answer = " ".join(f"{digit} {'yes' if digit in labels else 'no'}" for digit in range(10))
    return Question("presence", "check every digit.", answer)


def grid(labels: Labels) -> str:
    """The digits as 16 in the reading order of a 4x4 grid of image patches, each digit covering 2x2 of them.

    Every digit is written with the space before it, so the tokens are 16: "  3 3 7 7 ..." has one space more.
    """
    a, b, c, d = labels
    return "".join(f" {digit}" for digit in (a, a, b, b) * 2 + (c, c, d, d) * 2)


def describe(rng: np.random.Generator, labels: Labels) -> str:
    """`labels` in writing, in one of many forms; what a text-only model is given in place of the picture."""
    form = rng.random()
    if form < 0.4:
        # With one and with two spaces after "USER:": an image marker leaves its space a token of its own.
        return grid(labels) if rng.random() < 0.7 else grid(labels)[1:]
    if form < 0.65:
        return caption(rng, labels)
    if form < 0.8:
        order = rng.permutation(4)
        return ", ".join(f"{POSITIONS[place]} is {labels[place]}" for place in order)
    a, b, c, d = labels
    if form < 0.9:
        return f"{a} {b}\n{c} {d}"
    return f"the grid {a} {b} {c} {d}"
