"""Greedy answers to many samples: left-padded batches of similar length, the same answers as one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmfast.data.samples import without_last_answer
from mmfast.generate.decoding import (
    StopRule,
    check_max_new_tokens,
    decoding_options,
    encode_prompt,
    processor_of,
    to_device,
)

if TYPE_CHECKING:
    from mmfast.data.samples import Sample
    from mmfast.models.base import MultimodalModel

__all__ = ["answer_batch"]


@torch.no_grad()
def answer_batch(
    model: MultimodalModel,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    *,
    media_folder: str | Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Answers each sample's last question, greedily.

    Samples are grouped by length, so that a batch holds little padding, and padded on the left, so that every
    answer starts right after its prompt. The model is in eval mode meanwhile.

    Args:
        model: The model, with its processor.
        samples: The samples. The answer at the end of a sample, if there is one, is left out.
        batch_size: Samples per batch. It changes the speed, never an answer (up to ties within rounding).
        max_new_tokens: Longest answer, in tokens.
        media_folder: Folder to which the samples' image paths are relative.
        progress: Whether to show a progress bar.

    Returns:
        One answer per sample in the samples' order, without surrounding white space.

    Raises:
        ValueError: If a number is below 1, a sample leaves no room for the answer, or an
            image cannot be read.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise ValueError(f"answer_batch: batch_size is {batch_size}; 1 or more is accepted")
    check_max_new_tokens(max_new_tokens)
    folder = None if media_folder is None else Path(media_folder)
    lengths = []
    for sample in samples:
        prompt = encode_prompt(model, without_last_answer(sample), max_new_tokens, folder, load_media=False)
        lengths.append(len(prompt.input_ids))
    # The longest come first: if a batch does not fit into memory, it is the first one.
    order = sorted(range(len(samples)), key=lambda index: -lengths[index])
    rule = StopRule(model)
    answers = [""] * len(samples)
    was_training = model.training
    model.eval()
    try:
        with tqdm(total=len(samples), desc="answers", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                encoded = [
                    encode_prompt(model, without_last_answer(samples[i]), max_new_tokens, folder) for i in chosen
                ]
                batch = processor_of(model).collate(encoded, padding_side="left")
                rows = model.generate(
                    **to_device(batch, model.device),
                    **decoding_options(),
                    stopping_criteria=rule.criteria(),
                    max_new_tokens=max_new_tokens,
                ).tolist()
                for index, row in zip(chosen, rows, strict=True):
                    answers[index] = rule.decode(row).strip()
                bar.update(len(chosen))
    finally:
        model.train(was_training)
    return answers
