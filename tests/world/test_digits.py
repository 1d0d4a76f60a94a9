"""The digits and the canvases: splits that never mix, the same canvas everywhere."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mmfast.world.digits import digits_of, draw_canvas, enlarge, load_split


def test_load_split_divides_all_digits() -> None:
    train, test = load_split("train"), load_split("test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert sorted([*train.indices, *test.indices]) == list(range(1797))
    assert np.bincount(test.labels).tolist() == [36] * 10


def test_load_split_shares_no_picture() -> None:
    train, test = load_split("train"), load_split("test")
    assert not {digit.tobytes() for digit in train.pixels} & {digit.tobytes() for digit in test.pixels}


def test_load_split_keeps_pictures_and_labels_of_the_source() -> None:
    from sklearn.datasets import load_digits

    table = load_digits()
    for split in ("train", "test"):
        digits = load_split(split)
        assert np.array_equal(digits.pixels, table.images[digits.indices])
        assert np.array_equal(digits.labels, table.target[digits.indices])


def test_load_split_refuses_another_name() -> None:
    with pytest.raises(ValueError, match="no split 'valid'; accepted are train, test"):
        load_split("valid")


def test_load_split_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    load_split.cache_clear()
    with pytest.raises(ImportError, match=r"pip install mmfast\[world\]"):
        load_split("train")


def test_enlarge_keeps_grey_levels() -> None:
    flat = enlarge(np.full((8, 8), 8, dtype=np.uint8))
    assert flat.shape == (16, 16)
    assert np.allclose(flat, 0.5)
    ramp = enlarge(np.tile(np.arange(8, dtype=np.uint8), (8, 1)))
    assert np.allclose(np.diff(ramp[0])[1:-1], 1 / 32)


def test_draw_canvas_shows_test_digits_of_the_labels_in_order() -> None:
    labels = (3, 0, 7, 7)
    canvas = draw_canvas("test", labels, np.random.default_rng(5))
    cells = [canvas[:16, :16], canvas[:16, 16:], canvas[16:, :16], canvas[16:, 16:]]
    for cell, label in zip(cells, labels, strict=True):
        candidates = enlarge(load_split("test").pixels[digits_of("test", label)])
        assert np.abs(255 * candidates - cell).max(axis=(1, 2)).min() <= 0.5


def test_draw_canvas_is_decided_by_its_generator() -> None:
    first, again, other = (draw_canvas("train", (1, 2, 3, 4), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_draw_canvas_jitters_train_digits_only() -> None:
    def shows_digits_as_they_are(split: str) -> bool:
        cell = draw_canvas(split, (5, 5, 5, 5), np.random.default_rng(3))[:16, :16]
        candidates = enlarge(load_split(split).pixels[digits_of(split, 5)])
        return bool(np.abs(255 * candidates - cell).max(axis=(1, 2)).min() <= 0.5)

    assert shows_digits_as_they_are("test")
    assert not shows_digits_as_they_are("train")
