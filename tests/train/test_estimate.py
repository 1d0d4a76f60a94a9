"""The counts of published systems, as `mmfast estimate` gives them on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmfast.cli import main
from mmfast.train import load_recipe, save_config
from mmfast.train.estimate import estimate

# Source: the counts of each paper or, where it has none, the sizes of the published checkpoint's tensors.
COUNTS: dict[str, dict[str, dict[str, int]]] = {
    "llama-adapter-v1-7b": {"instruct": {"prompts": 1_228_800, "gates": 960}},
    "llama-adapter-v1-7b-images": {"instruct_images": {"connector": 528_448, "prompts": 1_228_800, "gates": 960}},
    "llama-adapter-v2-7b": {
        "joint": {
            "connector": 60_665_088,
            "prompts": 1_269_760,
            "gates": 992,
            "visual_gates": 32,
            "norms": 266_240,
            "bias_scale": 2_719_744,
        }
    },
    # The published 61,731,584 of the first phase are with the gate of layer 0, 32 numbers that nothing reads.
    "llama-adapter-v2-multimodal-7b": {
        "pretrain": {"connector": 60_460_800, "prompts": 1_269_760, "gates": 61_731_584 - 32 - 60_460_800 - 1_269_760},
        "finetune": {"norms": 266_240, "bias_scale": 1_363_968 - 266_240},
    },
    "llama-adapter-v2-multimodal-lora-7b": {
        "pretrain": {"connector": 60_460_800, "prompts": 1_269_760, "gates": 992},
        "finetune_lora": {"norms": 266_240, "bias_scale": 1_363_968 - 266_240, "lora": 39_976_960},
    },
    "llava-1.5-7b-pretrain": {"align": {"connector": 20_979_712}},
    "llava-1.5-lora": {"instruct_lora": {"connector": 20_979_712, "lora": 319_815_680}},
    "llava-1.5": {"instruct": {"connector": 20_979_712, "language_model": 6_738_415_616}},
    "minigpt4-7b-pretrain": {"pretrain": {"connector": 3_149_824}},
    "minigpt4-7b-finetune": {"finetune": {"connector": 3_149_824}},
    "minigpt-v2-7b": {"finetune_lora": {"connector": 23_072_768, "lora": 33_554_432}},
    # A newline of 4,096 beside the connector.
    "llava-1.5-hd": {"instruct": {"connector": 20_983_808, "language_model": 6_738_415_616}},
    "llava-v1": {
        "align": {"connector": 4_198_400},
        "instruct": {"connector": 4_198_400, "language_model": 6_738_415_616},
    },
    "lavin-7b": {  # 3,781,296
        "instruct": {"vision_adapters": 491_760, "connector": 659_584, "modality": 8_192, "adapters": 2_621_760}
    },
    "lavin-13b": {  # 5,390,080
        "instruct": {"vision_adapters": 491_760, "connector": 791_680, "modality": 10_240, "adapters": 4_096_400}
    },
    "video-chatgpt-7b": {"instruct": {"connector": 4_198_400, "markers": 8_192}},
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_estimate_gives_the_published_counts(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", recipe, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    trained: dict[str, int] = {}
    for stage in result["stages"]:
        parts = {part: counts["trainable"] for part, counts in stage["parts"].items() if counts["trainable"]}
        assert parts == COUNTS[recipe][stage["name"]]
        assert stage["trainable_parameters"] == sum(parts.values())
        trained |= parts
    assert list(COUNTS[recipe]) == [stage["name"] for stage in result["stages"]]
    assert result["trainable_parameters"] == sum(trained.values())


def test_estimate_of_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    result = estimate("llava-1.5-pretrain", llm="lmsys/vicuna-13b-v1.5")
    assert result["trainable_parameters"] == 31_467_520
    assert estimate("minigpt4-7b-pretrain", llm="lmsys/vicuna-13b-v1.5")["trainable_parameters"] == 3_937_280
    assert "13b" in capsys.readouterr().out.splitlines()[0]


def test_estimate_of_a_file_and_of_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_recipe("llava-world")
    save_config(config, tmp_path / "mine.yaml")
    result: dict[str, Any] = estimate(str(tmp_path / "mine.yaml"))
    assert [stage["trainable_parameters"] for stage in result["stages"]] == [33_024, 189_184]
    assert result["trainable_parameters"] == 189_184
    assert "189,184" in capsys.readouterr().out


def test_estimate_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "no-such-recipe"]) == 1
    assert "the recipes are" in capsys.readouterr().err
    assert main(["estimate", "llava-1.5", "--llm", "no/such-model"]) == 1
    assert "neither a folder nor known" in capsys.readouterr().err
    config = load_recipe("llava-world")
    config.options = {"num_frames": 3}
    save_config(config, tmp_path / "mine.yaml")
    with pytest.raises(ValueError, match="the system llava has no setting num_frames; accepted are connector"):
        estimate(str(tmp_path / "mine.yaml"))
