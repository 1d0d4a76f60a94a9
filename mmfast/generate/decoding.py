"""What chat and evaluation share: the prompt and its room, where an answer stops, how the next token is chosen."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

if TYPE_CHECKING:
    from mmfast.data import Processor
    from mmfast.data.processor import Encoded
    from mmfast.data.samples import Sample
    from mmfast.models.base import MultimodalModel

__all__ = [
    "StopRule",
    "check_max_new_tokens",
    "context_length",
    "decoding_options",
    "encode_prompt",
    "processor_of",
    "to_device",
]


class StopRule:
    """Where an answer ends: at an end token, or at the template's `stop_text`.

    Args:
        model: The model whose tokenizer, template and generation settings decide.
    """

    def __init__(self, model: MultimodalModel) -> None:
        processor = processor_of(model)
        self._tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        ends = cast(Any, model.language_model).generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._end_ids = {end for end in [self._tokenizer.eos_token_id, *ends] if end is not None}
        self._texts = [processor.template.stop_text] if processor.template.stop_text else []

    def criteria(self) -> list[StoppingCriteria]:
        """What `generate` needs to stop, beyond the end tokens that it knows of."""
        return [_TextStops(self._tokenizer, text) for text in self._texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text without what ended it and what followed, and without special tokens."""
        end = next((i for i, token in enumerate(ids) if token in self._end_ids), len(ids))
        # As it is: a clean-up would change text that a stream has shown already.
        text: Any = self._tokenizer.decode(
            list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for stop in self._texts:
            text = text.partition(stop)[0]
        return cast(str, text)

    def settled(self, text: str) -> str:
        """The beginning of an unfinished answer's text that no later token changes.

        White space at the end may turn out to be the answer's last, a broken character to be a whole one that needs
        its next token, and the begin of a stop text to be a whole one.
        """
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        for stop in self._texts:
            begins = (stop[:length] for length in range(len(stop) - 1, 0, -1))
            text = text.removesuffix(next((begin for begin in begins if text.endswith(begin)), ""))
        return text.rstrip()


class _TextStops(StoppingCriteria):
    """Ends each row whose newest tokens hold `text`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._text = text
        # A token is at least one byte, so no more than these can hold the text.
        self._reach = len(text.encode())

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, -self._reach :], skip_special_tokens=True)
        return torch.tensor([self._text in text for text in texts], device=input_ids.device)


def decoding_options(temperature: float = 0.0, top_p: float = 1.0) -> dict[str, Any]:
    """The arguments that make `generate` greedy (temperature 0) or sample.

    Raises:
        ValueError: If the temperature is below 0 or `top_p` is not in (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature}; 0 (greedy) or a finite number above is accepted")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; a number in (0, 1] is accepted; 1 samples from all tokens")
    if temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    # Top-k is 50 unless switched off, which would cut the distribution that top_p is asked of.
    return {"do_sample": True, "num_beams": 1, "temperature": temperature, "top_p": top_p, "top_k": 0}


def encode_prompt(
    model: MultimodalModel,
    sample: Sample,
    room: int = 1,
    media_folder: Path | None = None,
    load_media: bool = True,
) -> Encoded:
    """Encodes a sample up to where its answer begins, whole: a prompt is never truncated.

    Raises:
        ValueError: If the prompt does not leave `room` tokens of the model's context for the answer.
    """
    limit = context_length(model)
    # What the context holds is decided here; max_length is a setting of the training.
    untruncated = copy.copy(processor_of(model))
    untruncated.max_length = sys.maxsize
    encoded = untruncated.encode(sample, add_generation_prompt=True, media_folder=media_folder, load_media=load_media)
    used = len(encoded.input_ids)
    if used + room > limit:
        raise ValueError(
            f"generate: sample '{sample['id']}': the prompt has {used} tokens, but the model's context of {limit} "
            f"must also hold an answer of {room}; ask with fewer turns, images or words, or start the chat over"
        )
    return encoded


def check_max_new_tokens(max_new_tokens: int) -> None:
    """Refuses an answer of no tokens."""
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; 1 or more is accepted")


def context_length(model: MultimodalModel) -> int:
    """Tokens, image tokens included, that the language model was made for."""
    limit = getattr(model.language_model.config, "max_position_embeddings", None)
    return int(limit) if limit else processor_of(model).max_length


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What `generate` needs of a collated batch, on the model's device."""
    return {key: value.to(device) for key, value in batch.items() if key != "labels"}


def processor_of(model: MultimodalModel) -> Processor:
    """The model's processor.

    Raises:
        ValueError: If it has none.
    """
    if model.processor is None:
        raise ValueError(
            "generate: the model has no processor to encode the question with; a model of from_pretrained or "
            "from_parts is accepted; set model.processor"
        )
    return model.processor
