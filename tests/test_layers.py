"""Who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mmfast"
KERNELS = PACKAGE.parent / "kernels"
BENCHMARKS = PACKAGE.parent / "benchmarks"

# Each layer with the ones it may import. `data` and `world` stand beside the chain of design.
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"ops"},
    "adapt": {"nn", "ops"},
    "connectors": {"nn", "ops"},
    "data": set(),
    "world": {"data"},
    "encoders": {"nn", "ops", "world"},
    "models": {"adapt", "connectors", "encoders", "nn", "ops", "data", "world"},
    "generate": {"models", "adapt", "nn", "ops", "data", "world"},
    "evaluate": {"generate", "models", "adapt", "nn", "ops", "data", "world"},
    "train": {"generate", "evaluate", "models", "adapt", "nn", "ops", "data", "world"},
}
# May import everything: the ends of the chain.
TOP = {"benchmarks", "cli", "compare", "environment", "page", "quickstart", "__init__", "__main__"}
NO_TRANSFORMERS = {"kernels", "ops", "nn"}


def python_files() -> list[Path]:
    return [*sorted(PACKAGE.rglob("*.py")), *sorted(KERNELS.glob("*.py")), *sorted(BENCHMARKS.glob("*.py"))]


def layer_of(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    if path.is_relative_to(BENCHMARKS):
        return "benchmarks"
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """Every dotted name that the file imports anywhere, inside functions and for type checking too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_imports_respect_the_layers(path: Path) -> None:
    layer = layer_of(path)
    names = imported(path)
    assert not any(name.split(".")[0] == "kernels" for name in names), "import mmfast.kernels, never kernels"
    if layer in TOP:
        return
    assert layer in ALLOWED, f"{path}: give the new layer {layer!r} its place in ALLOWED"
    ours = {name.split(".")[1] for name in names if name.startswith("mmfast.")}
    forbidden = {name for name in ours - ALLOWED[layer] - {layer} if (PACKAGE / name).is_dir()}
    assert not forbidden, f"{layer} may import {sorted(ALLOWED[layer])}, not {sorted(forbidden)}"
    assert not ours & (TOP - {"__init__", "__main__"}), f"{layer} imports an end of the chain: {sorted(ours & TOP)}"
    if layer in NO_TRANSFORMERS:
        assert not any(name.split(".")[0] == "transformers" for name in names)


def test_files_stay_readable() -> None:
    long = {str(path): n for path in python_files() if (n := len(path.read_text().splitlines())) > 600}
    assert not long
