"""Compiles every Triton configuration and every CUDA file for the GPUs we support, without a GPU.

Prints for each: registers a thread, bytes spilled, shared memory, and whether a tensor-core instruction
is there. Fails on a failed compile, on a spill, where a kernel that should use tensor cores does not, and where a
Triton kernel's figures are not those of tests/guard/compile.json, which --accept replaces. A module of Triton kernels
with the source, and the versions of the compiler, of its accepted figures would give them again: it is compiled with
--all alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = (80, 90, 100)
CUDA_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")


@dataclass
class Row:
    """What one kernel compiled to for one architecture."""

    kernel: str
    architecture: str
    registers: int | None = None
    spilled: int = 0
    shared: int = 0
    tensor_core: bool = False
    error: str = ""


def sources() -> dict[str, str]:
    """A digest for each module of kernels/ that lists cases in `compile_cases()`, of all that decides on their figures
    besides the compiler: the kernels, what they inline, and how each case compiles them."""
    return {path.stem: _source(path.stem) for path in sorted((ROOT / "kernels").glob("*.py")) if _cases(path.stem)}


def _source(module: str) -> str:
    digest = hashlib.sha256()
    for case in _cases(module):
        how = {name: value for name, value in case.items() if name not in ("fn", "signature", "constexprs", "attrs")}
        digest.update(f"{_ast_source(case).hash()} {sorted(how.items())}\n".encode())
    return digest.hexdigest()[:16]


def _ast_source(case: dict[str, Any]) -> Any:
    from triton.compiler import ASTSource

    return ASTSource(case["fn"], case["signature"], case["constexprs"], case.get("attrs"))


def triton_rows(modules: Iterable[str]) -> Iterator[Row]:
    """Compiles every case of these modules, one on each core at a time."""
    tasks = [
        (module, index, capability)
        for module in modules
        for index, case in enumerate(_cases(module))
        for capability in case.get("capabilities", CAPABILITIES)
    ]
    if not tasks:
        return
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_triton_row, *zip(*tasks, strict=True))


def _cases(module: str) -> list[dict[str, Any]]:
    # A module of functions that other kernels inline has no cases.
    cases: list[dict[str, Any]] = getattr(importlib.import_module(f"mmfast.kernels.{module}"), "compile_cases", list)()
    return cases


def _triton_row(module: str, index: int, capability: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    case = _cases(module)[index]
    row = Row(f"{module}: {case['name']}", f"sm_{capability}")
    options = {"num_warps": case["num_warps"], "num_stages": case.get("num_stages", 2)}
    try:
        kernel = triton.compile(_ast_source(case), target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # any failure of the compiler is a finding, reported with its row
        row.error = str(error).strip().splitlines()[-1] or type(error).__name__
    else:
        _read_cubin(kernel, row)
        if case.get("tensor_core") and not row.tensor_core:
            row.error = "no tensor-core instruction"
    return row


def _read_cubin(kernel: Any, row: Row) -> None:
    row.shared = kernel.metadata.shared
    row.tensor_core = bool(TENSOR_CORE.search(kernel.asm["ptx"]))
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(kernel.asm["ptx"].encode())
        file.flush()
        architecture = re.search(r"\.target\s+(\w+)", kernel.asm["ptx"])
        target = architecture.group(1) if architecture else row.architecture
        run = subprocess.run(
            [_ptxas(), "-v", f"-arch={target}", file.name, "-o", os.devnull], capture_output=True, text=True
        )
    if run.returncode:
        row.error = run.stderr.strip().splitlines()[-1]
        return
    _read_ptxas(run.stderr, row)


def _ptxas() -> str:
    import triton

    bundled = sorted(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*"))
    return str(bundled[-1]) if bundled else "ptxas"


def _read_ptxas(text: str, row: Row) -> None:
    if found := re.search(r"Used (\d+) registers", text):
        row.registers = int(found.group(1))
    if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text):
        row.spilled = int(found.group(1)) + int(found.group(2))
    if found := re.search(r"(\d+) bytes smem", text):
        row.shared = max(row.shared, int(found.group(1)))


def cuda_rows(nvcc: str) -> Iterator[Row]:
    """Compiles every file of csrc/cuda and reads what ptxas says of each kernel in it."""
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for architecture in CUDA_ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "out.cubin"
                command = [nvcc, "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
                command += ["-I", str(ROOT / "csrc"), str(path), "-o", str(cubin)]
                run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                message = (run.stderr.strip().splitlines() or ["nvcc failed"])[0]
                yield Row(path.name, architecture, error=message)
                continue
            for entry in re.split(r"(?=Compiling entry function)", run.stderr)[1:]:
                name = re.search(r"'([^']+)'", entry)
                row = Row(f"{path.name}: {_demangle(name.group(1)) if name else '?'}", architecture)
                _read_ptxas(entry, row)
                yield row


def _demangle(name: str) -> str:
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if not filt:
        return name
    readable = subprocess.run([filt, name], capture_output=True, text=True).stdout.strip()
    return re.sub(r"\(anonymous namespace\)::|mmfast::|^void |\(.*\)$", "", readable)


def printed(source: Iterable[Row]) -> list[Row]:
    """The rows, each printed as soon as it is there."""
    rows = []
    for row in source:
        rows.append(row)
        registers = "?" if row.registers is None else row.registers
        verdict = row.error or ("SPILLS" if row.spilled else "yes" if row.tensor_core else "no")
        figures = f"{registers:>5} {row.spilled:>6} {row.shared:>7}"
        print(f"{row.kernel[:72]:<72} {row.architecture:<8} {figures}  {verdict}", flush=True)
    return rows


def triton_versions() -> dict[str, str]:
    """What decides on registers besides the kernels: Triton, and the assembler that comes with it."""
    import triton

    release = subprocess.run([_ptxas(), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, (V[\d.]+)", release)
    return {"triton": triton.__version__, "ptxas": found.group(1) if found else release.strip()}


def _records() -> Any:
    sys.path.insert(0, str(ROOT / "tests" / "shared"))
    from guarded import records

    return records


def unchanged(found: dict[str, str]) -> set[str]:
    """The modules whose accepted figures are of the `found` source and of these versions of the compiler."""
    records = _records()
    accepted = records.load(records.COMPILED)
    if accepted.versions != triton_versions():
        return set()
    return {module for module, source in found.items() if accepted.sources.get(module) == source}


def compare(rows: list[Row], found_sources: dict[str, str], kept: set[str], accept: bool) -> list[str]:
    """What differs from the accepted table; with `accept`, which replaces it, nothing does.

    Args:
        kept: modules that were not compiled, whose accepted rows hold.
    """
    records = _records()
    accepted = records.load(records.COMPILED)
    held = {name: row for name, row in accepted.rows.items() if name.partition(":")[0] in kept}
    found = records.Record(triton_versions(), figures(rows) | held, found_sources)
    if accept:
        records.save(records.COMPILED, found)
        print(f"{len(found.rows)} kernels accepted in {records.shown(records.COMPILED)}")
        return []
    if accepted.versions != found.versions:
        print(
            f"NOT COMPARED with {records.shown(records.COMPILED)}: it is of {accepted.versions}, this is "
            f"{found.versions}, whose registers are others. To record those: {records.ACCEPT_COMPILED}"
        )
        return []
    lines = records.differences(accepted.rows, found.rows)
    if lines:
        print(records.complaint(records.COMPILED, lines, records.ACCEPT_COMPILED))
    return lines


def figures(rows: list[Row]) -> dict[str, dict[str, str]]:
    """A row's figures, by kernel and architecture. (Bytes spilled are none, or the run has failed.)"""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        cores = ", tensor core" if row.tensor_core else ""
        figure = f"{row.registers} registers, {row.shared} B shared{cores}"
        if found.setdefault(row.kernel, {}).setdefault(row.architecture, figure) is not figure:
            raise ValueError(f"two forms are called {row.kernel!r}; give them different names")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-cuda", action="store_true", help="Triton kernels only")
    parser.add_argument("--accept", action="store_true", help="make the Triton kernels' figures the accepted ones")
    parser.add_argument("--all", action="store_true", help="also the Triton kernels whose source is the accepted one")
    options = parser.parse_args()
    # Compilation is for real GPUs; the interpreter would replace the kernels by Python functions.
    os.environ.pop("TRITON_INTERPRET", None)

    print(f"{'kernel':<72} {'arch':<8} {'regs':>5} {'spill':>6} {'shared':>7}  tensor core")
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    found = sources()
    kept = set() if options.all else unchanged(found)
    triton = printed(triton_rows([module for module in found if module not in kept]))
    if kept:
        print(f"not compiled again, for their source is that of the accepted figures: {', '.join(sorted(kept))}")
    cuda = printed(cuda_rows(nvcc)) if nvcc and not options.no_cuda else []
    if not nvcc:
        print("nvcc not found: the CUDA files were not compiled")
    bad = [row for row in triton + cuda if row.error or row.spilled]
    print(f"{len(triton) + len(cuda)} compiled, {len(bad)} bad")
    if bad or not found:
        return 1
    return 1 if compare(triton, found, kept, options.accept) else 0


if __name__ == "__main__":
    sys.exit(main())
