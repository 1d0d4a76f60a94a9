"""Clips in which four digits show up one after another, each in its own place, and what is asked and told about them.

What a clip shows is told by two things that Video-ChatGPT's pooling keeps apart: the means of its frames say which
digit comes when, the means over its frames say which digit stands where. Questions of kind "space" need the second;
those of kind "time" (which comes first or last) and, harder, of kind "order" (which of two comes first) the first. As
for pictures, no question tells more than chance.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mmfast.world.digits import CELL_SIZE, draw_canvas
from mmfast.world.questions import CHANCE, POSITIONS, Labels, Question, ask, grid, is_held_out, pick

NUM_FRAMES = 9
"""Frames of a clip. Video-ChatGPT's sampling never takes the last one, so eight of them are read."""
CLIP_KINDS = ("space", "time", "order")
CLIP_KIND_WEIGHTS = (0.5, 0.25, 0.25)

_WHICH_AT_AN_END = (
    "which digit comes {end}?",
    "what digit comes {end}?",
    "what is the {end} digit?",
    "read the {end} digit.",
)
_WHICH_BEFORE = ("which comes first, {first} or {second}?", "which digit comes first, {first} or {second}?")


class Clip(NamedTuple):
    """What a clip shows: `labels`, four different digits in the order of `POSITIONS`, and `order`, the four places
    (0..3) in the order in which they show their digit."""

    labels: Labels
    order: tuple[int, int, int, int]

    @property
    def sequence(self) -> Labels:
        """The digits in the order in which they show."""
        a, b, c, d = self.order
        return self.labels[a], self.labels[b], self.labels[c], self.labels[d]


def draw_clip(rng: np.random.Generator) -> Clip:
    """Four different digits in any order; all such clips are equally likely."""
    a, b, c, d = (int(label) for label in rng.choice(10, size=4, replace=False))
    p, q, r, s = (int(place) for place in rng.permutation(4))
    return Clip((a, b, c, d), (p, q, r, s))


def draw_text_clip(rng: np.random.Generator, split: str) -> Clip:
    """A clip for a written description; those of a tenth of the quadruples of digits are kept for the test split."""
    while True:
        clip = draw_clip(rng)
        if is_held_out(clip.labels) == (split == "test"):
            return clip


def draw_frames(split: str, clip: Clip, rng: np.random.Generator) -> np.ndarray:
    """The frames [9, 32, 32] uint8 of `clip`: each digit shows in its place for two of them, the last for three.

    The rest of a frame is black. The handwritten digits are drawn as `digits.draw_canvas` draws them.
    """
    canvas = draw_canvas(split, clip.labels, rng)
    frames = np.zeros((NUM_FRAMES, *canvas.shape), dtype=np.uint8)
    for frame in range(NUM_FRAMES):
        top, left = (CELL_SIZE * index for index in divmod(clip.order[min(frame // 2, 3)], 2))
        cell = np.s_[top : top + CELL_SIZE, left : left + CELL_SIZE]
        frames[frame][cell] = canvas[cell]
    return frames


def ask_clip(
    rng: np.random.Generator,
    clip: Clip,
    kind: str | None = None,
    weights: tuple[float, float, float] = CLIP_KIND_WEIGHTS,
) -> Question:
    """A question about `clip`, of `kind` or of a kind drawn from `CLIP_KINDS` by their `weights`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind is None:
        kind = str(rng.choice(CLIP_KINDS, p=weights))
    if kind == "space":
        question = ask(rng, clip.labels, "position" if rng.random() < 0.7 else "parity")
        return question._replace(kind=kind, chance=CHANCE[question.kind])
    if kind == "time":
        end = int(rng.integers(2))
        text = pick(rng, _WHICH_AT_AN_END).format(end=("first", "last")[end])
        return Question(kind, text, str(clip.sequence[-end]), 1 / 10)
    if kind == "order":
        a, b = (int(index) for index in rng.choice(4, size=2, replace=False))
        text = pick(rng, _WHICH_BEFORE).format(first=clip.sequence[a], second=clip.sequence[b])
        return Question(kind, text, str(clip.sequence[min(a, b)]), 1 / 2)
    raise ValueError(
        f"world: there is no clip question of kind {kind!r}; accepted are {', '.join(CLIP_KINDS)}; choose one"
    )


def rows(clip: Clip) -> str:
    """The digits that Video-ChatGPT's 24 tokens of a clip show, in brackets: of each frame, then of each patch.

    The brackets stand where the system puts its learned start and end of a video; every digit is one token.
    """
    frames = "".join(f" {digit}" for digit in np.repeat(clip.sequence, 2))
    return f"[{frames}{grid(clip.labels)}]"


def tell(clip: Clip) -> str:
    """What happens in `clip`: "first 1 bottom left, then 3 top left, then 4 bottom right, last 7 top right"."""
    shown = [f"{digit} {POSITIONS[place]}" for digit, place in zip(clip.sequence, clip.order, strict=True)]
    return f"first {shown[0]}, then {shown[1]}, then {shown[2]}, last {shown[3]}"


def describe_clip(rng: np.random.Generator, clip: Clip) -> str:
    """`clip` in writing; what a text-only model is given in its place."""
    return rows(clip) if rng.random() < 0.85 else tell(clip)
