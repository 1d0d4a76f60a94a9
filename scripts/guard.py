"""Compares what ops read, write, launch and save, and what their C++ kernels execute, with what was accepted.

Prints every figure of tests/guard/counts.json and tests/guard/instructions.json that is another now, and fails if there
is one; --accept makes what is found the accepted. (scripts/compile_kernels.py does both for the Triton kernels.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Before Triton is imported: its kernels are counted where they would be interpreted.
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "shared"))

import torch
from guarded import counts, instructions, records
from guarded.cases import cases

from mmfast.ops.backends import machine


def counted() -> records.Record:
    """Every case on every backend; each must be there."""
    for backend in ("cpu", "triton"):
        if reason := machine(torch.device("cpu")).lacks(backend):
            sys.exit(f"guard: {backend} cannot be counted: {reason}")
    rows = {}
    for case in cases():
        for backend in counts.backends(case):
            rows |= counts.rows(case, backend)
    return records.Record(counts.versions(), rows)


def settle(
    path: Path, found: records.Record, accept: bool, tolerance: float = 0.0, versioned: Callable[[str], bool] = bool
) -> bool:
    """Whether the record at `path` and what is found agree, as they do once it is accepted.

    Args:
        versioned: whether a row depends on the versions, and is compared only where they are the accepted ones.
    """
    accepted = records.load(path)
    before, now = accepted.rows, found.rows
    if accepted.versions != found.versions and not accept:
        before, now = ({name: row for name, row in rows.items() if not versioned(name)} for rows in (before, now))
        print(
            f"{records.shown(path)}: {len(found.rows) - len(now)} rows NOT COMPARED, accepted of {accepted.versions}, "
            f"this is {found.versions}"
        )
    lines = records.differences(before, now, tolerance)
    print(f"{records.shown(path)}: {len(lines)} figures of {len(now)} rows are others{', accepted' * accept}")
    for line in lines:
        print(f"  {line}")
    if accept:
        records.save(path, found)
    elif lines:
        print(f"If that is meant: {records.ACCEPT}")
    return accept or not lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", action="store_true", help="make what is found the accepted")
    accept = parser.parse_args().accept

    agreed = settle(records.COUNTS, counted(), accept, versioned=lambda name: " | reference | " in name)
    if reason := instructions.missing():
        print(f"{records.shown(records.INSTRUCTIONS)}: NOT COMPARED, {reason}")
    else:
        found = records.Record(instructions.versions(), instructions.rows())
        agreed &= settle(records.INSTRUCTIONS, found, accept, instructions.TOLERANCE)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
