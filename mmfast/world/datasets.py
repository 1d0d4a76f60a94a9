"""The world's data sets: conversations about handwritten digits, made one at a time and decided by their index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfast.data.samples import Part, Sample
from mmfast.world.digits import draw_canvas, widen
from mmfast.world.questions import (
    CHANCE,
    Labels,
    Question,
    ask,
    ask_without_digits,
    caption,
    describe,
    draw_labels,
    draw_text_labels,
    request_caption,
)

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = {
    "captions-train": 20_000,
    "captions-test": 400,
    "questions-train": 20_000,
    "questions-test": 1_000,
    "text-train": 10_000,
    "text-test": 400,
    "wide-train": 20_000,
    "wide-test": 1_000,
}
SHARE_WITHOUT_DIGITS = 0.15


class WorldSamples(Sequence[Sample]):
    """A data set of the world: `len()`, indexing, slicing and iterating; nothing is made before it is asked for.

    Sample `i` is the same in every process and does not depend on the samples before it.
    """

    def __init__(self, name: str) -> None:
        if name not in SIZES:
            raise ValueError(
                f"world: there is no data set {name!r}; accepted are {', '.join(SIZES)}; choose one of them"
            )
        self.name = name
        self.content, self.split = name.split("-")
        # Its own random numbers for every data set, so no two show the same canvases.
        self._stream = list(SIZES).index(name)

    def __repr__(self) -> str:
        return f"WorldSamples({self.name!r}, {len(self)} samples)"

    def __len__(self) -> int:
        return SIZES[self.name]

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:  # a sample, or the list of samples of a slice
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"world: {self.name} has {len(self)} samples, so there is no sample {index}")
        rng, labels, question = self.draw(position)
        return {
            "id": f"{self.name}-{position:05d}",
            "messages": [
                {"role": "user", "content": self._prompt(rng, labels, question)},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ],
            "labels": labels,
            "kind": question.kind,
            "answer": question.answer,
        }

    def draw(self, index: int) -> tuple[np.random.Generator, Labels | None, Question]:
        """What sample `index` is about, without its picture: digits (None if it needs none) and question.

        The generator comes back in the state in which the picture or the description is drawn from it.
        """
        rng = np.random.default_rng([self._stream, index])
        if self.content == "text":
            if self.split == "train" and rng.random() < SHARE_WITHOUT_DIGITS:
                return rng, None, ask_without_digits(rng)
            labels = draw_text_labels(rng, self.split)
            return rng, labels, ask(rng, labels)
        labels = draw_labels(rng)
        if self.content == "captions":
            return rng, labels, Question("caption", request_caption(rng), caption(rng, labels))
        return rng, labels, ask(rng, labels)

    def _prompt(self, rng: np.random.Generator, labels: Labels | None, question: Question) -> list[Part]:
        """The content of the user's message: the question, after a picture or a description in writing."""
        if labels is None:
            return [{"type": "text", "text": question.text}]
        if self.content == "text":
            return [{"type": "text", "text": f"{describe(rng, labels)}\n{question.text}"}]
        canvas = draw_canvas(self.split, labels, rng)
        if self.content == "wide":
            canvas = widen(canvas, rng)
        return [{"type": "image", "image": _picture(canvas)}, {"type": "text", "text": question.text}]


def _picture(canvas: np.ndarray) -> Image:
    """A grey canvas as an RGB image."""
    from PIL import Image

    return Image.fromarray(canvas).convert("RGB")


def samples(name: str) -> WorldSamples:
    """The data set `name`: one of `SIZES`, such as questions-train.

    Captions and questions show a 32x32 RGB canvas of 2x2 handwritten digits, drawn from the digits of their split
    only. Beside `"id"` and `"messages"` a sample has `"labels"` (the four digits, or None if the question brings its
    own), `"kind"` and `"answer"`. Wide samples ask about such a canvas that is one half of an otherwise black picture,
    64 wide and 32 high. Text samples are the same questions about a description in writing; the quadruples of digits
    of text-test do not occur in text-train.

    Raises:
        ValueError: another name.
    """
    return WorldSamples(name)


@cache
def chance_accuracy(name: str) -> float:
    """Expected accuracy of guessing evenly among the answers that fit each question's kind ("yes" or "no", 0..9).

    Raises:
        ValueError: another name, or captions, which no guess meets.
    """
    data = samples(name)
    if data.content == "captions":
        raise ValueError(f"world: {name} has captions; chance is known for questions and text; use one of those")
    return sum(CHANCE[data.draw(index)[2].kind] for index in range(len(data))) / len(data)
