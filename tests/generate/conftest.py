"""A model between the two tiny backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmfast.models import Llava


@pytest.fixture
def model(tiny_llm: Path, tiny_clip: Path) -> Llava:
    """A Llava with a random connector, strong enough for answers to depend on the image."""
    torch.manual_seed(2)
    return Llava.from_parts(tiny_llm, tiny_clip, template="short")


@pytest.fixture
def captioner(tiny_llm: Path, tiny_clip: Path) -> Llava:
    """The same with the template `plain`, as after the alignment stage."""
    torch.manual_seed(2)
    return Llava.from_parts(tiny_llm, tiny_clip, template="plain")
