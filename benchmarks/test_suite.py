"""One test for each provider of each case; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmfast.benchmarks.harness import Case, Measured


def test_provider(benchmark: Any, measured: Callable[[Case], Measured], case: Case, provider: str, replay: Any) -> None:
    found = measured(case)
    row = next(row for row in found.rows if row["provider"] == provider)
    if "left out" in row:
        pytest.skip(f"{provider}: {row['left out']}")
    benchmark.extra_info.update(row)
    samples = [milliseconds / 1e3 for milliseconds in found.samples[provider]]
    replay.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)
