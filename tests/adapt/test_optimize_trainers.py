"""Stock trainers train an optimised model as they do the model that it was."""

from __future__ import annotations

import importlib
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from optimized_models import SIZES, labelled, make, step, tokens, watch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import mmfast
from mmfast.adapt.optimize.replacement import is_optimized

LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """The state that accelerate keeps for a process, and refuses to change, ends with the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small lose more to the hand-over between threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples() -> list[dict[str, Tensor]]:
    """Eight rows of which unequal parts are labelled."""
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(batch=8)]
    for index, row in enumerate(rows):
        row["labels"][: index % 4 + 2] = -100
    return rows


def losses(trainer: Any, steps: int) -> list[float]:
    """Those of further training steps, and that of the evaluation after them."""
    trainer.args.max_steps = steps
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == steps
    return [*found, trainer.evaluate()["eval_loss"]]


def compare(build: Callable[[], nn.Module], trainer: Callable[[nn.Module], Any], tolerance: float = 1e-5) -> None:
    """Trains, restores and trains on: each loss is that of the model which was never optimised."""
    plain = trainer(build())
    expected = [*losses(plain, 2), *losses(plain, 1)]
    model = build()
    report = mmfast.optimize(model)
    assert report.left == []
    optimised = trainer(model)
    found = losses(optimised, 2)
    report.restore()
    assert not any(map(is_optimized, optimised.model.modules()))
    found += losses(optimised, 1)
    assert found == pytest.approx(expected, rel=tolerance)
    assert len({*expected}) == 5


class TestTrainer:
    """transformers.Trainer."""

    @pytest.mark.parametrize(
        ("name", "lora", "settings"),
        [
            ("llama", False, {}),
            ("mistral", False, {"gradient_checkpointing": True}),
            ("qwen2", False, {"bf16": True}),
            ("llama", True, {}),
            ("qwen2", True, {"gradient_checkpointing": True, "bf16": True}),
        ],
    )
    def test_language_model(self, name: str, lora: bool, settings: dict[str, Any], tmp_path: Path) -> None:
        def build() -> nn.Module:
            return get_peft_model(make(name), LORA) if lora else make(name)

        def trainer(model: nn.Module) -> Trainer:
            arguments = TrainingArguments(str(tmp_path), **SETTINGS, **settings)
            return Trainer(model, arguments, train_dataset=samples(), eval_dataset=samples())

        compare(build, trainer, 1e-2 if settings.get("bf16") else 1e-5)

    def test_the_loss_is_that_of_the_accumulated_batch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        module = importlib.import_module("mmfast.adapt.optimize.loss")
        plain, reductions = module.linear_cross_entropy, []

        def seen(*args: Any, **kwargs: Any) -> Any:
            reductions.append(kwargs["reduction"])
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, "linear_cross_entropy", seen)
        model = make()
        mmfast.optimize(model)
        shapes = watch(model.model.layers[-1].mlp.down_proj)
        arguments = TrainingArguments(str(tmp_path), max_steps=1, **SETTINGS)
        Trainer(model, arguments, train_dataset=samples()).train()
        assert reductions == ["sum", "sum"], "the sum over num_items_in_batch"
        assert [len(shape) for shape in shapes] == [2, 2], "the last MLP computes labelled positions alone"

    @pytest.mark.parametrize("next_", [False, True], ids=["llava", "llava_next"])
    def test_image_text_model(self, next_: bool, tmp_path: Path) -> None:
        vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        configs = {
            "text_config": LlamaConfig(**SIZES),
            "vision_config": CLIPVisionConfig(**vision, image_size=28, patch_size=14),
            "image_token_index": 96,
        }
        pixels = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(0))
        rows = samples()
        count = 10 if next_ else 4
        for row, image in zip(rows, pixels, strict=True):
            text = row["input_ids"].clamp(max=95)
            row["input_ids"] = torch.cat([text[:1], torch.full((count,), 96), text[1:]])
            row["labels"] = torch.cat([torch.full((count,), -100), row["labels"].clamp(max=95)])
            row["pixel_values"] = torch.stack([image, -image]) if next_ else image
            if next_:
                row["image_sizes"] = torch.tensor([28, 28])

        def build() -> nn.Module:
            torch.manual_seed(0)
            if next_:
                return LlavaNextForConditionalGeneration(LlavaNextConfig(**configs, image_grid_pinpoints=[[28, 28]]))
            return LlavaForConditionalGeneration(LlavaConfig(**configs))

        def trainer(model: nn.Module) -> Trainer:
            arguments = TrainingArguments(str(tmp_path), **SETTINGS)
            return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

        compare(build, trainer)


class TestSFTTrainer:
    """That of TRL, whose loss is its own: it makes no logits, but it computes all positions of the last layer."""

    @pytest.fixture
    def build_trainer(self, tmp_path: Path) -> Callable[..., Any]:
        trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'mmfast[test]'")
        datasets = pytest.importorskip("datasets")
        vocabulary = {token: index for index, token in enumerate(("<pad>", "<s>", "</s>", *string.printable[:94]))}
        characters = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
        characters.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="</s>", pad_token="<pad>")
        rows = [{"prompt": f"7 times {number}?", "completion": f"{7 * number}"} for number in range(8)]
        data = datasets.Dataset.from_list(rows)

        def build(model: nn.Module, **settings: Any) -> Any:
            lora = settings.pop("peft_config", None)
            arguments = trl.SFTConfig(str(tmp_path), max_length=None, **{"bf16": False, **SETTINGS, **settings})
            return trl.SFTTrainer(
                model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=lora
            )

        return build

    @pytest.mark.parametrize("settings", [{"peft_config": LORA}, {"bf16": True, "gradient_checkpointing": False}])
    def test_losses(self, settings: dict[str, Any], build_trainer: Callable[..., Any]) -> None:
        compare(make, lambda model: build_trainer(model, **settings), 1e-2 if settings.get("bf16") else 1e-5)

    def test_optimised_after_the_trainer_was_made(self, build_trainer: Callable[..., Any]) -> None:
        expected = losses(build_trainer(make(), peft_config=LORA), 2)
        trainer = build_trainer(make(), peft_config=LORA)
        report = mmfast.optimize(trainer.model)
        assert {record.op for record in report.replaced} == {"lora", "rms_norm", "swiglu", "rope"}
        assert [record.reason for record in report.left] == ["its forward was replaced on the instance"]
        assert losses(trainer, 2) == pytest.approx(expected, rel=1e-5)

    def test_its_metrics_and_the_model_after_restore(self, build_trainer: Callable[..., Any]) -> None:
        model = make()
        report = mmfast.optimize(model)
        trainer = build_trainer(model, max_steps=1)
        trainer.train()
        logged = trainer.state.log_history[0]
        assert 0 <= logged["mean_token_accuracy"] <= 1
        assert logged["entropy"] > 0
        assert model(**labelled()).logits is None
        report.restore()
        # The trainer has put a forward on the model, which calls the one that was there.
        output, _ = step(model, labelled())
        assert output.logits.shape == (3, 11, 97)
