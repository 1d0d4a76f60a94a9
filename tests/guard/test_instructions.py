"""Instructions of the C++ kernels, where valgrind can count them and where the accepted compiler made them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from guarded import instructions, records

from mmfast.ops import extension

pytestmark = pytest.mark.skipif(bool(instructions.missing()), reason=str(instructions.missing()))

ACCEPTED = records.load(records.INSTRUCTIONS)


def test_instructions_are_the_accepted_ones() -> None:
    versions = instructions.versions()
    if ACCEPTED.versions != versions:
        pytest.skip(f"NOT COMPARED: accepted of {ACCEPTED.versions}, this is {versions}; see docs/guard.md")
    lines = records.differences(ACCEPTED.rows, instructions.rows(), instructions.TOLERANCE)
    assert not lines, records.complaint(records.INSTRUCTIONS, lines)


def test_a_kernel_that_works_twice_is_noticed() -> None:
    """One, whatever ran before it, always takes as many instructions, and of twice as many rows twice as many."""

    def call(rows: int) -> tuple[str, Any]:
        tensors = [extension.described(torch.ones(rows, 512)) for _ in range(3)]
        return "swiglu_fwd_cpu", instructions.frozen((*tensors, 1))

    first, again, double = instructions.measure([call(64), call(64), call(128)])
    assert not records.differences({"calls": first}, {"calls": again}, instructions.TOLERANCE)
    assert 1.9 < double / again < 2.1


def test_what_the_extension_calls_is_not_its_own() -> None:
    called = "cob=/lib/libc.so\ncfn=memcpy\ncalls=1 0 \n0 7"
    profile = f"ob=/lib/libc.so\nfn=memcpy\n0 7\n\nob={extension.module().__file__}\nfn=kernel\n0 100\n{called}\n0 20"
    assert instructions.inside_extension(profile) == 120
