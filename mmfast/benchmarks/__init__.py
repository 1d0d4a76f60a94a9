"""The benchmarks, one file an op, and the harness that all of them use. `mmfast bench` imports them.

In a checkout the files lie in the top-level folder `benchmarks/`, with the results; a wheel holds the code here.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "CMakeLists.txt").is_file() and (_root / "benchmarks").is_dir():
    __path__.append(str(_root / "benchmarks"))
