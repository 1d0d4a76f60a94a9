"""`mmfast estimate`: what a recipe trains and what memory it takes: no weights are read and nothing is trained."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.train.config import TrainConfig, load_config, load_recipe, save_config
from mmfast.train.plan import fit as find_fit
from mmfast.train.plan import parse_bytes, plan_stage, plan_table

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel

__all__ = ["count_parameters", "estimate"]


def estimate(
    recipe: str,
    json: bool = False,
    llm: str | None = None,
    encoder: str | None = None,
    gpu: str | None = None,
    fit: bool = False,
    micro_batch_size: int | None = None,
    length: int | None = None,
    out: str | None = None,
) -> dict[str, Any]:
    """Counts the parameters that a recipe trains, per stage and part, and what memory it takes.

    Args:
        recipe: Name of a recipe, or a YAML file with a configuration.
        json: Print JSON instead of tables.
        llm: Another language model: a local folder, world, or a name that is known here.
        encoder: Another encoder, likewise.
        gpu: Memory to plan for, such as 24GB (of 10^9 bytes: a card of 24 GiB then keeps 7% for CUDA itself).
        fit: Find the cheapest change with which every stage fits into that memory.
        micro_batch_size: Samples of a forward pass, over that of the recipe.
        length: Tokens of a sample. None: the most that the recipe allows.
        out: With fit: a YAML file to write the changed configuration to, for mmfast train --config.

    Returns:
        `{"recipe", "system", "llm", "encoder", "trainable_parameters", "total_parameters", "stages": [{"name",
        "trainable_parameters", "parts": {part: {"trainable", "total"}}}]}`. The number at the top is of all that
        trains in any stage. With `gpu` also `"memory": {"budget", "fits", "stages": [...]}`, in bytes.

    Raises:
        ValueError: If there is no such recipe, its settings or stages are not the system's, `gpu` is no size, or
            nothing fits.
        FileNotFoundError: If a pretrained part is neither a folder nor known.
    """
    if gpu is None and (fit or out or micro_batch_size or length):
        raise ValueError("estimate: fit, out, micro_batch_size and length are about memory; give its size: --gpu 24GB")
    if out and not fit:
        raise ValueError("estimate: out is for the configuration that fit finds; add --fit")
    config = load_config(recipe) if Path(recipe).suffix in (".yaml", ".yml") else load_recipe(recipe)
    config.llm, config.encoder = llm or config.llm, encoder or config.encoder
    result = {"recipe": recipe, **count_parameters(config)}
    tables = [_table(result)]
    if gpu is not None:
        budget = parse_bytes(gpu)
        if fit:
            config, plans = find_fit(config, budget, micro_batch_size=micro_batch_size, length=length)
        else:
            plans = [
                plan_stage(config, index, micro_batch_size=micro_batch_size, length=length)
                for index in range(len(config.stages))
            ]
        fits = all(plan.total <= budget for plan in plans)
        result["memory"] = {"budget": budget, "fits": fits, "stages": [plan.to_dict() for plan in plans]}
        tables += [plan_table(plan, budget) for plan in plans]
        if out:
            save_config(config, Path(out))
            tables.append(f"written to {out}; mmfast train --config {out} trains so")
    print(json_module.dumps(result, indent=2) if json else "\n\n".join(tables))
    return result


def count_parameters(config: TrainConfig) -> dict[str, Any]:
    """What `estimate` returns, of a configuration."""
    from mmfast.models import get_system
    from mmfast.train.setup import resolve_stage, system_options

    system = get_system(config.system)
    model = system.skeleton(config.llm, config.encoder, **system_options(config, system))
    stages: list[dict[str, Any]] = []
    trained: dict[str, int] = {}
    for stage in config.stages:
        model.set_stage(resolve_stage(model, stage))
        parts = {part: _counts(model, part) for part in model.parts}
        trained |= {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        stages.append(
            {
                "name": stage.name,
                "trainable_parameters": sum(counts["trainable"] for counts in parts.values()),
                "parts": {part: counts for part, counts in parts.items() if counts["total"]},
            }
        )
    return {
        "system": config.system,
        "llm": config.llm,
        "encoder": config.encoder,
        "trainable_parameters": sum(trained.values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "stages": stages,
    }


def _counts(model: MultimodalModel, part: str) -> dict[str, int]:
    parameters = model.part_parameters(part).values()
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
    }


def _table(result: dict[str, Any]) -> str:
    rows = [("stage", "part", "trainable", "total")]
    for stage in result["stages"]:
        for part, counts in stage["parts"].items():
            rows.append((stage["name"], part, f"{counts['trainable']:,}", f"{counts['total']:,}"))
    rows.append(("all", "", f"{result['trainable_parameters']:,}", f"{result['total_parameters']:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    head = f"{result['system']} on {result['llm']} and {result['encoder']}"
    lines = [
        f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}  {d.rjust(widths[3])}" for a, b, c, d in rows
    ]
    return "\n".join([head, *lines])
