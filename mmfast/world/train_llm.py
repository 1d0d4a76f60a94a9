"""Trains the world's language model: a Llama of 0.9 M parameters that knows text about digits and has seen no image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from mmfast.data.templates import TEMPLATES
from mmfast.world.clips import CLIP_KIND_WEIGHTS, ask_clip, describe_clip, draw_text_clip
from mmfast.world.questions import (
    KIND_WEIGHTS,
    ask,
    ask_without_digits,
    caption,
    check_all_digits,
    describe,
    draw_text_labels,
    grid,
    request_caption,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

BATCH_SIZE = 64
WARMUP_STEPS = 100
SYSTEM_PROMPT = TEMPLATES["vicuna_v1"].system + " "


class Round(NamedTuple):
    """A round of training, with its own optimiser and learning rate schedule.

    Args:
        steps: of one batch each.
        learning_rate: the highest.
        kind_weights: how often questions of each of `questions.KINDS` are asked.
        captions: share of documents that are a description and its caption; also of questions that ask for one.
        without_digits: share of documents whose questions bring their own digits.
        checks: share of documents whose first question asks after all ten digits.
        turns: the fewest and the most questions of a document.
        prompts: weight of the loss of what is no answer. Answers are what the model is for; the rest of the text
            only has to become familiar.
        clips: share of documents on clips.
        clip_kind_weights: how often questions of each of `clips.CLIP_KINDS` are asked.
        noise: embeddings of a document are moved by a normal deviate of up to so many times their own size, so that
            answers do not hang on the exact vectors of words (as in NEFTune, arXiv 2310.05914).
    """

    steps: int
    learning_rate: float
    kind_weights: tuple[float, float, float, float]
    captions: tuple[float, float]
    without_digits: float
    checks: float
    turns: tuple[int, int]
    prompts: float
    clips: float = 0.0
    clip_kind_weights: tuple[float, float, float] = CLIP_KIND_WEIGHTS
    noise: float = 0.0


# Finding a digit comes first; comparing two and looking for one anywhere build on it. Looking for one is learned
# late from single questions, so the second round also asks after all ten at once. Comparisons take longest. Clips
# come last, with noise, which nothing learns to begin with.
ROUNDS = (
    Round(
        steps=2000,
        learning_rate=2e-3,
        kind_weights=KIND_WEIGHTS,
        captions=(0.15, 0.1),
        without_digits=0.05,
        checks=0.0,
        turns=(1, 3),
        prompts=0.2,
    ),
    Round(
        steps=1200,
        learning_rate=2e-3,
        kind_weights=(0.16, 0.08, 0.38, 0.38),
        captions=(0.05, 0.05),
        without_digits=0.05,
        checks=0.3,
        turns=(1, 4),
        prompts=0.05,
    ),
    Round(
        steps=700,
        learning_rate=1e-3,
        kind_weights=(0.15, 0.05, 0.2, 0.6),
        captions=(0.05, 0.05),
        without_digits=0.1,
        checks=0.05,
        turns=(1, 4),
        prompts=0.05,
    ),
    Round(
        steps=1600,
        learning_rate=1.5e-3,
        kind_weights=(0.12, 0.06, 0.16, 0.66),
        captions=(0.05, 0.05),
        without_digits=0.05,
        checks=0.05,
        turns=(1, 4),
        prompts=0.05,
        clips=0.5,
        clip_kind_weights=(0.25, 0.25, 0.5),
        noise=0.5,
    ),
)


class Piece(NamedTuple):
    """A stretch of a document; `answer` marks what the model has to say itself."""

    text: str
    answer: bool


def build_llm(vocab_size: int) -> LlamaForCausalLM:
    """The untrained model: 4 layers, 4 heads, 128 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return LlamaForCausalLM(config)


def write_document(rng: np.random.Generator, split: str, plan: Round, system: str = "") -> list[Piece]:
    """A conversation about a written description of a picture or a clip, or a description and its caption."""
    labels = draw_text_labels(rng, split)
    form = rng.random()
    if form >= 1 - plan.clips:
        return write_clip_document(rng, split, plan, system)
    if form < plan.captions[0]:
        return [Piece(grid(labels), False), Piece(caption(rng, labels) + "\n", True)]
    without_digits = form < plan.captions[0] + plan.without_digits
    checked = not without_digits and form < plan.captions[0] + plan.without_digits + plan.checks
    pieces = []
    for turn in range(int(rng.integers(plan.turns[0], plan.turns[1] + 1))):
        if without_digits:
            question, answer = ask_without_digits(rng)[1:3]
        elif checked and turn == 0:
            question, answer = check_all_digits(labels)[1:3]
        elif rng.random() < plan.captions[1]:
            question, answer = request_caption(rng), caption(rng, labels)
        else:
            question, answer = ask(rng, labels, weights=plan.kind_weights)[1:3]
        if rng.random() < 0.2:
            question = question[0].upper() + question[1:]
        if turn == 0 and not without_digits:
            question = _join(rng, describe(rng, labels), question)
        start = system if turn == 0 else ""
        pieces += [Piece(f"{start}USER: {question} ASSISTANT:", False), Piece(f" {answer}</s>", True)]
    return pieces


def write_clip_document(rng: np.random.Generator, split: str, plan: Round, system: str = "") -> list[Piece]:
    """A conversation about a written description of a clip."""
    clip = draw_text_clip(rng, split)
    pieces = []
    for turn in range(int(rng.integers(plan.turns[0], plan.turns[1] + 1))):
        question, answer = ask_clip(rng, clip, weights=plan.clip_kind_weights)[1:3]
        if rng.random() < 0.2:
            question = question[0].upper() + question[1:]
        if turn == 0:
            # On either side of the question, as Video-ChatGPT's training data has it.
            parts = [question, describe_clip(rng, clip)]
            question = "\n".join(parts if rng.integers(2) else reversed(parts))
        start = system if turn == 0 else ""
        pieces += [Piece(f"{start}USER: {question} ASSISTANT:", False), Piece(f" {answer}</s>", True)]
    return pieces


def _join(rng: np.random.Generator, description: str, question: str) -> str:
    """Both in one message: mostly as an image and its question stand, on two lines, the description first."""
    form = rng.random()
    if form < 0.8:
        return f"{description}\n{question}"
    if form < 0.9:
        return f"{question}\n{description}"
    return f"{description}. {question}"


class TextBatches:
    """Batches of tokenised documents, endless and decided by the seed.

    Each is `(input_ids, answer, real)`, all [B, T]: int64 ids padded on the right, bool for the tokens of answers,
    bool for everything but padding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, plan: Round, batch_size: int, seed: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.plan = plan
        self.batch_size = batch_size
        self.rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        while True:
            # Sorted by length within eight batches, which spares a third of the work: less padding.
            rows = sorted((self._encode(self._write()) for _ in range(8 * self.batch_size)), key=len)
            for batch in self.rng.permutation(8):
                yield self._pad(rows[batch * self.batch_size : (batch + 1) * self.batch_size])

    def _write(self) -> list[Piece]:
        # One document in eight opens with a system prompt, so that answers do not hang on absolute positions.
        system = SYSTEM_PROMPT if self.rng.random() < 0.125 else ""
        return write_document(self.rng, "train", self.plan, system)

    def _encode(self, document: list[Piece]) -> list[tuple[int, bool]]:
        """Token ids, each with whether it belongs to an answer. A piece starts where a token starts."""
        encoded = self.tokenizer([piece.text for piece in document], add_special_tokens=False)["input_ids"]
        tokens = [(token, piece.answer) for piece, ids in zip(document, encoded, strict=True) for token in ids]
        return [(self.tokenizer.bos_token_id, False), *tokens]

    def _pad(self, rows: list[list[tuple[int, bool]]]) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(map(len, rows))
        padding = (self.tokenizer.pad_token_id, False)
        table = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        real = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        return table[..., 0], table[..., 1].bool(), real


def train_llm(tokenizer: PreTrainedTokenizerFast, seed: int = 0, max_steps: int | None = None) -> LlamaForCausalLM:
    """The trained model in evaluation mode, after `ROUNDS` of training, each cut to `max_steps` if that is given.

    Only text is seen, and only of the train split: the digit quadruples that `draw_text_labels(rng, "test")` draws
    never occur.
    """
    torch.manual_seed(seed)
    model = build_llm(len(tokenizer))
    for number, plan in enumerate(ROUNDS, start=1):
        batches = TextBatches(tokenizer, plan, BATCH_SIZE, [seed, number])
        steps = plan.steps if max_steps is None else min(plan.steps, max_steps)
        train_round(model, plan, batches, steps, f"llm, round {number} of {len(ROUNDS)}")
    return model.eval()


def train_round(model: LlamaForCausalLM, plan: Round, batches: TextBatches, steps: int, title: str) -> None:
    """Trains `model` in place for `steps` steps."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, steps))
    with tqdm(zip(range(steps), batches, strict=False), title, steps, mininterval=10) as progress:
        for _, (ids, answer, real) in progress:
            loss, accuracy = _loss(model, ids, answer, real, plan)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", answer_tokens=f"{accuracy.item():.3f}", refresh=False)


def warmup_then_cosine(step: int, steps: int) -> float:
    """The learning rate's factor: linear over `WARMUP_STEPS`, then half a cosine to zero."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def _loss(model: LlamaForCausalLM, ids: Tensor, answer: Tensor, real: Tensor, plan: Round) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of the next token, and the share of answer tokens that are right."""
    embeds = model.get_input_embeddings()(ids)
    if plan.noise:
        size = embeds.detach().norm(dim=-1, keepdim=True) * embeds.shape[-1] ** -0.5
        strength = plan.noise * torch.rand(len(ids), 1, 1)
        embeds = embeds + strength * size * torch.randn_like(embeds)
    logits = model(inputs_embeds=embeds, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    targets, answer, real = ids[:, 1:], answer[:, 1:], real[:, 1:]
    weights = torch.where(answer, 1.0, plan.prompts) * real
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
    right = logits.argmax(-1) == targets
    return (losses * weights).sum() / weights.sum(), right[answer].float().mean()
