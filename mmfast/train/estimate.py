"""`mmfast estimate`: what a recipe trains, counted on the meta device: no weights are read and nothing is trained."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.train.config import TrainConfig, load_config, load_recipe

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel

__all__ = ["count_parameters", "estimate"]


def estimate(recipe: str, json: bool = False, llm: str | None = None, encoder: str | None = None) -> dict[str, Any]:
    """Counts the parameters that a recipe trains, per stage and part.

    Args:
        recipe: Name of a recipe, or a YAML file with a configuration.
        json: Print JSON instead of a table.
        llm: Another language model: a local folder, world, or a name that is known here.
        encoder: Another encoder, likewise.

    Returns:
        `{"recipe", "system", "llm", "encoder", "trainable_parameters", "total_parameters", "stages": [{"name",
        "trainable_parameters", "parts": {part: {"trainable", "total"}}}]}`. The number at the top is of all that
        trains in any stage.

    Raises:
        ValueError: If there is no such recipe, or its settings or stages are not the system's.
        FileNotFoundError: If a pretrained part is neither a folder nor known.
    """
    config = load_config(recipe) if Path(recipe).suffix in (".yaml", ".yml") else load_recipe(recipe)
    config.llm, config.encoder = llm or config.llm, encoder or config.encoder
    result = {"recipe": recipe, **count_parameters(config)}
    print(json_module.dumps(result, indent=2) if json else _table(result))
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
