"""`mmfast bench plot`: pictures of what was measured, and its tables in the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfast.benchmarks import tables
from mmfast.benchmarks.harness import COPY, PRODUCT, Row
from mmfast.benchmarks.suite import ROOT, op_names
from mmfast.files import replace_atomically, write_atomically

# One look for each kind of provider; peers after torch.compile take the markers in turn.
OURS, COMPILED, PEERS = "#c0392b", "#2e86c1", ("#27ae60", "#8e44ad", "#f39c12", "#7f8c8d")


def plot(results: Path | None = None, check: bool = False) -> None:
    """Draws ratios and rooflines of all devices, and rewrites the measured tables in README.md and docs/.

    Args:
        results: Folder with a folder of JSON for each device; by default benchmarks/results of the checkout.
        check: Draws and writes nothing; an error if a document is not what the results give.

    Raises:
        ValueError: There are no results or no documents here.
        RuntimeError: With `check`, a document differs.
        ImportError: matplotlib is not installed.
    """
    results = results or ROOT / "benchmarks/results"
    if not (ROOT / "docs/ops").is_dir():
        raise ValueError(f"bench plot: {ROOT} has no docs/ops; it rewrites the documents of a checkout; run it in one")
    documents = tables.rewritten(ROOT, results)
    changed = [path for path, text in documents.items() if path.read_text() != text]
    if check:
        if changed:
            names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
            raise RuntimeError(f"bench plot: {names} differ from the results; `mmfast bench plot` rewrites them")
        return
    pyplot = _matplotlib()
    for folder in [results / "cpu", *tables.gpu_folders(results)]:
        measured = {op: found for op, found in tables.read(folder).items() if op in op_names()}
        for kind, draw in (("ratio", ratio_picture), ("roofline", roofline_picture)):
            target = ROOT / f"docs/pictures/bench_{folder.name}_{kind}.png"
            target.parent.mkdir(exist_ok=True)
            figure = draw(pyplot, measured)
            replace_atomically(target, lambda path, figure=figure: figure.savefig(path, dpi=110, format="png"))
            pyplot.close(figure)
            print(target.relative_to(ROOT))
    for path in changed:
        write_atomically(path, documents[path])
        print(path.relative_to(ROOT))


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "bench plot: matplotlib, which draws, is not installed; `pip install mmfast[plot]`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _timed(document: Mapping[str, Any]) -> list[Row]:
    return [row for row in document["rows"] if "ms" in row and row.get("timing") == "eager"]


def ratio_picture(pyplot: Any, measured: tables.Results) -> Any:
    """How many times as fast as eager each op is, case by case, with its peers: a panel an op."""
    ops, columns = sorted(measured), 2
    shown = {op: [(name, of) for name, of in tables.by_case(_timed(measured[op])) if "mmfast" in of] for op in ops}
    # Panels of a row share its height: longest first, so that neighbours are alike.
    ops.sort(key=lambda op: -len(shown[op]))
    heights = [max(len(shown[op]) for op in ops[i : i + columns]) + 3 for i in range(0, len(ops), columns)]
    figure, grid = pyplot.subplots(
        len(heights),
        columns,
        figsize=(19, 0.21 * sum(heights)),
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    for panel in grid.flat[len(ops) :]:
        panel.set_visible(False)
    for panel, op in zip(grid.flat, ops, strict=False):
        _ratios(panel, op, shown[op])
    where = tables.origin(measured[ops[0]])
    figure.suptitle(f"Times as fast as eager PyTorch (right of the line is faster)\n{where}", fontsize=12)
    return figure


def _ratios(panel: Any, op: str, cases: Sequence[tuple[str, Mapping[str, Row]]]) -> None:
    peers = list(dict.fromkeys(key for _, of in cases for key, row in of.items() if row["kind"] == "peer"))
    looks = {"mmfast": ("o", OURS)}
    others = iter([("s", PEERS[0]), ("D", PEERS[1]), ("v", PEERS[2]), ("P", PEERS[3])])
    for peer in peers:
        looks[peer] = ("^", COMPILED) if peer == "torch.compile" else next(others, ("x", "black"))
    panel.axvline(1, color="black", linewidth=0.8)
    for provider, (marker, color) in looks.items():
        points = [(of[provider]["ratio"], y) for y, (_, of) in enumerate(cases) if provider in of]
        if points:
            ours = provider == "mmfast"
            size, above = (52, 3) if ours else (26, 2)
            panel.scatter(*zip(*points, strict=True), marker=marker, color=color, s=size, zorder=above, label=provider)
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.8), max(high, 1.25))
    ticks = [
        tick
        for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
        if low * 0.9 <= tick <= high * 1.1 or tick == 1
    ]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    # Of an op with several tables, the later ones are named.
    named = [of["mmfast"]["table"] for _, of in cases]
    labels = [f"{table}: {name}" if table != named[0] else name for table, (name, _) in zip(named, cases, strict=True)]
    panel.set_yticks(range(len(cases)), labels, fontsize=7.5)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    panel.grid(axis="both", linewidth=0.3)
    panel.set_title(op, fontsize=10, loc="left", fontweight="bold")
    panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0)


def roofline_picture(pyplot: Any, measured: tables.Results) -> Any:
    """What the largest case of each op reaches of the measured floors: of the copy's bytes, of the roofline's FLOPs."""
    figure, (bandwidth, roof) = pyplot.subplots(1, 2, figsize=(17, 8), layout="constrained")
    elementwise: list[tuple[str, str, Mapping[str, Row]]] = []
    products: list[tuple[str, str, Mapping[str, Row]]] = []
    for op in sorted(measured):
        rows = _timed(measured[op])
        for name, of in tables.by_case(rows):
            if "mmfast" in of and of["mmfast"]["case"] == rows[0]["case"] and of["mmfast"]["table"] == rows[0]["table"]:
                (products if of["mmfast"]["flops"] else elementwise).append((op, name, of))
    _bandwidths(bandwidth, elementwise)
    _roofline(roof, products)
    figure.suptitle(
        f"Against what the machine reaches in the same rounds\n{tables.origin(next(iter(measured.values())))}",
        fontsize=12,
    )
    return figure


def _rate(row: Row, what: str) -> float:
    """Bytes or FLOPs of the case, 10⁹ of them a second."""
    return float(row[what]) / row["ms"] / 1e6


def _bandwidths(panel: Any, cases: Sequence[tuple[str, str, Mapping[str, Row]]]) -> None:
    looks = {"eager": ("D", "#7f8c8d"), "mmfast": ("o", OURS), "a copy": ("|", "black")}
    for y, (_, _, of) in enumerate(cases):
        first = next(row for row in of.values() if row["kind"] == "baseline")
        for (label, (marker, color)), row in zip(looks.items(), (first, of["mmfast"], of[COPY]), strict=True):
            size = 220 if label == "a copy" else 50
            panel.scatter(_rate(row, "bytes"), y, marker=marker, color=color, s=size, label=label if y == 0 else None)
    panel.set_yticks(range(len(cases)), [f"{op}\n{name}" for op, name, _ in cases], fontsize=8)
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_xlim(left=0)
    panel.set_xlabel("GB/s of what must be moved at least")
    panel.set_title("Ops without matrix products", fontsize=11, loc="left")
    panel.grid(linewidth=0.3)
    panel.legend(fontsize=9, loc="upper center", ncols=3, bbox_to_anchor=(0.5, -0.08), frameon=False)


def _roofline(panel: Any, cases: Sequence[tuple[str, str, Mapping[str, Row]]]) -> None:
    if not cases:
        panel.set_visible(False)
        return
    copy = max(_rate(of[COPY], "bytes") for _, _, of in cases)
    product = max(_rate(of[PRODUCT], "flops") for _, _, of in cases)
    intensities = [of["mmfast"]["flops"] / of["mmfast"]["bytes"] for _, _, of in cases]
    low, high = min(intensities) / 2, max(intensities) * 2
    ridge = product / copy
    xs = [low, *([ridge] if low < ridge < high else []), high]
    panel.plot(xs, [min(product, copy * x) for x in xs], color="black", label=f"{copy:.0f} GB/s, {product:.0f} GFLOP/s")
    colors = [f"C{index}" for index in range(10)]
    ops = list(dict.fromkeys(op for op, _, _ in cases))
    markers = {"forward": "o", "backward": "v", "both": "s"}
    for op, _, of in cases:
        x, color = of["mmfast"]["flops"] / of["mmfast"]["bytes"], colors[ops.index(op) % len(colors)]
        first = next(row for row in of.values() if row["kind"] == "baseline")
        ys = [_rate(row, "flops") for row in (of["mmfast"], first)]
        panel.plot([x, x], ys, color=color, linewidth=1)
        panel.scatter(x, ys[0], marker=markers[of["mmfast"]["mode"]], color=color, s=70, zorder=3)
        panel.scatter(
            x, ys[1], marker=markers[of["mmfast"]["mode"]], facecolor="white", edgecolor=color, s=40, zorder=3
        )
    for op in ops:
        panel.scatter([], [], marker="o", color=colors[ops.index(op) % len(colors)], label=op)
    for mode, marker in markers.items():
        panel.scatter([], [], marker=marker, color="gray", label=mode)
    panel.scatter([], [], marker="o", facecolor="white", edgecolor="gray", label="hollow: eager")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("FLOP a byte")
    panel.set_ylabel("GFLOP/s of what must be multiplied at least")
    panel.set_title("Ops with matrix products: the roofline of this run", fontsize=11, loc="left")
    panel.grid(which="both", linewidth=0.3)
    panel.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
