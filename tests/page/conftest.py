"""Two runs that were never trained: one on the tiny backbones, whose answers are long, and one on the world."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmfast.models import Llava

TINY, WORLD = "tiny", "digits"


@pytest.fixture(scope="session")
def runs(tiny_llm: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(2)
    Llava.from_parts("world", "world", template="vicuna_v1").save_trained(folder / WORLD / "model")
    Llava.from_parts(tiny_llm, tiny_clip, template="short").save_trained(folder / TINY / "model")
    return folder
