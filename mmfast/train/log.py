"""What a run says: a line of JSON for each step, and a progress bar for whoever is watching."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

from mmfast.files import explained_writing, write_atomically

__all__ = ["Display", "StepLog"]


class StepLog:
    """`log.jsonl`: one JSON object a line, written at once, in step order without gaps or repeats.

    Args:
        path: The file.
        done: Steps of the run that are done. Lines of later steps, which a resumed run will do again, are
            removed, and so is a line that was cut off.
        enabled: Whether this process writes; only one of a run does.
    """

    def __init__(self, path: Path, done: int, enabled: bool = True) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        if enabled:
            if path.exists():
                write_atomically(path, "".join(_lines_up_to(path, done)))
            with explained_writing(path):
                # Without a buffer, so that nothing is left to be written, and to fail again, when it is closed.
                self._file = cast(BinaryIO, open(path, "ab", buffering=0))  # noqa: SIM115  # open for the whole run

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            OSError: If it cannot be written, as on a full disk.
        """
        if self._file is not None:
            line = json.dumps(record, allow_nan=False).encode() + b"\n"
            with explained_writing(self._path):
                while line:
                    line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Brings the lines to the disk, as a checkpoint must not be newer than its log."""
        if self._file is not None:
            with explained_writing(self._path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lines_up_to(path: Path, done: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= done:
                kept.append(line)
        except (KeyError, TypeError, ValueError):
            continue
    return kept


class Display:
    """A progress bar with the loss on a terminal; elsewhere a plain line now and then. Nothing if disabled.

    Args:
        name: What is shown in front.
        total: Steps of the stage.
        done: Steps done already.
        enabled: Whether this process shows anything.
        seconds_between_lines: How often a line is printed where there is no terminal.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, enabled: bool = True, seconds_between_lines: float = 15.0
    ) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=name,
            unit="step",
            disable=not (enabled and terminal),
            mininterval=0.2,
        )
        self._lines = enabled and not terminal
        self._name, self._total, self._first = name, total, done
        self._between = seconds_between_lines
        self._started = self._last_line = time.monotonic()

    def update(self, step: int, loss: float, token_accuracy: float) -> None:
        """Shows that `step` steps of the stage are done."""
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, token accuracy {token_accuracy:.3f}", refresh=False)
            self._bar.update(1)
        now = time.monotonic()
        if self._lines and (step == self._total or now - self._last_line >= self._between):
            left = (now - self._started) / max(1, step - self._first) * (self._total - step)
            self._last_line = now
            print(
                f"{self._name}: step {step}/{self._total}, loss {loss:.4f}, "
                f"token accuracy {token_accuracy:.3f}, {left:.0f} s left",
                flush=True,
            )

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if not self._bar.disable:
            self._bar.write(text)
        elif self._lines:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
