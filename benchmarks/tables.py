"""The measured tables of the documents, made of the results' JSON: nothing in them is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfast.benchmarks import suite
from mmfast.benchmarks.harness import COPY, PRODUCT, Row, Settings
from mmfast.compare import markdown

Results = Mapping[str, dict[str, Any]]

NOT_MEASURED = "not measured yet"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of one device: files of ops, or what scripts/gpu_check.sh put together."""
    together = folder / "gpu_check.json"
    if together.is_file():
        found: dict[str, dict[str, Any]] = json.loads(together.read_text())["benchmarks"]
        return found
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in files.items() if "environments" in content}


def rewritten(root: Path, results: Path) -> dict[Path, str]:
    """Every document with a measured table, and what it should hold.

    Raises:
        ValueError: There are no results, or a document lacks the marks between which its table stands.
    """
    cpu = read(results / "cpu")
    if not set(cpu) & set(suite.op_names()):
        raise ValueError(
            f"bench plot: {results / 'cpu'} has no results; `mmfast bench --out {results / 'cpu'}` makes them"
        )
    gpus = {folder.name: read(folder) for folder in gpu_folders(results)}
    documents = {root / "README.md": {"bench": headlines(cpu), "bench gpu": wanted(gpus)}}
    compared = results / "cpu/compare.json"
    if compared.is_file():
        documents[root / "README.md"]["compare"] = markdown(json.loads(compared.read_text())["systems"])
    for page, mark, table in OTHERS:
        if mark in cpu:
            documents.setdefault(root / page, {})[mark] = table(cpu[mark])
    for op in suite.op_names():
        page = root / f"docs/ops/{PAGES.get(op, op)}.md"
        measured = [op_tables(found[op]) for found in (cpu, *gpus.values()) if op in found]
        documents.setdefault(page, {})[f"bench {op}"] = "\n\n".join(measured) or NOT_MEASURED
    return {page: _filled(page, tables) for page, tables in documents.items()}


def gpu_folders(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/gpu_check.json"))


# Modules that are described with the op that they are made of.
PAGES = {"perceiver_resampler": "resampler_attention", "q_former": "resampler_attention"}


def _filled(page: Path, tables: Mapping[str, str]) -> str:
    text = page.read_text()
    for mark, content in tables.items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"bench plot: {page} needs one {begin} and one {end}, between which its table is written")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content.rstrip()}\n{end}{rest.split(end)[1]}"
    return text


# ---- one op


def op_tables(document: Mapping[str, Any]) -> str:
    """All of one op's cases: a line each, a column for each provider, the floors last."""
    rows = [row for row in document["rows"] if "ms" in row]
    names = list(dict.fromkeys(row["table"] for row in rows))
    parts = [_op_table(name, [row for row in rows if row["table"] == name]) for name in names]
    absent: dict[str, set[str]] = {}
    for row in document["rows"]:
        if "left out" in row and row["kind"] == "peer":
            absent.setdefault(row["provider"], set()).add(row["left out"])
    notes = [f"Left out: {name}, {'; '.join(sorted(reasons))}." for name, reasons in absent.items()]
    return "\n\n".join([*parts, *notes, f"{origin(document)}."])


def _op_table(name: str, rows: Sequence[Row]) -> str:
    # What a backend takes that is asked for by name is in the JSON: here stands what a call without `backend` takes.
    kinds = {row["provider"]: row["kind"] for row in rows}
    kinds = {key: kind for key, kind in kinds.items() if kind != "mmfast" or ":" not in key or "mmfast" not in kinds}
    order = {"baseline": 0, "peer": 1, "mmfast": 2, "bound": 3, "floor": 4}
    columns = sorted(kinds, key=lambda key: order[kinds[key]])
    heads = [key.removeprefix("floor: ") for key in columns]
    lines = [f"{name}:\n" if name else ""]
    lines.append(_line(["case, ms", *heads, "times as fast", "extra MiB, eager and mmfast"]))
    lines.append(_line(["---", *["--:"] * (len(heads) + 2)]))
    for case, of in by_case(rows):
        ours, first = of.get("mmfast"), next(row for row in of.values() if row["kind"] == "baseline")
        cells = [_spread(of[key]) if key in of else "" for key in columns]
        memory = f"{first['peak MiB']:g}, {ours['peak MiB']:g}" if ours and "peak MiB" in ours else ""
        lines.append(_line([case, *cells, f"**{ours['ratio']:.2f}**" if ours and "ratio" in ours else "", memory]))
    return "\n".join(lines).lstrip("\n")


def by_case(rows: Sequence[Row]) -> list[tuple[str, dict[str, Row]]]:
    """What was measured together: the name with the mode, and the rows by provider."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        graph = ", CUDA graph" if row.get("timing") == "graph" else ""
        name = ", ".join(filter(None, (row["case"], row.get("mode")))) + graph
        found.setdefault((row.get("table", ""), name), {})[row["provider"]] = row
    return [(name, of) for (_, name), of in found.items()]


def _spread(row: Row) -> str:
    """Median and, in small figures, the 20th and 80th percentile."""
    return f"{number(row['ms'])} <sub>{number(row['p20'])} to {number(row['p80'])}</sub>"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.1
        else f"{value:.3f}"
        if value >= 0.01
        else f"{value:.4f}"
    )


def origin(document: Mapping[str, Any]) -> str:
    """Where, when and with what a file was measured."""
    return "; ".join(dict.fromkeys(map(_where, document["environments"].values())))


def _where(environment: Mapping[str, Any]) -> str:
    instructions = f" ({environment['instructions']})" if "instructions" in environment else ""
    threads = f", {environment['threads']} threads" if "instructions" in environment else ""
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "cuda") if environment.get(name)]
    described = [environment["device"] + instructions + threads, *versions]
    return ", ".join([*described, f"revision {environment['revision']}", environment["date"]])


# ---- README.md


def headlines(results: Results) -> str:
    """Two lines an op: the first case, a shape of training, and the last of its table, the smallest one."""
    lines = [_line(["op and case", "eager", "fastest peer", "mmfast", "times as fast as eager", "the floor"])]
    lines.append(_line(["---", *["--:"] * 5]))
    for op in [*suite.op_names(), "train"]:
        if op not in results:
            lines.append(_line([f"`{op}`", NOT_MEASURED, "", "", "", ""]))
            continue
        rows = [row for row in results[op]["rows"] if "ms" in row and row.get("mode") != "backward"]
        rows = [row for row in rows if row.get("table") == rows[0].get("table")]
        cases = dict(by_case(rows))
        # Of a shape, the last of its modes: forward and backward, where both were measured.
        shapes = {next(iter(of.values()))["case"]: (name, of) for name, of in cases.items()}
        ends = [next(iter(shapes.values())), list(shapes.values())[-1]]
        lines += [_headline(op, name, of) for name, of in dict(ends).items()]
    origins: dict[str, list[str]] = {}
    for op in [*suite.op_names(), "train"]:
        if op in results:
            origins.setdefault(origin(results[op]), []).append(f"`{op}`")
    lines += ["", *(f"{', '.join(of)}: {where}.  " for where, of in origins.items()), "", _pictures("cpu")]
    return "\n".join(lines)


def _pictures(device: str) -> str:
    pictures = (f"[{kind}](docs/pictures/bench_{device}_{kind}.png)" for kind in ("ratio", "roofline"))
    return f"All cases and peers are in the pages of [docs/ops](docs/ops); as pictures: {', '.join(pictures)}."


def _headline(op: str, name: str, of: Mapping[str, Row]) -> str:
    first = next(row for row in of.values() if row["kind"] == "baseline")
    peers = [row for row in of.values() if row["kind"] == "peer"]
    fastest = min(peers, key=lambda row: row["ms"]) if peers else None
    floors = [row for key, row in of.items() if key in (COPY, PRODUCT)]
    floor = max(floors, key=lambda row: row["ms"]) if floors else None
    cells = [f"{number(first['ms'])} ms", f"{fastest['provider']} {number(fastest['ms'])} ms" if fastest else ""]
    cells += [f"{_spread(of['mmfast'])} ms", f"{of['mmfast']['ratio']:.2f}x"]
    cells.append(f"{floor['provider'].removeprefix('floor: ')} {number(floor['ms'])} ms" if floor else "")
    return _line([f"`{op}` {name}", *cells])


def wanted(gpus: Mapping[str, Results]) -> str:
    """The table for GPUs: a line for the shape of training of each op, whether it was measured or not."""
    lines = []
    for name, results in (gpus or {"": {}}).items():
        lines += [f"{name}\n"] if name else []
        lines.append(_line(["op and case", "eager", "fastest peer", "mmfast", "times as fast as eager", "the floor"]))
        lines.append(_line(["---", *["--:"] * 5]))
        for op in suite.op_names():
            case = [case for case in suite.cases(op, Settings("cuda", quick=True)) if case.mode != "backward"]
            shape = [found for found in case if found.name == case[0].name][-1]
            rows = results[op]["rows"] if op in results else []
            of = {row["provider"]: row for row in rows if _is_of(row, shape.name, shape.mode)}
            title = f"{shape.name}, {shape.mode}"
            lines.append(
                _headline(op, title, of) if "mmfast" in of else _line([f"`{op}` {title}", NOT_MEASURED, *[""] * 4])
            )
        if name:
            lines += ["", *(f"{where}." for where in dict.fromkeys(map(origin, results.values()))), _pictures(name)]
    return "\n".join(lines)


def _is_of(row: Row, case: str, mode: str) -> bool:
    return "ms" in row and row.get("timing") == "eager" and (row["case"], row.get("mode")) == (case, mode)


# ---- pages of no op


BEFORE_AND_AFTER = ("before", "after", "times as fast", "peak before", "peak after")


def _before_and_after(before: Row, after: Row) -> list[str]:
    times, peaks = ([row[key] for row in (before, after)] for key in ("ms", "peak MiB"))
    ratio = f"**{times[0] / times[1]:.2f}**"
    return [*(f"{number(ms)} ms" for ms in times), ratio, *(f"{number(peak)} MiB" for peak in peaks)]


def trained(document: Mapping[str, Any]) -> str:
    """Training steps before and after `optimize`, plain and with checkpointing; how far the losses of both differ."""
    lines = [_line(["step", *BEFORE_AND_AFTER, "tokens/s after", "peak after / before"]), "|---" + "|--:" * 7 + "|"]
    for case, of in by_case([row for row in document["rows"] if "ms" in row]):
        for suffix in ("", "_checkpointing"):
            before, after = of["hf_peft" + suffix], of["mmfast" + suffix]
            cells = [str(after["tokens/s"]), f"{after['peak MiB'] / before['peak MiB']:.2f}"]
            lines.append(_line([case + suffix.replace("_", ", "), *_before_and_after(before, after), *cells]))
    found = {row["provider"]: row for row in document["rows"] if "max difference" in row}
    if found:
        ours, rounded = (f"{found[name]['max difference']:.0e}" for name in ("mmfast", "hf_peft rounded"))
        between = f"{ours} between before and after, {rounded} between two of before, a rounding error apart"
        lines += ["", f"Largest difference in the {found['mmfast']['case']}: {between}."]
    return "\n".join([*lines, "", f"{origin(document)}."])


def optimized(document: Mapping[str, Any]) -> str:
    """A step before and after `optimize`, and how many times as fast it is with each op alone."""
    cases = by_case(document["rows"])
    ops = list(dict.fromkeys(name for _, of in cases for name in of if name.startswith("mmfast:")))
    heads = [f"`{name.removeprefix('mmfast:')}` alone" for name in ops]
    lines = [_line(["step", *BEFORE_AND_AFTER, *heads]), "|---" + "|--:" * (5 + len(ops)) + "|"]
    for case, of in cases:
        alone = [f"{of[name]['ratio']:.2f}" if name in of else "" for name in ops]
        lines.append(_line([case, *_before_and_after(of["eager"], of["mmfast"]), *alone]))
    return "\n".join([*lines, "", f"{origin(document)}."])


def packed(document: Mapping[str, Any]) -> str:
    """Tokens a second and peak memory of each way to make batches."""
    lines = []
    for case, of in by_case(document["rows"]):
        lines += [_line([case, "tokens/s", "times as fast", "peak"]), "|---" + "|--:" * 3 + "|"]
        for name, row in of.items():
            lines.append(_line([name, str(row["tokens/s"]), f"{row['ratio']:.2f}", f"{number(row['peak MiB'])} MiB"]))
    return "\n".join([*lines, "", f"{origin(document)}."])


def plans(document: Mapping[str, Any]) -> str:
    """Planned over measured memory, one line for each stage of each recipe, one column for each policy."""
    policies = list(dict.fromkeys(row["provider"] for row in document["rows"]))
    lines = [_line(["recipe, stage, dtype", *policies]), "|---" * (1 + len(policies)) + "|"]
    found: dict[str, list[str]] = {}
    for row in document["rows"]:
        cell = f"{row['planned / measured']:.3f} of {row['measured'] / 1e6:.1f} MB"
        found.setdefault(row["case"], []).append(cell)
    lines += [_line([name, *ratios]) for name, ratios in found.items()]
    return "\n".join([*lines, "", f"{origin(document)}."])


# The page, the mark, which is the name of the results too, and what makes the table of them.
OTHERS = (
    ("docs/memory.md", "plan", plans),
    ("docs/optimize.md", "train", trained),
    ("docs/optimize.md", "optimize", optimized),
    ("docs/throughput.md", "packing", packed),
)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
