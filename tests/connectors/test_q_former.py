"""The Q-Former as a connector and the merge of patches: BLIP-2 of transformers, LAVIS's names, a convolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

from mmfast.connectors import VisualQFormer, merge_patches, read_q_former, write_q_former

SIZES = {"hidden_size": 16, "num_layers": 3, "num_heads": 2, "intermediate_size": 20}


def build(**changes: int) -> VisualQFormer:
    q_former = VisualQFormer(24, **{"num_queries": 5, **SIZES, **changes}).eval()
    with torch.no_grad():
        for parameter in q_former.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return q_former


@pytest.fixture
def blip() -> Blip2ForConditionalGeneration:
    text = OPTConfig(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    q_former = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "encoder_hidden_size": 24,
    }
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            qformer_config=q_former,
            text_config=text.to_dict(),
            num_query_tokens=5,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_visual_q_former_has_the_published_sizes() -> None:
    with torch.device("meta"):
        q_former = VisualQFormer(1408)
    counts = {name: sum(p.numel() for p in m.parameters()) for name, m in q_former.named_children()}
    assert counts == {"q_former": 105_137_664, "ln_vision": 2_816}
    assert q_former.query_tokens.numel() == 24_576
    assert (q_former.num_queries, q_former.hidden_size) == (32, 768)


def test_visual_q_former_from_a_folder_is_blip_2s(blip: Blip2ForConditionalGeneration, tmp_path: Path) -> None:
    blip.save_pretrained(tmp_path)
    state, names = read_q_former(tmp_path)
    q_former = build()
    q_former.load_state_dict(state)
    assert names["ln_vision.weight"] == "vision_model.post_layernorm.weight"
    assert names["q_former.layernorm.bias"] == "qformer.layernorm.bias"
    pixels = torch.randn(2, 3, 28, 28)
    # transformers' norm has another epsilon than the published one.
    blip.vision_model.post_layernorm.eps = 1e-5
    with torch.no_grad():
        output = blip.vision_model(pixels, output_hidden_states=True)
        queries = blip.query_tokens.expand(2, -1, -1)
        expected = blip.qformer(queries, encoder_hidden_states=output.last_hidden_state).last_hidden_state
        torch.testing.assert_close(q_former(output.hidden_states[-1]), expected)


def test_ln_vision_is_computed_in_float32_with_the_published_epsilon() -> None:
    q_former = build().to(torch.bfloat16)
    seen: list[Tensor] = []
    q_former.q_former.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    features = (torch.randn(2, 7, 24) * 3e-3).to(torch.bfloat16)
    q_former(features)
    x, norm = features.double(), q_former.ln_vision
    scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = (scaled * norm.weight.double() + norm.bias.double()).to(torch.bfloat16)
    torch.testing.assert_close(seen[0], expected, rtol=2**-8, atol=0)
    assert (seen[0] == expected).float().mean() > 0.99


def lavis_names(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of BLIP-2's file at the sizes of this test, as LAVIS writes them."""
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, 5, 16),
        "ln_vision.weight": (24,),
        "ln_vision.bias": (24,),
    }
    norm = {"weight": (16,), "bias": (16,)}
    shapes |= {f"Qformer.bert.embeddings.LayerNorm.{name}": shape for name, shape in norm.items()}
    for i in range(layers):
        layer = f"Qformer.bert.encoder.layer.{i}"
        for attention, width in (("attention", 16), *([("crossattention", 24)] if i % 2 == 0 else [])):
            for part, size in (("query", 16), ("key", width), ("value", width)):
                shapes[f"{layer}.{attention}.self.{part}.weight"] = (16, size)
                shapes[f"{layer}.{attention}.self.{part}.bias"] = (16,)
            shapes[f"{layer}.{attention}.output.dense.weight"] = (16, 16)
            shapes[f"{layer}.{attention}.output.dense.bias"] = (16,)
            shapes |= {f"{layer}.{attention}.output.LayerNorm.{name}": shape for name, shape in norm.items()}
        shapes |= {
            f"{layer}.intermediate_query.dense.weight": (20, 16),
            f"{layer}.intermediate_query.dense.bias": (20,),
            f"{layer}.output_query.dense.weight": (16, 20),
            f"{layer}.output_query.dense.bias": (16,),
        }
        shapes |= {f"{layer}.output_query.LayerNorm.{name}": shape for name, shape in norm.items()}
    return shapes


def test_q_former_file_has_lavis_names_and_comes_back(tmp_path: Path) -> None:
    q_former, path = build(), tmp_path / "blip2.pth"
    write_q_former(q_former.state_dict(), path)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"model"}
    assert {name: tuple(x.shape) for name, x in content["model"].items()} == lavis_names(3)
    # A file of the first stage holds weights for text and other heads too.
    content["model"] |= {
        name: torch.ones(2)
        for name in (
            "temp",
            "t5_proj.weight",
            "Qformer.cls.predictions.bias",
            "Qformer.bert.embeddings.position_ids",
            "Qformer.bert.encoder.layer.1.output.LayerNorm.bias",
            "Qformer.bert.encoder.layer.1.intermediate.dense.weight",
        )
    }
    torch.save(content, path)
    state, names = read_q_former(path)
    assert names["q_former.encoder.layer.0.crossattention.attention.key.weight"] == (
        "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"
    )
    assert state.keys() == q_former.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in q_former.state_dict().items())


def test_read_q_former_errors(blip: Blip2ForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth does not exist"):
        read_q_former(tmp_path / "nowhere.pth")
    path = tmp_path / "q.pth"
    torch.save({"model": {"mm_projector.weight": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"holds 'mm_projector\.weight', which is of no BLIP-2"):
        read_q_former(path)
    torch.save({"model": {"t5_proj.weight": torch.ones(2), "query_tokens": torch.ones(2)}}, path)
    with pytest.raises(ValueError, match=r"holds 1 tensors of a Q-Former \(query_tokens\)"):
        read_q_former(path)
    torch.save({"query_tokens": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="does not hold tensors by name under 'model'"):
        read_q_former(path)
    blip.vision_model.save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="holds 0 tensors of a Q-Former"):
        read_q_former(tmp_path / "vision")
    with pytest.raises(ValueError, match="num_queries is 0; 1 or more is accepted"):
        VisualQFormer(24, 0)


def test_merge_patches_is_a_strided_convolution_of_each_row() -> None:
    features, weight = torch.randn(2, 1 + 64, 6), torch.randn(10, 24)
    merged = merge_patches(features)
    assert merged.shape == (2, 16, 24)
    normed = F.layer_norm(features[:, 1:], (6,))
    grid = normed.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    kernel = weight.unflatten(1, (4, 6)).permute(0, 2, 1)[:, :, None]
    expected = F.conv2d(grid, kernel, stride=(1, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(merged @ weight.T, expected, rtol=1e-4, atol=1e-4)


def test_merge_patches_of_a_swapped_pair_swaps_its_channels() -> None:
    features = torch.randn(1, 1 + 16, 6)
    swapped = features.clone()
    swapped[:, [5, 6]] = features[:, [6, 5]]
    merged, other = merge_patches(features), merge_patches(swapped)
    # Patches 5 and 6 are the first two of the second row's group.
    assert torch.equal(other[:, [0, 2, 3]], merged[:, [0, 2, 3]])
    order = [1, 0, 2, 3]
    assert torch.equal(other[:, 1], merged[:, 1].unflatten(-1, (4, 6))[:, order].flatten(1))


@pytest.mark.parametrize(("patches", "square"), [(36, 36), (8, 8)])
def test_merge_patches_refuses_other_grids(patches: int, square: int) -> None:
    with pytest.raises(ValueError, match=f"a square of {square} patches; rows of a multiple of 4 are accepted"):
        merge_patches(torch.randn(1, 1 + patches, 6))
