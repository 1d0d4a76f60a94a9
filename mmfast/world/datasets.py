"""The world's data sets: conversations about pictures, clips and descriptions of handwritten digits.

Samples are made one at a time and decided by their index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfast.data.samples import Part, Sample
from mmfast.world.clips import Clip, ask_clip, describe_clip, draw_clip, draw_frames, draw_text_clip
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
    "clips-train": 20_000,
    "clips-test": 1_000,
    "cliptext-train": 10_000,
    "cliptext-test": 400,
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
        rng, shown, question = self.draw(position)
        return {
            "id": f"{self.name}-{position:05d}",
            "messages": [
                {"role": "user", "content": self._prompt(position, rng, shown, question)},
                {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
            ],
            **({"labels": shown.labels, "order": shown.order} if isinstance(shown, Clip) else {"labels": shown}),
            "kind": question.kind,
            "answer": question.answer,
        }

    def draw(self, index: int) -> tuple[np.random.Generator, Labels | Clip | None, Question]:
        """What sample `index` is about, without its picture: digits or a clip (None if it needs none) and question.

        The generator comes back in the state in which the picture or the description is drawn from it.
        """
        rng = np.random.default_rng([self._stream, index])
        if self.content in ("clips", "cliptext"):
            clip = draw_clip(rng) if self.content == "clips" else draw_text_clip(rng, self.split)
            return rng, clip, ask_clip(rng, clip)
        if self.content == "text":
            if self.split == "train" and rng.random() < SHARE_WITHOUT_DIGITS:
                return rng, None, ask_without_digits(rng)
            labels = draw_text_labels(rng, self.split)
            return rng, labels, ask(rng, labels)
        labels = draw_labels(rng)
        if self.content == "captions":
            return rng, labels, Question("caption", request_caption(rng), caption(rng, labels))
        return rng, labels, ask(rng, labels)

    def _prompt(
        self, index: int, rng: np.random.Generator, shown: Labels | Clip | None, question: Question
    ) -> list[Part]:
        """The content of the user's message: the question, after a picture or a description in writing.

        Clips stand after the question, in the train split in every second sample before it: see `mmfast.data.videos`.
        """
        if shown is None:
            return [{"type": "text", "text": question.text}]
        if isinstance(shown, Clip):
            clip_first = self.split == "train" and index % 2 == 1
            if self.content == "cliptext":
                parts = [describe_clip(rng, shown), question.text]
                return [{"type": "text", "text": "\n".join(parts if clip_first else reversed(parts))}]
            frames = [_picture(frame) for frame in draw_frames(self.split, shown, rng)]
            video: Part = {"type": "video", "video": frames}
            if clip_first:
                return [video, {"type": "text", "text": question.text}]
            return [{"type": "text", "text": question.text + "\n"}, video]
        if self.content == "text":
            return [{"type": "text", "text": f"{describe(rng, shown)}\n{question.text}"}]
        canvas = draw_canvas(self.split, shown, rng)
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

    Clips show eight such canvases, on which the digits come one after another; their samples also have `"order"`
    (see `clips.Clip`), and their kinds are space, time and order. Cliptext is to clips what text is to questions.

    Raises:
        ValueError: another name.
    """
    return WorldSamples(name)


@cache
def chance_accuracy(name: str) -> float:
    """Expected accuracy of guessing evenly among the answers that fit each question ("yes" or "no", 0..9, a place).

    Raises:
        ValueError: another name, or captions, which no guess meets.
    """
    data = samples(name)
    if data.content == "captions":
        raise ValueError(f"world: {name} has captions; chance is known for questions; use another data set")
    questions = [data.draw(index)[2] for index in range(len(data))]
    return sum(CHANCE[asked.kind] if asked.chance is None else asked.chance for asked in questions) / len(data)
