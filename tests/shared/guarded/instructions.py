"""Instructions that the C++ kernels execute, by valgrind: the same number each time, whatever else the machine does.

Valgrind's CPU has AVX2 and no AVX-512, whatever the real one has, so that the kernels' AVX2 forms are what is counted.
"""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from guarded.cases import cases
from guarded.counts import backends, count
from guarded.traffic import is_view, region_of_view
from mmfast.ops import extension

# The share by which a figure may move before it is a change: what a kernel does for its arguments depends on their
# addresses here and there.
TOLERANCE = 0.02


def missing() -> str | None:
    """Why nothing can be counted here; None if it can."""
    if not shutil.which("valgrind"):
        return "valgrind is not installed; apt-get install valgrind"
    return extension.missing("cpu")


def versions() -> dict[str, str]:
    """What decides on the instructions: the extension's compiler, and the CPU that valgrind pretends to be."""
    valgrind = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    vectors = "AVX2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "none that it counts"
    return {"compiler": extension.module().compiler, "valgrind": valgrind, "vectors": vectors}


def rows() -> dict[str, int]:
    """Instructions in the extension, by case and kernel: of all calls of that kernel, forward and backward."""
    names, calls = [], []
    for case in (case for case in cases() if "cpu" in backends(case)):

        def record(kernel: str, arguments: tuple[Any, ...], case_name: str = case.name) -> None:
            names.append(f"{case_name} | {kernel}")
            calls.append((kernel, frozen(arguments)))

        count(case, "cpu", on_call=record)
    found: Counter[str] = Counter()
    for name, instructions in zip(names, measure(calls), strict=True):
        found[name] += instructions
    return dict(found)


def measure(calls: list[tuple[str, Any]]) -> list[int]:
    """The instructions that each call takes inside the extension: kernels, and their arguments' way from Python."""
    with tempfile.TemporaryDirectory() as folder:
        recorded, profile = Path(folder) / "calls", Path(folder) / "profile"
        recorded.write_bytes(pickle.dumps(calls))
        command = ["valgrind", "--tool=callgrind", "--compress-strings=no", "--compress-pos=no"]
        command += ["--zero-before=getppid", "--dump-before=getpid", f"--callgrind-out-file={profile}"]
        command += [sys.executable, "-I", "-S", str(Path(__file__).with_name("replay.py"))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [*command, str(_extension()), str(recorded)], capture_output=True, text=True, env=environment
        )
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {run.returncode}\n{run.stderr}")
        parts = sorted(Path(folder).glob("profile.*"), key=lambda path: int(path.suffix[1:]))
        texts = [text for path in parts if "Trigger: --dump-before=getpid" in (text := path.read_text())]
    if len(texts) != len(calls):
        raise RuntimeError(f"callgrind wrote {len(texts)} parts for {len(calls)} calls; expected one for each")
    return [inside_extension(text) for text in texts]


def _extension() -> Path:
    return Path(str(extension.module().__file__))


def frozen(value: Any) -> Any:
    """Arguments of a kernel, a tensor as a dict with its content."""
    if is_view(value):
        address, dtype, shape, strides = value
        size = _span(*region_of_view(value)[1:])
        content = ctypes.string_at(address, size) if size else b""
        return {"address": address, "dtype": dtype, "shape": tuple(shape), "strides": strides, "content": content}
    if isinstance(value, list | tuple):
        return [frozen(part) for part in value]
    return value


def _span(shape: tuple[int, ...], strides: tuple[int, ...], width: int) -> int:
    """Bytes from the first element to the end of the last."""
    if not math.prod(shape):
        return 0
    return width * (1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)))


def inside_extension(profile: str) -> int:
    """The instructions that a callgrind profile has in the extension itself, without what it calls."""
    total, here, inclusive = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            here = Path(line[3:]).name == _extension().name
        elif line.startswith("calls="):
            inclusive = True  # the next line is what the called function costs, which stands by itself too
        elif line[:1].isdigit():
            total += int(line.split()[1]) if here and not inclusive else 0
            inclusive = False
    return total
