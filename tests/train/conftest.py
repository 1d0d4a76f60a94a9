"""Two random backbones small enough to train in milliseconds, and samples of very different lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmfast.train import StageConfig, TrainConfig, train
from mmfast.train.log import StepLog

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other cost far more than these small tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a random Llama with a byte-level tokenizer and of a random CLIP tower with 4 patches."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbones")
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "llm")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        )
    ).save_pretrained(folder / "llm")
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(folder / "encoder")
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        folder / "encoder"
    )
    return {"llm": str(folder / "llm"), "encoder": str(folder / "encoder")}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSON file of 20 samples: most with an image, some of text alone, answers of 1 to 30 words."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    samples: list[dict[str, Any]] = []
    for index in range(20):
        parts: list[dict[str, str]] = [{"type": "text", "text": f"say {WORDS[index % 10]}"}]
        if index % 5:
            Image.new("RGB", (8, 8), (index * 12, 255 - index * 12, 90)).save(folder / f"{index}.png")
            parts.insert(0, {"type": "image", "image": f"{index}.png"})
        answer = " ".join(WORDS[(index + k) % 10] for k in range(1 + index * index % 30))
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        samples.append({"id": f"sample-{index}", "messages": turns})
    (folder / "samples.json").write_text(json.dumps(samples))
    return str(folder / "samples.json")


MakeConfig = Callable[..., TrainConfig]


@pytest.fixture
def train_until_crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig, int], None]:
    """Trains until a crash in the step after `done`, before its line is written."""

    def run(config: TrainConfig, done: int) -> None:
        write = StepLog.write

        def crash(log: StepLog, record: dict[str, Any]) -> None:
            if record["step"] > done:
                raise BufferError
            write(log, record)

        with monkeypatch.context() as patch:
            patch.setattr(StepLog, "write", crash)
            with pytest.raises(BufferError):
                train(config)

    return run


@pytest.fixture
def make_config(backbones: dict[str, str], data: str, tmp_path: Path) -> MakeConfig:
    """Makes a configuration of two stages, the second with LoRA, dropout and accumulation."""

    def make(align: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
        first = {"batch_size": 4, "max_steps": 4, "template": "vicuna_v1", "lr": {"connector": 1e-2}}
        second: dict[str, Any] = {
            "batch_size": 6,
            "micro_batch_size": 2,
            "max_steps": 6,
            "lr": {"connector": 1e-3, "lora": 1e-2},
            "lora_rank": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.2,
        }
        stages = [
            StageConfig("align", **{**first, **(align or {})}),
            StageConfig("instruct_lora", **{**second, **(lora or {})}),
        ]
        values = {"data": data, "out": str(tmp_path / "run"), "stages": stages, **backbones, **fields}
        return TrainConfig(**values)

    return make
