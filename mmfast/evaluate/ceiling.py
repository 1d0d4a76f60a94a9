"""How far the world's questions can be answered from what the frozen encoder sees, without any language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.evaluate.metrics import exact_match

if TYPE_CHECKING:
    from mmfast.data.samples import Sample
    from mmfast.models.base import MultimodalModel

__all__ = ["answer_from_digits", "encoder_ceiling"]

_BATCH = 250


@torch.no_grad()
def encoder_ceiling(model: MultimodalModel, train_images: int = 1500, max_samples: int | None = None) -> float:
    """Accuracy on world:questions-test of a reader that sees the encoder's features and knows the rules.

    A linear probe (ridge regression, in closed form) is fitted to the digits of `train_images` training images. It
    reads the four digits of each test image, and the question is answered from these. Sample by sample a model may
    be luckier, but in the long run none that reads the features linearly is better.

    Args:
        model: A model on the world's encoder, with its processor.
        train_images: Images of captions-train that fit the probe.
        max_samples: Only the first so many questions. None: all.
    """
    from mmfast.world import samples

    train, test = samples("captions-train")[:train_images], samples("questions-test")[:max_samples]
    labels = torch.tensor([sample["labels"] for sample in train]).flatten()
    read = _ridge(_cell_features(model, train), F.one_hot(labels, 10).double(), _cell_features(model, test))
    digits = read.argmax(-1).view(-1, 4).tolist()
    right = [
        exact_match(answer_from_digits(_question(sample), sample["kind"], seen), sample["answer"])
        for sample, seen in zip(test, digits, strict=True)
    ]
    return sum(right) / len(right)


def answer_from_digits(question: str, kind: str, digits: Sequence[int]) -> str:
    """The right answer to a question of the world about these four digits.

    Args:
        question: The question's text.
        kind: position, parity, presence or comparison.
        digits: Top left, top right, bottom left, bottom right.
    """
    from mmfast.world.questions import POSITIONS

    if kind == "presence":
        found = re.search(r"\d", question)
        return "yes" if found and int(found.group()) in digits else "no"
    named = sorted((question.index(name), place) for place, name in enumerate(POSITIONS) if name in question)
    places = [place for _, place in named]
    if kind == "position":
        return str(digits[places[0]])
    if kind == "parity":
        return "odd" if digits[places[0]] % 2 else "even"
    first, second = places
    if question.startswith("which"):
        return POSITIONS[first if digits[first] > digits[second] else second]
    if "smaller" in question:
        first, second = second, first
    return "yes" if digits[first] > digits[second] else "no"


def _question(sample: Sample) -> str:
    from mmfast.data.samples import content_parts

    parts = content_parts(sample["messages"][0])
    return "".join(cast(Any, part)["text"] for part in parts if part["type"] == "text").strip()


def _cell_features(model: MultimodalModel, samples: Sequence[Sample]) -> Tensor:
    """[4 n, 4 D] float64: the features of the four patches that a digit covers, side by side."""
    processor: Any = model.processor
    features = []
    for start in range(0, len(samples), _BATCH):
        images = [image for sample in samples[start : start + _BATCH] for image in processor.encode(sample).media]
        seen = model.encoder(torch.stack(images).to(model.device))
        features.append(seen.double().cpu())
    stacked = torch.cat(features)
    count, _, width = stacked.shape
    # The 4x4 patches as [n, cell row, patch row, cell column, patch column, D].
    grid = stacked.view(count, 2, 2, 2, 2, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(count * 4, 4 * width)


def _ridge(features: Tensor, targets: Tensor, unseen: Tensor, penalty: float = 1e-2) -> Tensor:
    """Targets of `unseen` by ridge regression on standardised features; `penalty` is per sample."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = (features - mean) / std, targets - targets.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return (unseen - mean) / std @ torch.linalg.solve(gram, x.T @ y)
