"""The quick start: train LLaVA on the embedded world in two stages, measure it on held-out digits, and ask it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmfast.files import write_json

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel
    from mmfast.train import StageResult

__all__ = ["quickstart"]

DATA = "world:questions-test"
_MARK = ".mmfast-quickstart"
_KINDS = ("position", "comparison", "presence")
_BATCH = 100


def quickstart(
    out: str = "runs/demo", seed: int = 0, max_samples: int | None = None, max_steps: int | None = None
) -> dict[str, Any]:
    """Trains the recipe llava-world, evaluates every stage, saves, loads again and answers three questions.

    Needs no network, no GPU and a few minutes on two cores.

    Args:
        out: The folder of the run. One that an earlier quick start made is replaced; any other must be empty.
        seed: Seed of the run.
        max_samples: Only the first so many held-out questions. None: all.
        max_steps: Steps of each stage; a few show that everything runs. None: those of the recipe.

    Returns:
        The report, which is also written to report.json in the folder.

    Raises:
        FileExistsError: If the folder holds something that no quick start made.
        ValueError: If `max_steps` is less than 1.
    """
    from mmfast.evaluate import encoder_ceiling, evaluate
    from mmfast.evaluate.accuracy import format_table
    from mmfast.models import Llava
    from mmfast.train import load_recipe, train

    recipe = load_recipe("llava-world")
    if max_steps is not None:
        recipe.stages = [replace(stage, max_steps=max_steps) for stage in recipe.stages]
    folder = Path(out)
    _clear(folder)
    print("A frozen image encoder and a frozen language model that never met: training joins them.\n")
    accuracies: list[float] = []

    def after_stage(model: MultimodalModel, stage: StageResult) -> None:
        _use_chat_template(model)
        result = evaluate(model, DATA, _BATCH, max_samples)
        accuracies.append(result["accuracy"])
        print(f"after stage {stage.name}: {result['accuracy']:.1%} of {result['n']} held-out questions, exact match")

    trained = train(replace(recipe, out=out, seed=seed), after_stage=after_stage)
    model = Llava.from_pretrained(out)
    results = {
        "with_images": evaluate(model, DATA, _BATCH, max_samples),
        "text_only": evaluate(model, DATA, _BATCH, max_samples, with_images=False),
    }
    ceiling = encoder_ceiling(model, max_samples=max_samples)
    print(f"\nloaded again from {out}: exact match on questions about digits that no training has seen\n")
    print(format_table(results))
    print(f"reading the digits with a linear probe of the encoder instead: {ceiling:.1%}")
    stages = [
        {**asdict(stage), "accuracy": accuracy} for stage, accuracy in zip(trained.stages, accuracies, strict=True)
    ]
    report = {
        "stages": stages,
        "accuracy": results["with_images"]["accuracy"],
        "per_kind": results["with_images"]["per_kind"],
        "text_only_accuracy": results["text_only"]["accuracy"],
        "chance_accuracy": results["with_images"]["chance_accuracy"],
        "encoder_ceiling": ceiling,
        "test_images": results["with_images"]["n"],
        "answers": _ask(model, folder),
    }
    write_json(folder / "report.json", report)
    print(_stage_table(stages))
    print(f"\nthe report is in {folder / 'report.json'}; ask more:")
    print(f"  mmfast chat {out} --image {folder / 'digits.png'}   in the terminal")
    print(f"  mmfast demo {out}   in the browser")
    return report


def _clear(folder: Path) -> None:
    """Makes the folder, empty but for the mark by which the next quick start knows it."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / _MARK).is_file():
            raise FileExistsError(
                f"quickstart: {folder} holds something that no quick start made; a new or empty folder, or that of an "
                "earlier one, is accepted; choose another --out"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()


def _use_chat_template(model: MultimodalModel) -> None:
    """The template `plain` of the first stage drops questions, so it could not be asked any."""
    from mmfast.data import get_template

    cast(Any, model.processor).template = get_template("vicuna_v1")


def _ask(model: MultimodalModel, folder: Path) -> list[dict[str, str]]:
    """Writes a held-out picture, asks three questions about the file and prints the answers."""
    import numpy as np

    from mmfast.data.samples import content_parts
    from mmfast.generate import answer_batch
    from mmfast.world import samples
    from mmfast.world.questions import ask

    sample = cast(Any, samples(DATA.removeprefix("world:"))[0])
    image = next(part["image"] for part in content_parts(sample["messages"][0]) if part["type"] == "image")
    image.save(folder / "digits.png")
    image.resize((image.width * 8, image.height * 8), resample=0).save(folder / "digits-large.png")
    questions = [ask(np.random.default_rng(index), sample["labels"], kind) for index, kind in enumerate(_KINDS)]
    asked: list[Any] = [
        {
            "id": question.kind,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "digits.png"},
                        {"type": "text", "text": question.text},
                    ],
                }
            ],
        }
        for question in questions
    ]
    answers = answer_batch(model, asked, len(asked), 32, media_folder=folder)
    a, b, c, d = sample["labels"]
    print(f"\n{folder / 'digits-large.png'} shows {a} {b} over {c} {d}:")
    for question, answer in zip(questions, answers, strict=True):
        print(f"  {question.text}  ->  {answer}" + ("" if answer == question.answer else f"  (no: {question.answer})"))
    return [
        {"question": question.text, "answer": answer, "right": question.answer}
        for question, answer in zip(questions, answers, strict=True)
    ]


def _stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [("stage", "steps", "trainable", "seconds", "peak MB", "accuracy")]
    for stage in stages:
        rows.append(
            (
                stage["name"],
                f"{stage['steps']:,}",
                f"{stage['trainable_parameters']:,}",
                f"{stage['seconds']:.1f}",
                f"{stage['peak_memory_mb']:.0f}",
                f"{stage['accuracy']:.1%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n" + "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
