"""SIGTERM and Ctrl-C as a request: the running step ends, a checkpoint is written, then the process stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest", "TrainingInterrupted"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(SystemExit):
    """Training was asked to stop and has saved; uncaught, it ends the process with its message, status 1."""


class StopRequest:
    """While entered, remembers SIGTERM and Ctrl-C instead of dying; the second Ctrl-C acts at once.

    Handlers can only be set in the main thread; elsewhere it never reports a request.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._listen()
        return self

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, signals act as they would without it."""
        self._restore()
        try:
            yield
        finally:
            if self.received is None:
                self._listen()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
