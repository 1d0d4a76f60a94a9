"""The frozen CLIP encoder against transformers' own hidden states."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmfast.encoders import ClipEncoder


@pytest.fixture
def tower() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    return CLIPVisionModel(config).eval()


@pytest.mark.parametrize("layer", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("select", ["default", "patch", "full", "cls_patch"])
def test_clip_encoder_is_the_hidden_state(tower: CLIPVisionModel, layer: int, select: str) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    if select in ("default", "patch"):
        expected = expected[:, 1:]
    encoder = ClipEncoder(copy.deepcopy(tower), layer, select)
    assert torch.equal(encoder(pixels), expected)
    assert encoder.num_patches == expected.shape[1]
    assert (encoder.hidden_size, encoder.image_size) == (32, 16)


def test_clip_encoder_runs_no_layer_above_the_tap(tower: CLIPVisionModel) -> None:
    last = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))[-1]
    last.forward = None  # type: ignore[assignment]
    assert ClipEncoder(tower)(torch.randn(1, 3, 16, 16)).shape == (1, 4, 32)


def test_clip_encoder_stays_frozen_and_in_eval_mode(tower: CLIPVisionModel) -> None:
    encoder = torch.nn.Sequential(ClipEncoder(tower.requires_grad_(True))).train()
    assert not any(module.training for module in encoder[0].modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.requires_grad_(True)
    assert not encoder(torch.randn(1, 3, 16, 16, requires_grad=True)).requires_grad


def test_clip_encoder_computes_in_its_own_dtype(tower: CLIPVisionModel) -> None:
    assert ClipEncoder(tower.to(torch.bfloat16))(torch.randn(1, 3, 16, 16)).dtype == torch.bfloat16


def test_clip_encoder_complete_state_dict_is_the_whole_tower(tower: CLIPVisionModel) -> None:
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    state = ClipEncoder(tower, layer=1).complete_state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_clip_encoder_from_pretrained(tower: CLIPVisionModel, tmp_path: Path) -> None:
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    opened = ClipEncoder.from_pretrained(str(tmp_path))
    assert torch.equal(opened(pixels), ClipEncoder(tower)(pixels))


def test_clip_encoder_errors(tower: CLIPVisionModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer is -5; a tower of 3 layers has hidden states -4\.\.3"):
        ClipEncoder(tower, layer=-5)
    with pytest.raises(ValueError, match="select is 'cls'; accepted are 'default', 'patch'"):
        ClipEncoder(tower, select="cls")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ClipEncoder.from_pretrained(tmp_path / "nowhere")
