"""The world's tokenizer: byte-level BPE of 512 tokens in which every digit is one token, " 7" as well as "7"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmfast.data.templates import TEMPLATES
from mmfast.world.questions import (
    POSITIONS,
    ask,
    ask_without_digits,
    caption,
    describe,
    draw_labels,
    request_caption,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
VOCAB_SIZE = 512
MAX_LENGTH = 512
# A word, a digit or a run of other signs, each with the space before it; a line break alone; what is left of spaces.
_PIECES = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\n|\s+(?!\S)|\s"
# Not questions, but met in prompts: the letters and words of ordinary instructions should not fall apart into bytes.
_OTHER_TEXT = (
    TEMPLATES["vicuna_v1"].system + " USER: hello ASSISTANT: hello",
    "Answer the question using a single word or phrase.",
    "Describe the image in one sentence. What is in this picture? Who are you? I do not know.",
    "Please write a short story about a small dog and a big cat. Where were they? How many years ago? Thank you.",
)


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on the world's own text.

    Any text can be written with it (256 bytes are in the vocabulary) and decodes to itself. `<s>` is put first as in
    Llama's tokenizer, and the offset of a token with a leading space covers that space.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _corpus(seed: int) -> list[str]:
    """Text of the world in a few thousand lines: descriptions, questions and answers."""
    rng = np.random.default_rng([seed, 0])
    lines = [text for text in _OTHER_TEXT for _ in range(50)]
    for _ in range(2000):
        labels = draw_labels(rng)
        question, other = ask(rng, labels), ask_without_digits(rng)
        lines.append(f"USER: {describe(rng, labels)}\n{question.text} ASSISTANT: {question.answer}")
        lines.append(f"USER: {request_caption(rng)} ASSISTANT: {caption(rng, labels)}")
        lines.append(f"USER: {other.text} ASSISTANT: {other.answer}")
    lines += [f"{position} {digit}" for position in POSITIONS for digit in range(10)]
    return lines
