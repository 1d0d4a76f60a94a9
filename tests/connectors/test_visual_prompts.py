"""LLaMA-Adapter's visual branches against torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfast.connectors import GlobalPrompt, VisualQueries


def test_visual_queries_are_a_transformer_on_queries_and_tokens() -> None:
    torch.manual_seed(0)
    branch = VisualQueries(in_features=6, width=16, num_queries=3, depth=2, num_heads=4, out_features=10).double()
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    hidden = torch.cat([branch.query.expand(2, -1, -1), branch.input_norm(branch.input_proj(features))], 1)
    for block in branch.blocks:
        layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True).double()
        ours = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "proj.", "linear1.": "fc1.", "linear2.": "fc2."}
        ours |= {"norm1.": "norm1.", "norm2.": "norm2."}
        state = block.state_dict()
        layer.load_state_dict({f"{t}{end}": state[f"{o}{end}"] for t, o in ours.items() for end in ("weight", "bias")})
        hidden = layer(hidden)
    expected = branch.output_norm(branch.output_proj(hidden[:, :3]))
    torch.testing.assert_close(branch(features), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="width is 16 and num_heads 3"):
        VisualQueries(6, 16, 3, 2, 3, 10)


def test_the_released_sizes() -> None:
    """768 wide, 16 heads of 48, 8 blocks, 10 queries, onto 4096: the counts of the published tensors."""
    with torch.device("meta"):
        branch = VisualQueries(768, 768, 10, 8, 16, 4096)
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in branch.named_children()}
    assert counts == {
        "input_proj": 590_592,
        "input_norm": 1_536,
        "blocks": 56_702_976,
        "output_proj": 3_149_824,
        "output_norm": 8_192,
    }
    assert branch.query.numel() == 7_680


def test_a_global_prompt_starts_at_zero() -> None:
    branch = GlobalPrompt(8, 4, 6)
    features = torch.randn(3, 1, 8)
    assert torch.equal(branch(features), torch.zeros(3, 1, 6))
    branch(features).sum().backward()
    assert branch[2].weight.grad.any() and not branch[0].weight.grad.any()
