"""Rewrites the measured tables in README.md and docs/ from benchmarks/results/cpu."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmfast.compare import markdown

ROOT = Path(__file__).resolve().parents[1]
# What stands in the README: the file, the provider and the beginning of the cases' names.
SHOWN = (
    ("lora_linear", "auto", ("1024x", "128x", "64x2048", "16x2048", "1x2048")),
    ("lora_linear", "lora_linear_group", ("q, k, v",)),
    ("bias_scale_linear", "auto", ("output 1024x", "input 1024x", "output 32x")),
    ("nf4", "cpu", ("dequantise 4096x4096 bf", "linear 1 · 4096x4096", "linear 8 · 4096x4096 bf")),
    ("int8", "cpu", ("linear 1 · 4096x4096 bf",)),
    ("rms_norm", "auto", ("add+norm forward 2048x", "add+norm both, frozen 2048x", "norm forward 1x4096 bf")),
    ("rope", "auto", ("forward 1x2048 heads 32+8", "both 1x2048 heads 32+8", "forward 1x1 heads 32+8 bf")),
    ("mixture_adapter", "auto", ("1x2048x4096", "4x257x1024")),
    ("resampler_attention", "auto", ("both 1x2056", "both 8x257")),
    ("gated_cross_attention", "auto", ("latest forward 1x1024", "latest both 1x1024", "all both 1x1024")),
    ("perceiver_resampler", "PerceiverResampler", ("both 1x2056", "both 8x257")),
    ("spatio_temporal_pool", "auto", ("forward 2x100", "both 2x100")),
    ("swiglu", "auto", ("forward 1024x", "both 1024x")),
    ("gated_residual", "auto", ("forward 1024x", "both 1024x")),
    ("train", "mmfast", ("LoRA", "connector")),
    ("linear_cross_entropy", "mmfast:cpu", ("2048x", "1024x")),
    ("zero_init_attention", "auto", ("2x16x1024x64 P10", "1x32x512x128")),
)


def rows(name: str, provider: str, beginnings: tuple[str, ...]) -> list[str]:
    """One line of the table for each shown case of one benchmark."""
    found: list[dict[str, Any]] = json.loads((ROOT / f"benchmarks/results/cpu/{name}.json").read_text())["rows"]
    lines = []
    for row in found:
        if row["provider"] == provider and row["case"].startswith(beginnings):
            spread = f"{milliseconds(row['p20'])} to {milliseconds(row['p80'])}"
            memory = f"{row['peak MiB']:.0f} MiB" if "peak MiB" in row else ""
            median, ratio = milliseconds(row["ms"]), row["ratio"]
            lines.append(f"| `{name}` {row['case']} | {median} ms ({spread}) | {ratio:.2f}x | {memory} |")
    return lines


def milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def origin(name: str) -> str:
    """Where and when a file was measured."""
    environment = json.loads((ROOT / f"benchmarks/results/cpu/{name}.json").read_text())["environment"]
    instructions = f" ({environment['instructions']})" if "instructions" in environment else ""
    return f"{environment['device']}{instructions}, torch {environment['torch']}, {environment['date']}"


def ratios() -> str:
    """The table of ratios, and where each file was measured."""
    lines = ["| op and case | median (p20 to p80) | times as fast as eager | extra memory |", "|---|---|---|---|"]
    for name, provider, beginnings in SHOWN:
        lines += rows(name, provider, beginnings)
    names = list(dict.fromkeys(name for name, *_ in SHOWN))
    origins = {where: [name for name in names if origin(name) == where] for where in map(origin, names)}
    lines += ["", *(f"{', '.join(f'`{name}`' for name in of)}: {where}.  " for where, of in origins.items())]
    return "\n".join(lines)


def plans() -> str:
    """Planned over measured memory, one line for each stage of each recipe, one column for each policy."""
    measured = json.loads((ROOT / "benchmarks/results/cpu/plan.json").read_text())
    policies = list(dict.fromkeys(row["recompute"] for row in measured["rows"]))
    lines = [f"| recipe, stage, dtype | {' | '.join(policies)} |", "|---" * (1 + len(policies)) + "|"]
    found: dict[str, list[str]] = {}
    for row in measured["rows"]:
        name = f"{row['recipe']} {row['stage']} {row['dtype']}"
        found.setdefault(name, []).append(f"{row['ratio']:.3f} of {row['measured'] / 1e6:.1f} MB")
    lines += [f"| {name} | {' | '.join(ratios)} |" for name, ratios in found.items()]
    return "\n".join([*lines, "", f"{origin('plan')}."])


def replaced(text: str, mark: str, content: str) -> str:
    """`text` with `content` between its comments `mark` and `/mark`."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.rstrip()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    compared = json.loads((ROOT / "benchmarks/results/cpu/compare.json").read_text())
    readme = (ROOT / "README.md").read_text()
    readme = replaced(readme, "bench", ratios())
    (ROOT / "README.md").write_text(replaced(readme, "compare", markdown(compared["systems"])))
    memory = ROOT / "docs/memory.md"
    memory.write_text(replaced(memory.read_text(), "plan", plans()))


if __name__ == "__main__":
    main()
