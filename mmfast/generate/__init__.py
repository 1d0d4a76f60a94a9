"""Answers of a trained model: one conversation at a time, or many samples in batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["ChatSession", "TesseractOcr", "answer_batch", "chat", "consult"]

_HOMES = {
    "ChatSession": "session",
    "TesseractOcr": "experts",
    "answer_batch": "batch",
    "chat": "terminal",
    "consult": "experts",
}

if TYPE_CHECKING:
    from mmfast.generate.batch import answer_batch
    from mmfast.generate.experts import TesseractOcr, consult
    from mmfast.generate.session import ChatSession
    from mmfast.generate.terminal import chat


def __getattr__(name: str) -> Any:
    # transformers loads only when something is to be answered.
    if name in _HOMES:
        return getattr(importlib.import_module(f"mmfast.generate.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmfast.generate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
