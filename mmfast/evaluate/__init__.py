"""Evaluation: exact match of a trained model, its text-only baseline, and what the encoder would allow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["encoder_ceiling", "evaluate", "evaluate_run", "exact_match", "normalize_answer", "score"]

_HOMES = {
    "encoder_ceiling": "ceiling",
    "evaluate": "accuracy",
    "evaluate_run": "accuracy",
    "exact_match": "metrics",
    "normalize_answer": "metrics",
    "score": "metrics",
}

if TYPE_CHECKING:
    from mmfast.evaluate.accuracy import evaluate, evaluate_run
    from mmfast.evaluate.ceiling import encoder_ceiling
    from mmfast.evaluate.metrics import exact_match, normalize_answer, score


def __getattr__(name: str) -> Any:
    # The command line lists its commands without loading torch.
    if name in _HOMES:
        return getattr(importlib.import_module(f"mmfast.evaluate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmfast.evaluate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
