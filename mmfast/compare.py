"""`mmfast compare`: every system on the same frozen backbones, data, seed and step budget, in one table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmfast.files import write_atomically, write_json

if TYPE_CHECKING:
    from mmfast.train import TrainConfig

__all__ = ["ENTRIES", "Entry", "compare", "markdown"]

IMAGES, WIDE, CLIPS, TEXT = "world:questions-test", "world:wide-test", "world:clips-test", "world:text-test"
TEXT_ONLY = "text-only"
_BATCH = 100


@dataclass(frozen=True)
class Entry:
    """A row of the comparison.

    Args:
        recipe: The tiny recipe that it trains.
        data: The questions that it is asked.
        stages: Other stages of the system than the recipe's, by name, each with the recipe's settings of its place.
    """

    recipe: str
    data: str = IMAGES
    stages: tuple[str, ...] = ()


ENTRIES: dict[str, Entry] = {
    "llava": Entry("llava-world"),
    "minigpt4": Entry("minigpt4-world"),
    "minigpt-v2": Entry("minigpt-v2-world"),
    "lavin": Entry("lavin-world"),
    "video-chatgpt": Entry("video-chatgpt-world", CLIPS),
    "llama-adapter-v1": Entry("llama-adapter-v1-world"),
    "llama-adapter-v2": Entry("llama-adapter-v2-world"),
    "llava-hd": Entry("llava-hd-world", WIDE),
    "fine-tune": Entry("llava-world", stages=("align", "instruct")),
}
"""Each row by its name. `fine-tune` trains the whole language model: what the cheap methods are measured against."""


def compare(
    out: str = "runs/compare",
    systems: list[str] | str = (),  # type: ignore[assignment]  # an empty list would be shared between calls
    budget: int = 2000,
    seed: int = 0,
    max_samples: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trains every system on the embedded world, measures all the same way and prints one table.

    The two bounds stand in the same table: `text-only`, the language model that is shown nothing, and `fine-tune`,
    which trains the language model as a whole. Rows that the folder's compare.json has of other systems are kept, so a
    system can be added to a comparison, or measured again.

    Args:
        out: Folder of the runs, of compare.json, compare.md and compare.png.
        systems: Train only these rows, by name and separated by commas. Empty: all.
        budget: The most optimiser steps of a system; a recipe with more is cut in proportion.
        seed: Seed of every run.
        max_samples: Only the first so many held-out questions of each kind of data. None: all.
        overwrite: Whether runs and rows that are already in the folder may be replaced.

    Returns:
        What compare.json holds: `{"seed", "budget", "max_samples", "systems": [{"name", "system", "recipe", "data",
        "steps", "trainable_parameters", "seconds", "peak_memory_mb", "accuracy", "per_kind", "chance_accuracy",
        "text_only_accuracy", "text_accuracy"}]}`. `text_only_accuracy` is that of the same questions without their
        images or clips, `text_accuracy` that of questions about written descriptions; a model that keeps what it
        knew of text has there what the row `text-only` has.

    Raises:
        ValueError: If a name is none of the rows, the budget is below the number of a recipe's stages, or rows that
            would be kept were measured with another seed, budget or number of samples.
        FileExistsError: If the folder has runs or rows of these systems and `overwrite` is not set.
        ImportError: If matplotlib is missing.
    """
    pyplot = _matplotlib()
    chosen = _chosen(systems)
    folder = Path(out)
    configs = {name: _config(ENTRIES[name], folder / name, budget, seed) for name in chosen}
    result: dict[str, Any] = {"seed": seed, "budget": budget, "max_samples": max_samples}
    path = folder / "compare.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"systems": []}
    rows = _kept(path, earlier, result, chosen)
    _make_room(folder, earlier["systems"], chosen, overwrite)
    rows = _in_order([*rows, *_text_only(list(dict.fromkeys(ENTRIES[name].data for name in chosen)), max_samples)])
    for name, config in configs.items():
        print(f"\n== {name}: {sum(cast(int, stage.max_steps) for stage in config.stages):,} steps of {config.system}")
        rows = _in_order([*rows, {"name": name, **_measure(ENTRIES[name], config, max_samples)}])
        # After every system, so that nothing is lost when a later one is stopped.
        result["systems"] = rows
        write_json(path, result)
        write_atomically(folder / "compare.md", markdown(rows))
    _draw(pyplot, rows, folder / "compare.png")
    print(f"\n{markdown(rows)}\nwritten to {folder}: compare.json, compare.md, compare.png")
    return result


def _chosen(systems: Sequence[str] | str) -> list[str]:
    listed = [systems] if isinstance(systems, str) else list(systems)
    names = [name.strip().replace("_", "-") for entry in listed for name in entry.split(",") if name.strip()]
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise ValueError(f"compare: systems has {', '.join(unknown)}; accepted are {', '.join(ENTRIES)}")
    return names or list(ENTRIES)


def _config(entry: Entry, out: Path, budget: int, seed: int) -> TrainConfig:
    """The entry's recipe within the budget."""
    from mmfast.train import load_recipe

    config = replace(load_recipe(entry.recipe), out=str(out), seed=seed)
    stages = config.stages
    if entry.stages:
        stages = [
            replace(stage, name=name, lr={}, lora_rank=None, lora_alpha=None, lora_dropout=None)
            for stage, name in zip(stages, entry.stages, strict=True)
        ]
    steps = [cast(int, stage.max_steps) for stage in stages]
    if budget < len(steps):
        raise ValueError(f"compare: budget is {budget}; {len(steps)} or more is accepted, a step for each stage")
    share = min(1.0, budget / sum(steps))
    config.stages = [
        replace(stage, max_steps=max(1, math.floor(count * share))) for stage, count in zip(stages, steps, strict=True)
    ]
    return config


def _kept(path: Path, earlier: dict[str, Any], settings: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier comparison that stay beside those of `names`."""
    kept = [row for row in earlier["systems"] if row["name"] not in names]
    found = {name: earlier.get(name) for name in settings}
    if found == settings:
        return kept
    if any(row["name"] != TEXT_ONLY for row in kept):
        raise ValueError(
            f"compare: {path} has rows of {found}, but this comparison is of {settings}; rows of the same settings "
            "stand in one table; choose these, or another --out"
        )
    return []


def _in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bounds without training first, then as in `ENTRIES`; of rows with the same name and data, the last one."""
    places = {name: place for place, name in enumerate([TEXT_ONLY, *ENTRIES])}
    latest = {(row["name"], row["data"]): row for row in rows}
    return sorted(latest.values(), key=lambda row: places.get(row["name"], len(places)))


def _make_room(folder: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], overwrite: bool) -> None:
    """Removes the runs of `names`, of which there may be neither runs nor rows if not `overwrite`."""
    import shutil

    runs = [name for name in names if (folder / name).exists()]
    taken = [name for name in names if name in runs or any(row["name"] == name for row in rows)]
    if taken and not overwrite:
        raise FileExistsError(
            f"compare: {folder} holds runs already ({', '.join(taken)}); other systems, or a new folder, are accepted; "
            "choose another --out, or set --overwrite"
        )
    for name in runs:
        shutil.rmtree(folder / name)
    folder.mkdir(parents=True, exist_ok=True)


def _text_only(datasets: Sequence[str], max_samples: int | None) -> list[dict[str, Any]]:
    """The frozen language model, which is shown nothing and trains nothing: a row for each kind of data."""
    from mmfast.evaluate import evaluate
    from mmfast.models import Llava

    model = Llava.from_parts("world", "world").eval()
    text = evaluate(model, TEXT, _BATCH, max_samples)["accuracy"]
    asked = {data: evaluate(model, data, _BATCH, max_samples, with_images=False) for data in datasets}
    return [
        {
            "name": TEXT_ONLY,
            "system": None,
            "recipe": None,
            "data": data,
            "steps": 0,
            "trainable_parameters": 0,
            "seconds": 0.0,
            "peak_memory_mb": 0.0,
            "accuracy": blind["accuracy"],
            "per_kind": blind["per_kind"],
            "chance_accuracy": blind["chance_accuracy"],
            "text_only_accuracy": blind["accuracy"],
            "text_accuracy": text,
        }
        for data, blind in asked.items()
    ]


def _measure(entry: Entry, config: TrainConfig, max_samples: int | None) -> dict[str, Any]:
    """Trains an entry, opens it again from its folder and asks it everything."""
    from mmfast.evaluate import evaluate
    from mmfast.models import open_model
    from mmfast.train import train

    stages = train(config).stages
    model = open_model(config.out)
    asked = evaluate(model, entry.data, _BATCH, max_samples)
    return {
        "system": config.system,
        "recipe": entry.recipe,
        "data": entry.data,
        "steps": sum(stage.steps for stage in stages),
        "trainable_parameters": max(stage.trainable_parameters for stage in stages),
        "seconds": sum(stage.seconds for stage in stages),
        "peak_memory_mb": max(stage.peak_memory_mb for stage in stages),
        "accuracy": asked["accuracy"],
        "per_kind": asked["per_kind"],
        "chance_accuracy": asked["chance_accuracy"],
        "text_only_accuracy": evaluate(model, entry.data, _BATCH, max_samples, with_images=False)["accuracy"],
        "text_accuracy": evaluate(model, TEXT, _BATCH, max_samples)["accuracy"],
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of the "systems" of `compare`: one for each kind of data, a column for each kind of question."""
    return "\n".join(_table_of(data, [row for row in rows if row["data"] == data]) for data in _datasets(rows))


def _datasets(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["data"] for row in rows))


def _table_of(data: str, rows: Sequence[dict[str, Any]]) -> str:
    kinds = list(rows[0]["per_kind"])
    heads = ["system", "trains", "steps", "seconds", "peak MB", "accuracy", *kinds, "without media", "text"]
    lines = [f"{data} (chance {rows[0]['chance_accuracy']:.1%})", "", _line(heads)]
    lines.append(_line(["---", *["--:"] * (len(heads) - 1)]))
    for row in rows:
        shares = [row["accuracy"], *(row["per_kind"][kind]["accuracy"] for kind in kinds)]
        shares += [row["text_only_accuracy"], row["text_accuracy"]]
        numbers = [f"{row['trainable_parameters']:,}", f"{row['steps']:,}"]
        numbers += [f"{row['seconds']:.0f}", f"{row['peak_memory_mb']:.0f}"] if row["steps"] else ["", ""]
        lines.append(_line([row["name"], *numbers, *(f"{share:.1%}" for share in shares)]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _matplotlib() -> Any:
    """pyplot, asked for before anything is trained."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "compare: matplotlib, which draws compare.png, is not installed; `pip install mmfast[plot]`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(pyplot: Any, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for each system's accuracy, one picture beside the other for each kind of data, and where chance is."""
    from mmfast.files import replace_atomically

    datasets = _datasets(rows)
    figure, axes = pyplot.subplots(1, len(datasets), figsize=(5.5 * len(datasets), 3.5), squeeze=False)
    for data, axis in zip(datasets, axes[0], strict=True):
        shown = [row for row in rows if row["data"] == data]
        bars = axis.barh([row["name"] for row in shown], [100 * row["accuracy"] for row in shown], color="#4c72b0")
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.axvline(100 * shown[0]["chance_accuracy"], color="#c44e52", linestyle="--", label="chance")
        axis.set(xlim=(0, 112), xlabel="exact match, %", title=data)
        axis.invert_yaxis()
        axis.legend(loc="lower right")
    figure.tight_layout()
    replace_atomically(path, lambda target: figure.savefig(target, format="png", dpi=120))
    pyplot.close(figure)
