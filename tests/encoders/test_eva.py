"""EVA ViT-g: counts, transformers' blocks without the norm, both file layouts, interpolated positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionConfig, Blip2VisionModel, OPTConfig

from mmfast.encoders import EvaEncoder


def config(**changes: object) -> Blip2VisionConfig:
    settings = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
        "initializer_range": 0.2,
    }
    return Blip2VisionConfig(**{**settings, **changes})


@pytest.fixture
def tower() -> Blip2VisionModel:
    tower = Blip2VisionModel(config()).eval()
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith("qkv.bias"):
                parameter.unflatten(0, (3, -1))[1] = 0  # as in EVA, which has no bias of the keys
    return tower


def original(tower: Blip2VisionModel) -> dict[str, Tensor]:
    """The tower's tensors as eva_vit_g.pth has them, with its last block and norm that nobody uses."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.projection": "attn.proj",
        "self_attn": "attn",
    }
    state = {}
    for name, tensor in tower.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            prefix = name.removesuffix("qkv.bias")
            state |= {f"{prefix}q_bias": query.clone(), f"{prefix}v_bias": value.clone()}
        elif not name.startswith("post_"):
            state[name] = tensor.clone()
    unused = {name.replace("blocks.0", "blocks.2"): x for name, x in state.items() if name.startswith("blocks.0")}
    return state | unused | {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}


def test_eva_encoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        encoder = EvaEncoder.from_config(Blip2VisionConfig())
    # transformers stores the keys' bias too, which is zero.
    assert sum(p.numel() for p in encoder.parameters()) - 39 * 1408 == 985_894_528
    assert (encoder.hidden_size, encoder.num_patches, encoder.image_size) == (1408, 257, 224)


def test_eva_encoder_is_the_last_block_and_its_norm_is_left_to_the_q_former(tower: Blip2VisionModel) -> None:
    pixels = torch.randn(2, 3, 28, 28)
    norm = tower.post_layernorm
    with torch.no_grad():
        output = tower(pixel_values=pixels, output_hidden_states=True)
    features = EvaEncoder(tower)(pixels)
    assert torch.equal(features, output.hidden_states[-1])
    assert torch.equal(norm(features), output.last_hidden_state)


def test_eva_encoder_stays_frozen_and_in_eval_mode(tower: Blip2VisionModel) -> None:
    encoder = torch.nn.Sequential(EvaEncoder(tower.requires_grad_(True))).train()
    assert not any(module.training for module in encoder[0].modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_eva_encoder_reads_the_original_file(tower: Blip2VisionModel, tmp_path: Path) -> None:
    path = tmp_path / "eva_vit_g.pth"
    torch.save({name: tensor.half() for name, tensor in original(tower).items()}, path)
    pixels = torch.randn(2, 3, 28, 28)
    encoder = EvaEncoder.from_original(path, config=config())
    assert not any(p.requires_grad for p in encoder.parameters())
    expected = EvaEncoder(tower.half().float())(pixels)
    torch.testing.assert_close(encoder(pixels), expected)
    encoder.save_pretrained(tmp_path / "eva")
    opened = EvaEncoder.from_pretrained(tmp_path / "eva")
    assert torch.equal(opened(pixels), encoder(pixels))


def test_eva_encoder_opens_the_tower_of_a_whole_blip_2(tower: Blip2VisionModel, tmp_path: Path) -> None:
    text = OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    q_former = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "encoder_hidden_size": 24}
    blip = Blip2ForConditionalGeneration(
        Blip2Config(vision_config=config().to_dict(), qformer_config=q_former, text_config=text.to_dict())
    )
    blip.vision_model.load_state_dict(tower.state_dict())
    blip.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 28, 28)
    assert torch.equal(EvaEncoder.from_pretrained(tmp_path)(pixels), EvaEncoder(tower)(pixels))
    assert EvaEncoder.from_pretrained(tmp_path, torch.bfloat16)(pixels).dtype == torch.bfloat16


def test_eva_encoder_interpolates_positions(tower: Blip2VisionModel, tmp_path: Path) -> None:
    path = tmp_path / "eva_vit_g.pth"
    torch.save(original(tower), path)
    encoder = EvaEncoder.from_original(path, image_size=56, config=config())
    assert (encoder.num_patches, encoder.image_size, encoder.config.image_size) == (65, 56, 56)
    own = tower.embeddings.position_embedding.detach()
    grid = own[0, 1:].T.reshape(1, 24, 4, 4)
    expected = F.interpolate(grid, (8, 8), mode="bicubic").reshape(24, 64).T
    positions = encoder.tower.embeddings.position_embedding
    torch.testing.assert_close(positions[0, 1:], expected)
    assert torch.equal(positions[:, :1], own[:, :1])
    # transformers interpolates too, when asked on every call.
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        hidden = tower(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
    torch.testing.assert_close(encoder(pixels), hidden[-1])


def test_eva_encoder_errors(tower: Blip2VisionModel, tiny_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        EvaEncoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds a 'clip_vision_model'; a BLIP-2 model"):
        EvaEncoder.from_pretrained(tiny_clip)
    path = tmp_path / "file.pth"
    torch.save({"llama_proj.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"'llama_proj\.weight' is no tensor of EVA's vision tower"):
        EvaEncoder.from_original(path)
    state = original(tower)
    del state["blocks.1.attn.proj.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"differ in 1 names or shapes: .*layers\.1\.self_attn\.projection\.weight"):
        EvaEncoder.from_original(path, config=config())
    torch.save(original(tower), path)
    with pytest.raises(ValueError, match=r"differ in 12 names or shapes: .*fc1"):
        EvaEncoder.from_original(path, config=config(intermediate_size=48))
    with pytest.raises(ValueError, match="image_size is 30; a multiple of the patch's 7 is accepted"):
        EvaEncoder.from_original(path, image_size=30, config=config())
    EvaEncoder(tower).save_pretrained(tmp_path / "eva")
    (tmp_path / "eva" / "model.safetensors").unlink()
    from safetensors.torch import save_file

    kept = {k: v.contiguous() for k, v in tower.state_dict().items() if "fc1" not in k}
    save_file(kept, tmp_path / "eva" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['encoder\.layers\.0\.mlp\.fc1\.bias'"):
        EvaEncoder.from_pretrained(tmp_path / "eva")
