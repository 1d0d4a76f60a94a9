"""Training steps of LLaVA with LoRA on samples of many lengths: padded, grouped by length, and packed.

All providers take the same samples through forward and backward in as many micro-batches; the tokens are the real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import CLIPVisionConfig, LlamaConfig

from mmfast.adapt import optimize
from mmfast.adapt.packing import IMPLEMENTATION, attend_by_samples
from mmfast.benchmarks.harness import Row, Settings, measure, peak_extra_bytes
from mmfast.data import Encoded, Processor
from mmfast.models import Llava, LlavaConfig, LoraSpec
from mmfast.train.batches import MicroBatch, micro_batch
from mmfast.train.step import accumulate_gradients

SAMPLES, MICRO = 16, 4
VOCABULARY, PATCHES = 1000, 64
SIZES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32},
}


def build(device: str) -> Llava:
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **SIZES[device])
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=112, patch_size=14)
    model = Llava(LlavaConfig(text_config=text, vision_config=vision, image_token_id=VOCABULARY))
    model.requires_grad_(False)
    model.add_lora(LoraSpec(rank=16, alpha=32.0))
    model.part_parameters("connector")["connector.0.weight"].requires_grad_(True)
    optimize(model.language_model)
    attend_by_samples(model.language_model)
    return model.to(device).train()


def samples() -> list[Encoded]:
    """Lengths as of a mixture for instruction tuning: a long tail, and a quarter of text alone."""
    choose = random.Random(0)
    made = []
    for index in range(SAMPLES):
        images = 1 if index % 4 else 0
        length = min(1024, max(16, round(choose.lognormvariate(4.8, 0.9))))
        text = [choose.randrange(VOCABULARY) for _ in range(length)]
        ids = [VOCABULARY] * (PATCHES * images) + text
        labels = [-100] * (len(ids) - length // 2) + ids[len(ids) - length // 2 :]
        media = [torch.randn(3, 112, 112)] * images
        made.append(Encoded(str(index), ids, labels, media, [PATCHES] * images))
    return made


def batches(encoded: Sequence[Encoded], collate: Callable[[Any], dict[str, Any]]) -> list[MicroBatch]:
    chunks = [encoded[start : start + MICRO] for start in range(0, len(encoded), MICRO)]
    return [micro_batch([item.id for item in chunk], collate(chunk)) for chunk in chunks]


def with_mask(batch: MicroBatch) -> MicroBatch:
    """As transformers is used: a mask says where padding is."""
    lengths = batch.inputs["sample_lengths"]
    names = ("input_ids", "labels", "label_rows", "pixel_values")
    inputs = {name: batch.inputs[name] for name in names if name in batch.inputs}
    inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
    return MicroBatch(batch.ids, inputs, batch.tokens)


def rows(settings: Settings) -> list[Row]:
    device = settings.device
    model, encoded = build(device), samples()
    # What `collate` and `pack` need of a processor that reads nothing.
    bare: Any = SimpleNamespace(pad_token_id=0, image_token_id=VOCABULARY)
    for name in ("collate_media", "collate_all", "collate"):
        setattr(bare, name, partial(getattr(Processor, name), bare))
    pack = partial(Processor.pack, bare)
    padded = batches(encoded, bare.collate)
    grouped = batches(sorted(encoded, key=lambda item: (bool(item.media), len(item.input_ids))), bare.collate)
    packed = batches(encoded, pack)
    accelerator = Accelerator(cpu=device == "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def step(window: list[MicroBatch], implementation: str = IMPLEMENTATION) -> float:
        model.get_decoder().set_attn_implementation(implementation)
        model.zero_grad(set_to_none=True)
        return accumulate_gradients(model, window, accelerator, dtype).loss

    runs = {
        "padded, mask": partial(step, [with_mask(batch) for batch in padded], "sdpa"),
        "padded": partial(step, padded),
        "grouped by length": partial(step, grouped),
        "packed, block mask": partial(step, packed, "sdpa"),
        "packed": partial(step, packed),
    }
    losses = {name: run() for name, run in runs.items()}
    if max(losses.values()) - min(losses.values()) > (1e-5 if dtype == torch.float32 else 1e-2):
        raise RuntimeError(f"the losses differ: {losses}")
    tokens, slots = sum(batch.tokens for batch in packed), sum(b.inputs["input_ids"].numel() for b in padded)
    case = f"{SAMPLES} samples, {tokens} tokens in {slots} padded"
    found: list[Row] = []
    for name, row in measure(runs, device, settings.rounds, warmup=1).items():
        speed, peak = round(tokens / row["ms"] * 1e3), round(peak_extra_bytes(runs[name], device) / 2**20, 1)
        found.append({"case": case, "provider": name, **row, "tokens/s": speed, "peak MiB": peak})
    return found
