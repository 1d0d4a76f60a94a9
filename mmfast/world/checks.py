"""What the two backbones can do on their own, measured on digits and texts that no training has seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfast.data.samples import Sample, content_parts
from mmfast.world.clips import draw_clip, draw_frames
from mmfast.world.digits import CELL_SIZE, enlarge, load_split
from mmfast.world.train_encoder import assemble, cell_of_patch, normalize

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, LlamaForCausalLM, PreTrainedTokenizerFast


@torch.no_grad()
def text_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Sample],
    batch_size: int = 100,
) -> dict[str, float]:
    """Share of text-only `questions` answered exactly (greedy decoding): for every kind, and "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        answers = answer_texts(model, tokenizer, [_text(sample) for sample in batch])
        for sample, said in zip(batch, answers, strict=True):
            for name in ("all", sample["kind"]):
                right[name].append(said == sample["answer"])
    return {name: sum(marks) / len(marks) for name, marks in sorted(right.items())}


def answer_texts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[str]:
    """The model's answers to single questions, without the space before and the end token after them."""
    prompts = [f"USER: {text} ASSISTANT:" for text in texts]
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    # Cast, for the annotation of `generate` refuses every class of model.
    written = cast(Any, model).generate(**batch, max_new_tokens=24, do_sample=False)
    written = written[:, batch["input_ids"].shape[1] :]
    return [said.strip() for said in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _text(sample: Sample) -> str:
    return "".join(part["text"] for part in content_parts(sample["messages"][0]) if part["type"] == "text")


@torch.no_grad()
def patch_features(model: CLIPVisionModel, cells: Tensor) -> Tensor:
    """What LLaVA reads of digits [N, 16, 16] (N divisible by four): [N, 4, C], four patches each."""
    canvases = normalize(assemble(cells.view(-1, 4, CELL_SIZE, CELL_SIZE)))
    patches = model(pixel_values=canvases, output_hidden_states=True).hidden_states[-2][:, 1:]
    by_cell = torch.stack([patches[:, cell_of_patch() == cell] for cell in range(4)], dim=1)
    return by_cell.flatten(0, 1)


def probe_accuracy(model: CLIPVisionModel, repeats: int = 4, seed: int = 0) -> dict[str, float]:
    """How well a linear reader of the last-but-one layer, fitted on train digits, reads the test digits.

    Ridge regression on one-hot labels, in closed form. "digit" sees the mean of a digit's four patches, "patch" one
    patch alone. Digits are put on `repeats` canvases each, with other neighbours.
    """
    generator = np.random.default_rng(seed)
    sides = {}
    for split in ("train", "test"):
        digits = load_split(split)
        order = np.concatenate([generator.permutation(len(digits.labels)) for _ in range(repeats)])
        order = order[: len(order) // 4 * 4]
        sides[split] = (
            patch_features(model, torch.from_numpy(enlarge(digits.pixels[order]))).double(),
            torch.from_numpy(digits.labels[order]),
        )
    (train, train_labels), (test, test_labels) = sides["train"], sides["test"]
    accuracy = {}
    for name, fit, read in (
        ("digit", train.mean(1), test.mean(1)),
        ("patch", train.flatten(0, 1), test.flatten(0, 1)),
    ):
        copies = len(fit) // len(train_labels)
        targets = F.one_hot(train_labels.repeat_interleave(copies), 10).double()
        guess = _ridge(fit, targets, read).argmax(-1)
        accuracy[name] = (guess == test_labels.repeat_interleave(copies)).double().mean().item()
    return accuracy


@torch.no_grad()
def clip_features(model: CLIPVisionModel, clips: Sequence[np.ndarray]) -> Tensor:
    """What Video-ChatGPT reads of clips of eight frames [8, 32, 32] uint8: [N, 8 + 16, C].

    Means over the patches of each frame, then means over the frames at each patch.
    """
    frames = torch.from_numpy(np.concatenate(clips)).float() / 255
    patches = model(pixel_values=normalize(frames), output_hidden_states=True).hidden_states[-2][:, 1:]
    by_clip = patches.view(len(clips), -1, *patches.shape[1:])
    return torch.cat([by_clip.mean(2), by_clip.mean(1)], dim=1)


def clip_probe_accuracy(model: CLIPVisionModel, clips: int = 1000, seed: int = 0) -> dict[str, float]:
    """How well one linear reader, fitted on train digits, reads the digits of a clip in its pooled features.

    As `probe_accuracy`; "time" is its share of right digits in the means of frames, "space" in those of patches.
    """
    generator = np.random.default_rng(seed)
    sides = {}
    for split in ("train", "test"):
        drawn = [draw_clip(generator) for _ in range(clips)]
        frames = [draw_frames(split, clip, generator)[:-1] for clip in drawn]
        features = [clip_features(model, frames[start : start + 100]) for start in range(0, clips, 100)]
        cells = cell_of_patch().tolist()
        shown = [[*np.repeat(clip.sequence, 2), *(clip.labels[cell] for cell in cells)] for clip in drawn]
        sides[split] = (torch.cat(features).double(), torch.from_numpy(np.array(shown)))
    (train, train_digits), (test, test_digits) = sides["train"], sides["test"]
    targets = F.one_hot(train_digits.flatten(), 10).double()
    guess = _ridge(train.flatten(0, 1), targets, test.flatten(0, 1)).argmax(-1).view_as(test_digits)
    right = (guess == test_digits).double()
    return {"time": right[:, :8].mean().item(), "space": right[:, 8:].mean().item()}


def _ridge(features: Tensor, targets: Tensor, unseen: Tensor, penalty: float = 1e-3) -> Tensor:
    """Targets of `unseen` by ridge regression; features are standardised, `penalty` is per sample."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, y = (features - mean) / std, targets - targets.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return (unseen - mean) / std @ torch.linalg.solve(gram, x.T @ y)
