"""Fixtures of the tests of ops."""

from __future__ import annotations

import pytest
from op_cases import DEVICES, case, skip_if_lacking


@pytest.fixture(params=[case(backend) for backend in DEVICES])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that a test runs on."""
    skip_if_lacking(request.param)
    return request.param
