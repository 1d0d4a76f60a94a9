"""`pytest benchmarks`: a test for each provider of each case, so that pytest-benchmark compares, stores and plots them.

All providers of a case are measured together, as `mmfast bench` does it, when its first test runs; each test then hands
its own samples to pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mmfast.benchmarks import harness, suite


class Replay:
    """A timer of pytest-benchmark whose differences are samples that were taken before."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._times: list[float] = []

    def load(self, samples: Sequence[float]) -> None:
        """Takes samples in seconds; each of them is a start at 0 and an end."""
        self._times = [time for sample in reversed(samples) for time in (sample, 0.0)]

    def __call__(self) -> float:
        return self._times.pop()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cpu", choices=["cpu", "cuda"], help="where the benchmarks run")
    parser.addoption("--bench-quick", action="store_true", help="the first cases of each op alone")
    parser.addoption("--bench-untested", action="store_true", help="without the ops' own tests first")


def settings_of(config: pytest.Config) -> harness.Settings:
    return harness.Settings(config.getoption("--bench-device"), config.getoption("--bench-quick"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = []
    for op in suite.op_names():
        for case in suite.cases(op, settings_of(metafunc.config)):
            for provider in case.names():
                replay = Replay()
                mark = pytest.mark.benchmark(timer=replay, group=str(case))
                found.append(pytest.param(case, provider, replay, marks=mark, id=f"{case}: {provider}"))
    metafunc.parametrize(("case", "provider", "replay"), found)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[harness.Case], harness.Measured]:
    """What `harness.run` gives for a case, measured once."""
    kept: dict[str, Any] = {}
    settings = settings_of(pytestconfig)
    if settings.device == "cpu":
        harness.allow_buffer_reuse()

    def run(case: harness.Case) -> harness.Measured:
        if case.op not in kept:
            kept[case.op] = pytestconfig.getoption("--bench-untested") or suite.run_tests(case.op, settings.device)
        if str(case) not in kept:
            kept[str(case)] = harness.run(case, settings)
        return kept[str(case)]

    return run
