"""ClipScales and ClipTokens against the tower of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from mmfast.encoders import ClipScales, ClipTokens, ProjectedClipTokens


def config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=6,
    )


PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def randomized(tower: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return tower.eval()


def test_scales_are_class_tokens_of_layers(tmp_path: Path) -> None:
    randomized(CLIPVisionModel(config())).save_pretrained(tmp_path)
    states = CLIPVisionModel.from_pretrained(tmp_path)(PIXELS, output_hidden_states=True).hidden_states
    encoder = ClipScales.from_pretrained(tmp_path, [1, 3]).train()
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert encoder.hidden_size == 32
    expected = torch.cat([states[1][:, :1], states[3][:, :1]], -1)
    assert torch.equal(encoder(PIXELS), expected)
    assert ClipScales.from_pretrained(tmp_path, [1], dtype=torch.bfloat16)(PIXELS).dtype == torch.bfloat16
    for layers in ([4], [-1], []):
        with pytest.raises(ValueError, match=r"has hidden states 0\.\.3, at least one of which"):
            ClipScales.from_pretrained(tmp_path, layers)


def test_the_class_token_becomes_clips_image_embedding(tmp_path: Path) -> None:
    randomized(CLIPVisionModelWithProjection(config())).save_pretrained(tmp_path)
    whole = CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    encoder = ProjectedClipTokens.from_pretrained(tmp_path)
    found = encoder(PIXELS)
    assert found.shape == (2, 5, 6) and encoder.hidden_size == 6
    torch.testing.assert_close(found[:, 0], whole(PIXELS).image_embeds, rtol=1e-5, atol=1e-6)
    bare = ClipTokens.from_pretrained(tmp_path)
    assert bare.hidden_size == 16
    torch.testing.assert_close(bare(PIXELS)[:, 0], bare.tower(PIXELS).pooler_output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.visual_projection(bare(PIXELS)), found, rtol=1e-5, atol=1e-6)


def test_a_tower_without_projection_is_refused(tmp_path: Path) -> None:
    CLIPVisionModel(config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ProjectedClipTokens: .* lacks the weights"):
        ProjectedClipTokens.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ClipTokens.from_pretrained(tmp_path / "no")
