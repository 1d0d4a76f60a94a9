"""`mmfast data check` and `mmfast data preview`: a data set as a training run would see it, before there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfast.evaluate.samples import open_samples
from mmfast.files import write_json
from mmfast.train.config import StageConfig, TrainConfig, load_config, load_recipe
from mmfast.train.setup import build_processor, stage_seed

if TYPE_CHECKING:
    from mmfast.data import Encoded, Processor, Sample

__all__ = ["check", "preview"]

# Where nothing says what is trained: the system that reads such media, on the models in the package.
_SYSTEMS = {"image": "llava", "video": "video_chatgpt"}


def check(
    data: str,
    recipe: str | None = None,
    run: str | None = None,
    stage: str | None = None,
    system: str | None = None,
    llm: str | None = None,
    encoder: str | None = None,
    media_folder: str | None = None,
    max_length: int | None = None,
    max_bad: str | int | None = None,
    num_workers: int | None = None,
    json: str | None = None,
) -> dict[str, Any]:
    """Reads every sample and every medium of a data set as a training run would, counts, and names what is wrong.

    Without recipe, run, llm or encoder the samples are read for the models in the package, so that tokens are counted
    with a small vocabulary.

    Args:
        data: The data set, as train takes it: a file, a folder, or <format>:<rest>.
        recipe: Name of the recipe, or a YAML file with the configuration, that is to be trained.
        run: Run folder whose configuration it is.
        stage: Name of the stage that is to train on the data. None: the last one.
        system: System that is to be trained, over that of the recipe.
        llm: Folder of the language model, whose tokenizer counts, over that of the recipe.
        encoder: Folder of the encoder, whose image processor is used, over that of the recipe.
        media_folder: Folder to which media paths are relative. None: that of the recipe, or the folder of the data.
        max_length: Longest sequence, in tokens, over that of the recipe.
        max_bad: How many samples may be bad, a number or a share such as 0.1%. None: that of the recipe.
        num_workers: Processes that read. None: one for each processor core.
        json: File to which the report is written as JSON, with every id.

    Returns:
        The report, see `mmfast.data.check_data`, with "data", "system", "llm", "encoder", "template" and "max_length".

    Raises:
        ValueError: If more samples are bad than may be; after the report.
    """
    from mmfast.data import check_data, format_report

    given = {"system": system, "llm": llm, "encoder": encoder, "media_folder": media_folder, "max_length": max_length}
    view = _open(data, recipe, run, stage, given)
    allowed = view.config.max_bad if max_bad is None else max_bad
    result = check_data(view.samples, view.processor, view.media_folder, allowed, num_workers)
    report = {**view.describe(), **result}
    print(f"{view.title()}\n{format_report(report)}")
    if json is not None:
        path = Path(json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report)
        print(f"written to {path}")
    bad = report["bad"]
    if bad["samples"] > bad["allowed"]:
        raise ValueError(
            f"{data}: {bad['samples']} of {report['samples']} samples are bad, {bad['allowed']} may be; repair or "
            "remove them, or allow for them with --max-bad"
        )
    return report


def preview(
    data: str,
    recipe: str | None = None,
    run: str | None = None,
    stage: str | None = None,
    system: str | None = None,
    llm: str | None = None,
    encoder: str | None = None,
    media_folder: str | None = None,
    max_length: int | None = None,
    num_samples: int = 4,
    out: str = "preview",
    plain: bool = False,
) -> None:
    """Prints the first samples of a training run as tokens: grey what is read, plain what is learned.

    Pictures are written as the encoder gets them. The options are those of `check`.

    Args:
        data: The data set, as train takes it: a file, a folder, or <format>:<rest>.
        recipe: Name of the recipe, or a YAML file with the configuration, that is to be trained.
        run: Run folder whose configuration it is.
        stage: Name of the stage that is to train on the data. None: the last one.
        system: System that is to be trained, over that of the recipe.
        llm: Folder of the language model, over that of the recipe.
        encoder: Folder of the encoder, over that of the recipe.
        media_folder: Folder to which media paths are relative. None: that of the recipe, or the folder of the data.
        max_length: Longest sequence, in tokens, over that of the recipe.
        num_samples: How many samples, in the order of the training.
        out: Folder for the pictures.
        plain: Mark what is not learned by [brackets], as where there is no terminal.

    Raises:
        ValueError: If no sample can be shown.
    """
    from mmfast.data import epoch_order, format_sample, write_pictures

    given = {"system": system, "llm": llm, "encoder": encoder, "media_folder": media_folder, "max_length": max_length}
    view = _open(data, recipe, run, stage, given)
    print(view.title())
    plain = plain or not sys.stdout.isatty()
    batch: list[Encoded] = []
    bad = 0
    for index in epoch_order(len(view.samples), view.seed, 0).tolist():
        if len(batch) == num_samples or bad > num_samples:
            break
        try:
            sample = view.samples[index]
            encoded = view.processor.encode(sample, media_folder=view.media_folder)
        except ValueError as error:
            print(f"\nbad: {error}")
            bad += 1
            continue
        written = write_pictures(encoded, view.processor, Path(out), f"{len(batch)}")
        print(f"\n{format_sample(sample, encoded, view.processor, plain)}")
        print(*(f"  {path}" for path in written), sep="\n", end="\n" if written else "")
        batch.append(encoded)
    if not batch:
        raise ValueError(f"{data}: none of the first {bad} samples can be shown; mmfast data check names all")
    shapes = {name: list(value.shape) for name, value in view.processor.collate(batch).items()}
    print("\nbatch: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


@dataclass(frozen=True)
class _View:
    """A data set, and what a run makes of it."""

    data: str
    config: TrainConfig
    samples: Sequence[Sample]
    media_folder: str | None
    processor: Processor
    seed: int
    """Of the order in which the stage takes the samples."""

    def describe(self) -> dict[str, Any]:
        names = {name: getattr(self.config, name) for name in ("system", "llm", "encoder")}
        own = {"template": self.processor.template.name, "max_length": self.processor.max_length}
        return {"data": self.data, **names, **own}

    def title(self) -> str:
        shown = self.describe()
        return (
            f"{shown['data']} for {shown['system']} on {shown['llm']} and {shown['encoder']}, "
            f"template {shown['template']}, max_length {shown['max_length']}"
        )


def _open(data: str, recipe: str | None, run: str | None, stage: str | None, given: dict[str, Any]) -> _View:
    """Opens the data as the configuration says, with what is given over it."""
    chosen = {name: value for name, value in given.items() if value is not None}
    config = _config(recipe, run)
    index, own = _stage(config, stage)
    folder = chosen.get("media_folder") or (own and own.media_folder) or (config and config.media_folder) or None
    samples, folder = open_samples(data, folder, strict=False)
    is_named = config is not None or "llm" in chosen
    config = replace(config or TrainConfig(system=_system_for(samples), llm="world", encoder="world"), **chosen)
    processor = build_processor(config, own)
    if not is_named:
        processor.max_length = config.max_length  # the small model's own limit says nothing of the data
    return _View(data, config, samples, folder, processor, stage_seed(config, index))


def _config(recipe: str | None, run: str | None) -> TrainConfig | None:
    if recipe and run:
        raise ValueError(f"data: recipe is {recipe!r} and run is {run!r}; one of the two is accepted")
    if run:
        path = Path(run).expanduser() / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"data: run is {run}, which has no config.yaml; a run folder is accepted")
        return load_config(path)
    if recipe:
        return load_config(recipe) if Path(recipe).suffix in (".yaml", ".yml") else load_recipe(recipe)
    return None


def _stage(config: TrainConfig | None, name: str | None) -> tuple[int, StageConfig | None]:
    """The stage of that name, or the last one, and its place among the configured ones."""
    if config is None or not config.stages:
        return 0, StageConfig(name) if name else None
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ValueError(f"data: stage is {name!r}; the recipe has {', '.join(names)}")
    index = names.index(name) if name else len(names) - 1
    return index, config.stages[index]


def _system_for(samples: Sequence[Sample]) -> str:
    """A system that reads the media of the first good sample."""
    from mmfast.data.samples import media_of

    for index in range(len(samples)):
        try:
            kinds = [kind for kind, _ in media_of(samples[index])]
        except ValueError:
            continue
        return _SYSTEMS[kinds[0]] if kinds else _SYSTEMS["image"]
    return _SYSTEMS["image"]
