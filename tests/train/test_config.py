"""Configurations: recipes, validation, and the copy in the run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmfast.data import Anyres, pinpoints_up_to
from mmfast.train import StageConfig, TrainConfig, load_config, load_recipe, recipe_names, save_config

# scripts/{pretrain,finetune_full_schedule}.sh and scripts/v1_5/{pretrain,finetune,finetune_lora}.sh of LLaVA:
# stage, batch, epochs, learning rates, LoRA rank and alpha. For llava-1.5-hd there is none; it has finetune.sh's.
PUBLISHED: dict[str, list[tuple[Any, ...]]] = {
    "llava-v1": [
        ("align", 128, 1, {"connector": 2e-3}, None, None),
        ("instruct", 128, 3, {"connector": 2e-5, "language_model": 2e-5}, None, None),
    ],
    "llava-1.5-pretrain": [("align", 256, 1, {"connector": 1e-3}, None, None)],
    "llava-1.5": [("instruct", 128, 1, {"connector": 2e-5, "language_model": 2e-5}, None, None)],
    "llava-1.5-hd": [("instruct", 128, 1, {"connector": 2e-5, "language_model": 2e-5}, None, None)],
    "llava-1.5-lora": [("instruct_lora", 128, 1, {"connector": 2e-5, "lora": 2e-4}, 128, 256)],
    # docs/train_video_chatgpt.md of Video-ChatGPT.
    "video-chatgpt-7b": [("instruct", 32, 3, {"connector": 2e-5, "markers": 2e-5}, None, None)],
}
# alpaca_finetuning_v1/finetuning.sh and llama_adapter_v2_multimodal7b/exps/{pretrain,finetune}.sh of LLaMA-Adapter:
# stage, base rate, epochs, epochs of warm-up, weight decay. For the images of version 1 and for joint training there is
# none; they have the paper's epochs and the rates of both phases.
LLAMA_ADAPTER: dict[str, list[tuple[Any, ...]]] = {
    "llama-adapter-v1-7b": [("instruct", {9e-3}, 5, 2, 0.02)],
    "llama-adapter-v1-7b-images": [("instruct_images", {9e-3}, 30, 12, 0.02)],
    "llama-adapter-v2-7b": [("joint", {1e-4, 1e-3}, 4, 1, 0.02)],
    "llama-adapter-v2-multimodal-7b": [("pretrain", {1e-4}, 3, 0.1, 0.05), ("finetune", {1e-3}, 4, 1, 0.02)],
    "llama-adapter-v2-multimodal-lora-7b": [("pretrain", {1e-4}, 3, 0.1, 0.05), ("finetune_lora", {1e-3}, 4, 1, 0.02)],
}


# name, stage, batch, steps, learning rates at the start, peak and end, all of one part
MINIGPT4: dict[str, tuple[Any, ...]] = {
    "minigpt4-7b-pretrain": ("pretrain", 256, 4 * 5000, 1e-6, 1e-4, 8e-5),
    "minigpt4-7b-finetune": ("finetune", 12, 5 * 200, 1e-6, 3e-5, 1e-5),
    "minigpt-v2-7b": ("finetune_lora", 24, 50 * 1000, 1e-6, 1e-5, 1e-6),
}


@pytest.mark.parametrize("name", MINIGPT4)
def test_minigpt4_recipes_have_the_published_numbers(name: str) -> None:
    (stage,) = load_recipe(name).stages
    for rate in stage.lr.values():
        rates = [rate * stage.start_factor, rate, rate * stage.end_factor]
        assert (stage.name, stage.batch_size, stage.max_steps) == MINIGPT4[name][:3]
        assert rates == pytest.approx(MINIGPT4[name][3:])
    assert (stage.schedule, stage.weight_decay, stage.max_grad_norm) == ("unshifted_cosine", 0.05, 0.0)


def test_recipes_are_the_named_ones() -> None:
    tiny = (
        "lavin",
        "llama-adapter-v1",
        "llama-adapter-v2",
        "llava",
        "llava-hd",
        "minigpt-v2",
        "minigpt4",
        "video-chatgpt",
    )
    worlds = [f"{name}-world" for name in tiny]
    published = [*PUBLISHED, *LLAMA_ADAPTER, *MINIGPT4, "lavin-7b", "lavin-13b"]
    assert recipe_names() == sorted([*published, *worlds])


def test_llava_1_5_hd_has_the_canvases_of_six_tiles() -> None:
    canvases = load_recipe("llava-1.5-hd").options["image_grid_pinpoints"]
    assert canvases == [list(canvas) for canvas in pinpoints_up_to(6, 224)]
    largest = max(Anyres(canvases, 224, 16).num_tokens(size) for size in canvases)
    assert (largest, load_recipe("llava-1.5-hd").max_length) == (1888, 4096)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_numbers(name: str) -> None:
    recipe = load_recipe(name)
    stages = [(s.name, s.batch_size, s.epochs, s.lr, s.lora_rank, s.lora_alpha) for s in recipe.stages]
    assert stages == PUBLISHED[name]
    for stage in recipe.stages:
        assert (stage.warmup_ratio, stage.weight_decay, stage.max_grad_norm) == (0.03, 0.0, 1.0)
    connectors = {"llava-v1": "linear", "video-chatgpt-7b": None}
    assert recipe.connector == connectors.get(name, "mlp2x_gelu")
    assert recipe.dtype == "bfloat16"


@pytest.mark.parametrize("name", LLAMA_ADAPTER)
def test_llama_adapters_rates_are_base_rates_times_batch_over_256(name: str) -> None:
    recipe = load_recipe(name)
    for stage, (title, bases, epochs, warmup, decay) in zip(recipe.stages, LLAMA_ADAPTER[name], strict=True):
        assert (stage.name, stage.epochs, stage.weight_decay) == (title, epochs, decay)
        assert sorted(set(stage.lr.values())) == pytest.approx(sorted(base * 32 / 256 for base in bases))
        assert stage.warmup_ratio * stage.epochs == pytest.approx(warmup, rel=1e-2)
        assert (stage.batch_size, stage.betas, stage.max_grad_norm) == (32, (0.9, 0.95), 0)


def test_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llava-2' is not known.*llava-1\.5-lora"):
        load_recipe("llava-2")


@pytest.mark.parametrize("name", recipe_names())
def test_saved_config_loads_equal(name: str, tmp_path: Path) -> None:
    config = replace(load_recipe(name), seed=7, out="somewhere")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    # To YAML 1.1, 1e-3 is text.
    path = tmp_path / "config.yaml"
    path.write_text("stages: [{name: align, lr: {connector: 1e-3}, weight_decay: 1e-2}]")
    stage = load_config(path).stages[0]
    assert stage.lr == {"connector": 1e-3}
    assert stage.weight_decay == 1e-2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{name: align, bach_size: 3}]", r"stages\.bach_size is not a field.*batch_size"),
        ("learning_rate: 3", r"learning_rate is not a field"),
        ("stages: [{name: align, batch_size: 0}]", r"stages\.batch_size is 0"),
        ("stages: [{name: align, lr: {connector: fast}}]", r"stages\.lr\.connector is 'fast'"),
        ("stages: [{name: align, lr: 1.0}]", r"stages\.lr is 1\.0"),
        ("stages: [{name: align, betas: 1}]", r"stages\.betas is 1;"),
        ("stages: [{name: align, betas: [0.9, 1.0]}]", r"stages\.betas is 1\.0"),
        ("stages: [{name: align, lora_dropout: 1.0}]", r"stages\.lora_dropout is 1\.0"),
        ("stages: [{name: align, warmup_ratio: 3}]", r"stages\.warmup_ratio is 3"),
        ("stages: [{name: align, end_factor: 2}]", r"stages\.end_factor is 2"),
        ("stages: [{name: align, schedule: linear}]", r"stages\.schedule is 'linear'; cosine or unshifted_cosine"),
        ("stages: [{name: align, end_factor: 0.1}]", r"start_factor, end_factor is \(0\.0, 0\.1\); 0 with"),
        ("stages: [align]", r"stages\.'align' is no mapping"),
        ("stages: [{batch_size: 1}]", r"stages\.name is None"),
        ("dtype: float16", r"dtype is 'float16'; float32 or bfloat16"),
        ("save_every: true", r"save_every is True"),
        ("- a", r"holds a list"),
        ("a: [", r"not readable as YAML"),
    ],
)
def test_errors_name_the_field_and_the_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(encoder="e", data="d", stages=[StageConfig("align")]), "llm is not set"),
        (TrainConfig(llm="l", encoder="e", data="d"), "stages is empty"),
        (TrainConfig(llm="l", encoder="e", stages=[StageConfig("align")]), r"stage 0 \(align\) has no data"),
    ],
)
def test_incomplete_configs_are_refused(config: TrainConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check_complete()
