"""The generated parts of docs/systems/*.md, and what they and the pictures are made of; draw_systems.py writes them.

Between <!-- KIND NAMES --> and <!-- /KIND --> a page has what `GENERATED[KIND]` gives for the names: of recipes, of
templates, or of rows of the measured comparison. Every number is asked of the package, on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "systems"
MEASURED = ROOT / "benchmarks" / "results" / "cpu" / "compare.json"


@cache
def facts(recipe: str) -> SimpleNamespace:
    """A recipe's model on the meta device, its stages, what trains in each, and numbers that pictures need."""
    from mmfast.models import get_system
    from mmfast.train import load_recipe
    from mmfast.train.estimate import count_parameters
    from mmfast.train.setup import resolve_stage, system_options

    config = load_recipe(recipe)
    system = get_system(config.system)
    model = system.skeleton(config.llm, config.encoder, **system_options(config, system))
    stages = [resolve_stage(model, stage) for stage in config.stages]
    counts = count_parameters(config)
    parts = {
        part: count["trainable"]
        for stage in counts["stages"]
        for part, count in stage["parts"].items()
        if count["trainable"]
    }
    text = model.config.text_config
    return SimpleNamespace(
        config=config,
        counts=counts,
        stages=stages,
        parts=parts,
        total=counts["trainable_parameters"],
        encoder=model.encoder,
        options=model.config,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        blocks=model.config.vision_config.num_hidden_layers,
        features=model.encoder.num_patches,
        feature_width=model.encoder.hidden_size,
        pixels=model.encoder.image_size,
        tokens=model.features_per_medium,
        used=len(getattr(model.encoder, "layers", ())),
        q_former=getattr(model, "q_former", None),
        anyres=_example(model),
        # In words, counted from 1.
        first_prompted=text.num_hidden_layers - getattr(model.config, "prompt_layers", 0) + 1,
        merged=getattr(model.connector, "in_features", 0),
    )


def _example(model: Any) -> SimpleNamespace | None:
    """What an image of 640x480 becomes with high resolution."""
    if getattr(model, "anyres", None) is None:
        return None
    size = (480, 640)
    rows, columns = model.anyres.grid(size)
    return SimpleNamespace(
        rows=rows,
        columns=columns,
        tiles=rows * columns,
        views=model.anyres.num_views(size),
        tokens=model.anyres.num_tokens(size),
    )


def systems_table(*recipes: str) -> str:
    """All recipes: what they stand on, how many tokens a medium becomes, and how many parameters train."""
    lines = ["| recipe | system | language model, encoder | tokens of a medium | trains |", "|---|---|---|--:|--:|"]
    for recipe in recipes:
        found = facts(recipe)
        tokens = 0 if found.config.system == "llama_adapter" else found.tokens
        lines.append(
            f"| `{recipe}` | `{found.config.system}` | {found.config.llm}, {found.config.encoder} | "
            f"{'by its size' if tokens is None else f'{tokens:,}' if tokens else 'none'} | {found.total:,} |"
        )
    return "\n".join(lines)


def trains_table(*recipes: str) -> str:
    """What trains in each stage of recipes, with the numbers of their files."""
    lines = [
        "| recipe, stage | part | parameters | learning rate | batch | for | warm-up | decay |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for recipe in recipes:
        found = facts(recipe)
        for config, stage, counts in zip(found.config.stages, found.stages, found.counts["stages"], strict=True):
            name = f"`{recipe}`, `{stage.name}`"
            span = f"{config.max_steps:,} steps" if config.max_steps else _epochs(config.epochs)
            rest = f"{config.batch_size} | {span} | {100 * config.warmup_ratio:g}% | {config.weight_decay:g}"
            for part, rate in stage.train.items():
                spec = stage.lora
                what = f"{part} (rank {spec.rank}, alpha {spec.alpha:g})" if part == "lora" and spec else part
                count = counts["parts"][part]["trainable"]
                lines.append(f"| {name} | {what} | {count:,} | {rate:.4g} | {rest} |")
                name, rest = "", " | | | "
    return "\n".join(lines)


def _epochs(count: float) -> str:
    return f"{count:g} epoch" + ("" if count == 1 else "s")


def prompts(*names: str) -> str:
    """A question and an answer in templates, as the model reads them; what it learns stands between « and »."""
    return "\n\n".join(f"`{name}`:\n\n```text\n{_prompt(name)}\n```" for name in names)


def _prompt(name: str) -> str:
    from mmfast.data.templates import ControlPiece, MediaPiece, Piece, get_template

    template = get_template(name)
    kind = "video" if name.startswith("video") else "image"
    # LLaMA-Adapter's images take no place in the text, ScienceQA's questions have a form of their own.
    question = "Question: What is this?\nContext: N/A\nOptions: (A) a cat (B) a dog" if "scienceqa" in name else None
    text = {"type": "text", "text": question or "What is this?"}
    media = [] if name == "alpaca" else [{"type": kind, kind: ""}]
    answer = "The answer is A. BECAUSE: It has whiskers." if question else "A cat."
    messages: Any = [{"role": "user", "content": [*media, text]}, {"role": "assistant", "content": answer}]
    out, learned = ["<s>"], False
    for piece in template.render(messages):
        if piece.supervised != learned:
            out.append("«" if piece.supervised else "»")
            learned = piece.supervised
        if isinstance(piece, Piece):
            out.append(piece.text)
        elif isinstance(piece, MediaPiece):
            out.append(f"<{kind}>")
        elif isinstance(piece, ControlPiece):
            out.append({"bos": "<s>", "eos": "</s>"}[piece.token])
    return "".join(out) + "»" * learned


def ours_table(*names: str) -> str:
    """Rows of the comparison on the embedded world."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in measured["systems"]}
    lines = [
        "| row, recipe | trains | steps | seconds | accuracy | without media | chance |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        row = rows[name]
        shares = [row[share] for share in ("accuracy", "text_only_accuracy", "chance_accuracy")]
        numbers = [f"{row['trainable_parameters']:,}", f"{row['steps']:,}", f"{row['seconds']:.0f}"]
        lines.append(f"| {name}, `{row['recipe']}` | {' | '.join([*numbers, *(f'{share:.1%}' for share in shares)])} |")
    return "\n".join(lines)


GENERATED = {"systems": systems_table, "trains": trains_table, "prompt": prompts, "ours": ours_table}
_MARKED = re.compile(r"(<!-- (\w+)((?: [\w.-]+)*) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(page: str) -> str:
    """A page with everything between its marks written anew: <!-- trains RECIPE ... --> to <!-- /trains -->."""

    def written(match: re.Match[str]) -> str:
        begin, kind, names, end = match.groups()
        return f"{begin}{GENERATED[kind](*names.split())}\n{end}"

    return _MARKED.sub(written, page)


def filled_pages() -> Iterator[tuple[Path, str]]:
    """Every page with what is to stand in it."""
    for path in sorted(PAGES.glob("*.md")):
        yield path, fill(path.read_text(encoding="utf-8"))
