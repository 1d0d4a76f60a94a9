"""`mmfast bench`: runs the benchmarks of ops and modules, prints their tables and writes their JSON."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmfast.benchmarks import __path__ as FOLDERS
from mmfast.benchmarks import harness
from mmfast.benchmarks.harness import Case, Row, Settings
from mmfast.files import write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]
# Whole training steps and plans of memory: they take minutes and are measured when they are named.
SYSTEMS = ("optimize", "packing", "plan", "train")
# Of an op's tests, those of the backends that are timed; they take two to four seconds.
CPU_TESTS = "(cpu or gradient or float64) and not triton and not compile"


def op_names() -> list[str]:
    """The ops and modules that have a benchmark."""
    found = {path.stem.removeprefix("bench_") for folder in FOLDERS for path in Path(folder).glob("bench_*.py")}
    return sorted(found - set(SYSTEMS))


def cases(op: str, settings: Settings) -> list[Case]:
    """The cases of one op; no tensor is made yet."""
    found: Iterator[Case] = _module(op).cases(settings.device, settings.quick)
    return list(found)


def bench(
    *ops: str,
    device: str | None = None,
    quick: bool = False,
    rounds: int = 5,
    threads: int | None = None,
    out: Path | None = None,
    untested: bool = False,
) -> None:
    """Times ops against eager PyTorch and their peers, after all results agreed, and prints a table.

    Args:
        ops: Names of ops or modules; all by default. Also `optimize`, `packing`, `plan`, `train`: whole steps.
        device: "cpu" or "cuda"; by default the GPU, if there is one.
        quick: The first cases of each alone; on a GPU those of the table in README.md.
        rounds: Timed rounds at the least; each runs every provider once. Short calls get more.
        threads: CPU threads; by default as many as PyTorch takes.
        out: Folder for one JSON file an op; by default nothing is written.
        untested: Does not run the op's own tests first. Results are compared all the same.

    Raises:
        ValueError: There is no such op or device, or a number is below 1.
        RuntimeError: A result is wrong, or a test of the op fails; nothing was timed.
    """
    known = [*op_names(), *SYSTEMS]
    if unknown := [op for op in ops if op not in known]:
        raise ValueError(f"bench: there is no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device is {device!r}; cpu and cuda are accepted")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: device is 'cuda', and PyTorch sees no CUDA device; use --device cpu")
    for name, number in (("rounds", rounds), ("threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"bench: {name} is {number}; 1 or more are accepted")
    if threads is not None:
        torch.set_num_threads(threads)
    if device == "cpu":
        harness.allow_buffer_reuse()
    settings = Settings(device, quick, rounds)
    for op in ops or op_names():
        tested = "not run" if untested or op in SYSTEMS else run_tests(op, device)
        rows = list(_module(op).rows(settings)) if op in SYSTEMS else rows_of(op, settings)
        report(op, rows, harness.environment(device, tested), out)


def rows_of(op: str, settings: Settings) -> list[Row]:
    """All rows of one op, with a bar that says where it is."""
    rows: list[Row] = []
    bar = tqdm(cases(op, settings), desc=op, unit="case", disable=not sys.stderr.isatty())
    for case in bar:
        bar.set_postfix_str(f"{case.name}, {case.mode}")
        rows += harness.run(case, settings).rows
    return rows


def report(op: str, rows: Sequence[Row], environment: dict[str, Any], out: Path | None) -> None:
    """Prints the rows as a table and, with `out`, writes `<out>/<op>.json`."""
    where = f"{environment['device']}, torch {environment['torch']}, {environment['threads']} threads"
    print(f"\n{op} on {where}, {environment['date']}\n{harness.table(rows)}", flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"{op}.json", harness.document(op, rows, environment))


def run_tests(op: str, device: str) -> str:
    """Runs the op's own tests of what is timed on this device, once for each state of the sources.

    Returns:
        "passed", or "none here" in an installed package, which has no tests.

    Raises:
        RuntimeError: A test fails.
    """
    file = next((path for part in ("ops", "nn") if (path := ROOT / f"tests/{part}/test_{op}.py").is_file()), None)
    if file is None:
        return "none here"
    remembered = ROOT / f"build/bench/{op}-{device}"
    state = _state(file)
    if remembered.is_file() and remembered.read_text() == state:
        return "passed"
    selected = ["-m", "gpu"] if device == "cuda" else ["-k", CPU_TESTS] if file.parent.name == "ops" else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected, str(file)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    if ran.returncode == 5:
        return "none here"  # no test of this file is for this device
    if ran.returncode:
        raise RuntimeError(f"bench: tests of {op} fail, so it is not timed:\n{ran.stdout[-2000:]}{ran.stderr[-500:]}")
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(remembered, state)
    return "passed"


def _state(test: Path) -> str:
    """A digest of all that the tests of an op depend on."""
    patterns = ("mmfast/ops/*.py", "mmfast/nn/*.py", "kernels/*.py", "mmfast/_C*", "tests/shared/*.py")
    files = itertools.chain(*(sorted(ROOT.glob(pattern)) for pattern in patterns), [test])
    digest = hashlib.sha256(torch.__version__.encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _module(op: str) -> Any:
    return importlib.import_module(f"mmfast.benchmarks.bench_{op}")
