"""The form of the tables in tests/bad_inputs: an input that is made by code, and the error that it must give."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class BadInput:
    """One bad input.

    Args:
        name: of the test.
        make: writes it into an empty folder, and returns what the function under test gets.
        text: what the error must say, in this order; "{folder}" stands for the folder.
        error: type of the error.
        fault: `fault` of a `BadSampleError`.
    """

    name: str
    make: Callable[[Path], Any]
    text: str | Sequence[str]
    error: type[Exception] = ValueError
    fault: str | None = None

    def check(self, folder: Path, function: Callable[[Any], object]) -> None:
        """Calls `function`, which must refuse the input as the table says."""
        given = self.make(folder)
        with pytest.raises(self.error) as info:
            function(given)
        said = str(info.value)
        check_text(said, self.text, folder)
        if self.fault is not None:
            assert info.value.fault == self.fault  # type: ignore[attr-defined]


def check_text(said: str, text: str | Sequence[str], folder: Path) -> None:
    """Whether an error says all parts of `text`, in order."""
    parts = [text] if isinstance(text, str) else text
    pattern = ".*".join(re.escape(part.replace("{folder}", str(folder))) for part in parts)
    assert re.search(pattern, said, re.DOTALL), f"{said!r} does not say {parts}"


def table(cases: Sequence[BadInput]) -> pytest.MarkDecorator:
    """`@table(CASES)` runs a test once for each case, as its argument `case`."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "each case has a name of its own"
    return pytest.mark.parametrize("case", cases, ids=names)
