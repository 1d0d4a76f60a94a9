"""Triton kernels, one file an op. Imported by `mmfast.ops` when Triton is used, never by `import mmfast`.

In a checkout the files lie in the top-level folder `kernels/`, which is no package of its own: a
regular package of that name on `sys.path` would hide the PyPI package `kernels` that transformers
looks for. A wheel holds them here.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "CMakeLists.txt").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
