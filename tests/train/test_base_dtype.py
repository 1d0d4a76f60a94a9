"""Training on a language model that is quantised while it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmfast.adapt import quantize_checkpoint
from mmfast.adapt.optimize import restore
from mmfast.models import Llava, open_model
from mmfast.train import StageConfig, TrainConfig, train
from mmfast.train.setup import build_model

MakeConfig = Callable[..., TrainConfig]


def trained(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model" / "trained.safetensors")


@pytest.mark.parametrize(("format", "dtype"), [("nf4", "float32"), ("int8", "bfloat16")])
def test_it_trains_as_on_a_quantised_folder(
    make_config: MakeConfig, backbones: dict[str, str], tmp_path: Path, format: Any, dtype: str
) -> None:
    streamed = make_config(out=str(tmp_path / "streamed"), dtype=dtype, base_dtype=format)
    quantize_checkpoint(backbones["llm"], tmp_path / "llm", format)
    stored = make_config(out=str(tmp_path / "stored"), dtype=dtype, llm=str(tmp_path / "llm"))
    result, _ = train(streamed), train(stored)
    assert result.model.base_dtype == format
    state = trained(streamed)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained(stored).items())
    # Opened, the language model computes as transformers does.
    restore(result.model.language_model)
    inputs = {"input_ids": torch.tensor([[1, 50, 60, 70, 80]])}
    with torch.no_grad():
        assert torch.equal(open_model(streamed.out)(**inputs).logits, result.model(**inputs).logits)


def test_nothing_is_loaded_for_a_stage_that_cannot_train(
    make_config: MakeConfig, backbones: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Llava, "from_parts", None)
    quantize_checkpoint(backbones["llm"], tmp_path / "llm")
    for fields in ({"base_dtype": "nf4"}, {"llm": str(tmp_path / "llm")}):
        config = make_config(stages=[StageConfig("align"), StageConfig("instruct")], **fields)
        with pytest.raises(ValueError, match=r"train: stage instruct trains the language model, .* in nf4"):
            build_model(config)


def test_a_dense_base_has_the_dtype_of_the_rest() -> None:
    assert TrainConfig(dtype="bfloat16", base_dtype="bfloat16").base_dtype == "bfloat16"
    with pytest.raises(ValueError, match="base_dtype is 'bfloat16'; null, float32, int8, nf4 is accepted"):
        TrainConfig(base_dtype="bfloat16")
