"""Training in high resolution: images of several sizes in one batch, on top of a run with one view of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mmfast.data import AnyresProcessor, BatchPlan, EncodedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.models import open_model
from mmfast.train import TrainConfig, train
from mmfast.train.batches import training_windows
from mmfast.train.setup import build_model, enter_stage, resolve_stage
from mmfast.train.step import accumulate_gradients

MakeConfig = Callable[..., TrainConfig]
CANVASES = {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
SIZES = ((8, 8), (20, 9), (7, 20), (33, 32), (12, 16))


@pytest.fixture
def sizes_data(tmp_path: Path) -> str:
    """Samples with 0 to 2 images, no two of one size in a row."""
    samples = []
    for index in range(12):
        parts: list[Any] = []
        for number in range(index % 3):
            name = f"{index}-{number}.png"
            Image.effect_noise(SIZES[(index + number) % len(SIZES)], 90).convert("RGB").save(tmp_path / name)
            parts.append({"type": "image", "image": name})
        question = {"role": "user", "content": [*parts, {"type": "text", "text": f"say {index}"}]}
        answer = {"role": "assistant", "content": "word " * (1 + index % 4)}
        samples.append({"id": f"sample-{index}", "messages": [question, answer]})
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    return str(tmp_path / "samples.json")


def test_starts_from_a_run_with_one_view(make_config: MakeConfig, sizes_data: str, tmp_path: Path) -> None:
    stages = make_config().stages
    first = train(make_config(data=sizes_data, stages=stages[:1], out=str(tmp_path / "first")))
    second = make_config(
        data=sizes_data, stages=stages[1:], out=str(tmp_path / "second"), start_from=str(first.out), options=CANVASES
    )
    second.stages[0].lr["connector"] = 0.0
    kept = train(second).model.trained_state()
    for name, tensor in first.model.trained_state().items():
        assert torch.equal(kept[name], tensor)
    second.stages[0].lr["connector"], second.out = 1e-2, str(tmp_path / "third")
    result = train(second)
    assert not torch.equal(result.model.trained_state()["image_newline"], kept["image_newline"])
    opened = open_model(result.out)
    assert isinstance(opened.processor, AnyresProcessor)
    assert torch.equal(opened.trained_state()["image_newline"], result.model.trained_state()["image_newline"])


def test_accumulation_does_not_change_the_step(make_config: MakeConfig, sizes_data: str) -> None:
    """One batch of 12 samples, or 12 of one sample, of which four have no image."""
    config = make_config(data=sizes_data, options=CANVASES)
    torch.manual_seed(0)
    model: Any = build_model(config)
    enter_stage(model, resolve_stage(model, config.stages[0]), torch.device("cpu"))
    samples, folder = open_samples(sizes_data)
    dataset = EncodedDataset(samples, model.processor, folder)
    gradients = []
    for size in (12, 1):
        window = next(training_windows(dataset, BatchPlan(12, 12, 5), range(1), size))
        model.zero_grad()
        accumulate_gradients(model, window, Accelerator(cpu=True), torch.float32)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys() == model.trained_state().keys()
    for name, gradient in whole.items():
        assert gradient.norm() > 0
        assert ((parts[name] - gradient).norm() / gradient.norm()).item() < 1e-5


def test_padding_to_a_square_is_refused(make_config: MakeConfig, sizes_data: str) -> None:
    config = make_config(data=sizes_data, align={"pad_to_square": True}, options=CANVASES)
    with pytest.raises(ValueError, match="pad_to_square is True, but with high resolution"):
        train(config)
