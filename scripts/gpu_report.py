"""One JSON file and one log of what scripts/gpu_check.sh has done; --table prints it and exits 1 if a part failed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
import triton


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder with *.part, *.log and the benchmarks' *.json")
    parser.add_argument("out", type=Path, help="folder for gpu_check.json and gpu_check.log")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    parts = [json.loads(path.read_text()) for path in sorted(options.work.glob("*.part"), key=os.path.getmtime)]
    found = {
        "device": properties.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "parts": parts,
        "benchmarks": {path.stem: json.loads(path.read_text()) for path in sorted(options.work.glob("*.json"))},
    }
    write(options.out / "gpu_check.json", json.dumps(found, indent=1) + "\n")
    logs = (options.work / f"{part['part']}.log" for part in parts)
    write(options.out / "gpu_check.log", "".join(f"== {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs))
    if options.table:
        print(f"\n{found['device']}, torch {found['torch']}, triton {found['triton']}")
        for part in parts:
            end = "ok" if part["exit"] == 0 else f"FAILED ({part['exit']})"
            print(f"  {part['part']:<36} {end:<12} {part['seconds']} s")
        sys.exit(any(part["exit"] for part in parts))


def write(path: Path, text: str) -> None:
    """Whole or not at all: the run may be cut short at any time."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
