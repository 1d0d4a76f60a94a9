"""How often a trained model answers right, and how often it would without looking."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from mmfast.evaluate.choices import score_choices
from mmfast.evaluate.metrics import score
from mmfast.evaluate.samples import is_scienceqa, open_samples, world_split
from mmfast.files import write_json

if TYPE_CHECKING:
    from mmfast.data.samples import Sample
    from mmfast.models.base import MultimodalModel

__all__ = ["evaluate", "evaluate_run", "format_table", "reference_answer", "without_images"]


def evaluate(
    model_or_run: MultimodalModel | str | Path,
    data: str = "world:questions-test",
    batch_size: int = 64,
    max_samples: int | None = None,
    with_images: bool = True,
    media_folder: str | None = None,
    max_new_tokens: int = 32,
    progress: bool = False,
    answer_format: str | None = None,
    unreadable: Literal["wrong", "random"] = "wrong",
) -> dict[str, Any]:
    """Measures exact match on questions with one right answer each; of ScienceQA, the letter that is chosen.

    Args:
        model_or_run: A model, or a folder that `mmfast.models.open_model` opens.
        data: As `open_samples` takes it. The right answer of a sample is its `answer` or, without that, the text of its
            last turn.
        batch_size: Questions per batch; it changes the speed only.
        max_samples: Only the first so many samples. None: all.
        with_images: False asks the same questions without their images, the text-only baseline.
        media_folder: Folder to which image paths are relative. None: the folder of the file.
        max_new_tokens: Longest answer, in tokens.
        progress: Whether to show a progress bar.
        answer_format: Name in `mmfast.data.ANSWER_FORMATS` of the prompt behind every question. None: no prompt.
        unreadable: Whether an answer to ScienceQA that names no choice is wrong, or a choice is drawn for it.

    Returns:
        `{"data", "with_images", "answer_format", "n", "accuracy", "per_kind": {kind: {"n", "accuracy"}},
        "chance_accuracy"}`; the accuracy of chance is None where it is not known, as in a file. Of ScienceQA also
        "unreadable", the number of answers that name no choice.

    Raises:
        ValueError: If a sample has no answer to compare with, the model's template drops questions, or there is no
            such answer format.
    """
    from mmfast.data import with_answer_format, without_last_answer
    from mmfast.generate import answer_batch

    samples, folder = open_samples(data, media_folder)
    chosen: list[Sample] = list(samples[:max_samples])
    references = [reference_answer(sample) for sample in chosen]
    model = _open(model_or_run)
    _check_template(model)
    questions = [without_last_answer(sample) for sample in chosen]
    if answer_format is not None:
        questions = [with_answer_format(sample, answer_format) for sample in questions]
    if not with_images:
        questions = [without_images(sample) for sample in questions]
    answers = answer_batch(model, questions, batch_size, max_new_tokens, media_folder=folder, progress=progress)
    if is_scienceqa(data):
        counts = score_choices(answers, chosen, unreadable)
        chance: float | None = sum(1 / len(cast(Any, sample)["choices"]) for sample in chosen) / len(chosen)
    else:
        counts, chance = score(answers, references, [sample.get("kind") for sample in chosen]), _chance(data)
    return {
        "data": data,
        "with_images": with_images,
        "answer_format": answer_format,
        **counts,
        "chance_accuracy": chance,
    }


def evaluate_run(
    run: str,
    data: str = "world:questions-test",
    batch_size: int = 64,
    max_samples: int | None = None,
    media_folder: str | None = None,
    max_new_tokens: int = 32,
    text_only: bool = True,
    out: str | None = None,
    llm: str | None = None,
    encoder: str | None = None,
    answer_format: str | None = None,
    unreadable: Literal["wrong", "random"] = "wrong",
) -> dict[str, Any]:
    """Measures a trained model's exact match, prints a table and writes it as JSON.

    Args:
        run: A run folder, or a folder with a saved or exported model.
        data: Questions with one right answer each, as train takes its data: world:<split>,
            scienceqa:<problems.json>:<split>, a JSON file, ....
        batch_size: Questions per batch; it changes the speed only.
        max_samples: Only the first so many samples. None: all.
        media_folder: Folder to which image paths are relative. None: the folder of the data file.
        max_new_tokens: Longest answer, in tokens.
        text_only: Also ask the same questions without their images.
        out: The JSON file to write. None: evaluation-<data>.json in the run folder.
        llm: Folder of the language model, where it has moved since the training.
        encoder: Folder of the encoder, where it has moved since the training.
        answer_format: What is written behind every question: short ("Answer the question using a single word or
            phrase.") or letter ("Answer with the option's letter from the given choices directly."). None: nothing.
        unreadable: Whether an answer to ScienceQA that names no choice is wrong, or random: a choice is drawn for it.

    Returns:
        `{"with_images": ..., "text_only": ...}`, each as `evaluate` returns it.
    """
    model = _open(run, llm, encoder)
    options: dict[str, Any] = {
        "data": data,
        "batch_size": batch_size,
        "max_samples": max_samples,
        "media_folder": media_folder,
        "max_new_tokens": max_new_tokens,
        "progress": sys.stderr.isatty(),
        "answer_format": answer_format,
        "unreadable": unreadable,
    }
    results = {"with_images": evaluate(model, **options)}
    if text_only:
        results["text_only"] = evaluate(model, **options, with_images=False)
    print(format_table(results))
    if results["with_images"].get("unreadable"):
        print(f"{results['with_images']['unreadable']} answers name no choice and count as {unreadable}")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.rpartition("/")[2])
    path = Path(out) if out is not None else Path(run) / f"evaluation-{name.removesuffix('.json')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    print(f"written to {path}")
    return results


def format_table(results: dict[str, dict[str, Any]]) -> str:
    """A table of accuracies in percent: a row for each kind and for all, a column for each result.

    Args:
        results: What `evaluate` returned, by the column's title, on the same samples.
    """
    first = next(iter(results.values()))
    titles = [name.replace("_", " ") for name in results]
    rows = [["kind", "questions", *titles]]
    for kind, counts in first["per_kind"].items():
        shares = [result["per_kind"][kind]["accuracy"] for result in results.values()]
        rows.append([kind, str(counts["n"]), *(f"{share:.1%}" for share in shares)])
    rows.append(["all", str(first["n"]), *(f"{result['accuracy']:.1%}" for result in results.values())])
    if first["chance_accuracy"] is not None:
        rows.append(["chance", "", *(f"{first['chance_accuracy']:.1%}" for _ in results)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def reference_answer(sample: Sample) -> str:
    """The right answer of a sample: its `answer`, else the text of its last turn.

    Raises:
        ValueError: If the sample has neither.
    """
    from mmfast.data.samples import content_parts

    if "answer" in sample:
        return sample["answer"]
    last = sample["messages"][-1]
    if last["role"] != "assistant":
        raise ValueError(
            f"evaluate: sample {sample['id']!r} has no answer to compare with; samples with an `answer`, or whose "
            "last turn is the assistant's, are accepted"
        )
    return "".join(cast(Any, part)["text"] for part in content_parts(last))


def without_images(sample: Sample) -> Sample:
    """The sample with every medium taken out of its turns."""
    from mmfast.data.samples import content_parts

    messages = [
        {**message, "content": [part for part in content_parts(message) if part["type"] == "text"]}
        for message in sample["messages"]
    ]
    return cast(Any, {**sample, "messages": messages})


def _open(
    model_or_run: MultimodalModel | str | Path, llm: str | None = None, encoder: str | None = None
) -> MultimodalModel:
    if not isinstance(model_or_run, (str, Path)):
        return model_or_run
    import torch

    from mmfast.models import open_model

    model = open_model(model_or_run, llm=llm, encoder=encoder)
    return cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")


def _check_template(model: MultimodalModel) -> None:
    template = cast(Any, model.processor).template
    if not template.keep_question:
        raise ValueError(
            f"evaluate: the model's template is {template.name!r}, which drops the question; a template that keeps "
            "it is accepted; evaluate a later stage, or set model.processor.template"
        )


def _chance(data: str) -> float | None:
    split = world_split(data)
    if split is None or split.startswith("captions") or "+" in split:
        return None
    from mmfast.world import chance_accuracy

    return chance_accuracy(split)
