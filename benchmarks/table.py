"""Rewrites the table of measured ratios in README.md from the JSON files in benchmarks/results/cpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
# What stands in the README: the file and the beginning of the cases' names.
SHOWN = (
    ("spatio_temporal_pool", ("forward 2x100", "both 2x100")),
    ("linear_cross_entropy", ("2048x", "1024x")),
)
OURS = ("auto", "mmfast:cpu")


def rows(name: str, beginnings: tuple[str, ...]) -> list[str]:
    """One line of the table for each shown case of one benchmark."""
    found: list[dict[str, Any]] = json.loads((ROOT / f"benchmarks/results/cpu/{name}.json").read_text())["rows"]
    lines = []
    for row in found:
        if row["provider"] in OURS and row["case"].startswith(beginnings):
            spread = f"{row['p20']:.1f} to {row['p80']:.1f}"
            memory = f"{row['peak MiB']:.0f} MiB" if "peak MiB" in row else ""
            lines.append(f"| `{name}` {row['case']} | {row['ms']:.1f} ms ({spread}) | {row['ratio']:.1f}x | {memory} |")
    return lines


def main() -> None:
    environment = json.loads((ROOT / "benchmarks/results/cpu/spatio_temporal_pool.json").read_text())["environment"]
    lines = [
        BEGIN,
        "| op and case | median (p20 to p80) | times as fast as eager | extra memory |",
        "|---|---|---|---|",
    ]
    for name, beginnings in SHOWN:
        lines += rows(name, beginnings)
    lines += ["", f"{environment['device']}, torch {environment['torch']}, {environment['date']}.", END]
    readme = (ROOT / "README.md").read_text()
    before, rest = readme.split(BEGIN)
    (ROOT / "README.md").write_text(before + "\n".join(lines) + rest.split(END)[1])


if __name__ == "__main__":
    main()
