"""Real handwritten digits in two disjoint splits, and canvases that show four of them.

Source: scikit-learn's `load_digits`, 1,797 digits of 8x8 pixels with 17 grey levels: the test part of "Optical
Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository 1998, CC BY 4.0).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "test")
TEST_DIGITS = 360
GREY_LEVELS = 16
DIGIT_SIZE = 8
CELL_SIZE = 16
CANVAS_SIZE = 2 * CELL_SIZE
_SPLIT_SEED = 20240131


class Digits(NamedTuple):
    """The digits of one split.

    `pixels` [N, 8, 8] uint8 in 0..16, `labels` [N] int64 in 0..9, `indices` [N] int64: rows of scikit-learn's table.
    """

    pixels: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


@cache
def load_split(split: str) -> Digits:
    """The digits of `split`, "train" (1,437) or "test" (360); the same ones on every machine.

    Of every digit 0..9 a fifth is kept for testing (36 each), chosen once by a fixed seed.

    Raises:
        ValueError: another split's name.
        ImportError: scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise ValueError(f"world: there is no split {split!r}; accepted are {', '.join(SPLITS)}; choose one of them")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "world: the digits come with scikit-learn, which is not installed; `pip install mmfast[world]`"
        ) from error
    table = load_digits()
    labels = table.target.astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        held_out[order[labels[order] == digit][: TEST_DIGITS // 10]] = True
    indices = np.flatnonzero(held_out if split == "test" else ~held_out)
    return Digits(table.images[indices].astype(np.uint8), labels[indices], indices)


@cache
def digits_of(split: str, label: int) -> np.ndarray:
    """Rows of `load_split(split)` that show `label`."""
    return np.flatnonzero(load_split(split).labels == label)


@cache
def _upscaling() -> np.ndarray:
    """[16, 8] weights that enlarge one axis two times, linearly between pixel centres."""
    centres = (np.arange(CELL_SIZE) + 0.5) / 2 - 0.5
    distance = np.abs(np.clip(centres, 0, DIGIT_SIZE - 1)[:, None] - np.arange(DIGIT_SIZE))
    return np.clip(1 - distance, 0, None).astype(np.float32)


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """Digits [..., 8, 8] in 0..16 as grey cells [..., 16, 16] float32 in 0..1."""
    weights = _upscaling()
    return weights @ (pixels.astype(np.float32) / GREY_LEVELS) @ weights.T


def draw_canvas(split: str, labels: tuple[int, int, int, int], rng: np.random.Generator) -> np.ndarray:
    """A canvas [32, 32] uint8 of four handwritten digits of `split`, in the order of `questions.POSITIONS`.

    Which handwritten digit stands for a label is drawn from `rng`. In the train split every cell is also moved by up
    to one pixel and made fainter by up to a quarter; test canvases show the digits as they are.
    """
    digits = load_split(split)
    rows = [int(rng.choice(digits_of(split, label))) for label in labels]
    cells = enlarge(digits.pixels[rows])
    if split == "train":
        cells = np.stack([_jitter(cell, rng) for cell in cells])
    canvas = np.block([[cells[0], cells[1]], [cells[2], cells[3]]])
    return np.rint(255 * canvas).astype(np.uint8)


def widen(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A black picture [32, 64] uint8, whose left or right half, drawn from `rng`, is the canvas [32, 32]."""
    halves = [np.zeros_like(canvas), np.zeros_like(canvas)]
    halves[int(rng.integers(2))] = canvas
    return np.hstack(halves)


def _jitter(cell: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The cell [16, 16] moved by -1, 0 or 1 pixel along each axis (the rim is black) and fainter by up to 25 %."""
    down, right = rng.integers(0, 3, size=2)
    padded = np.pad(cell, 1)
    return padded[down : down + CELL_SIZE, right : right + CELL_SIZE] * rng.uniform(0.75, 1.0)
