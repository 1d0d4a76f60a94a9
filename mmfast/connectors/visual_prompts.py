"""LLaMA-Adapter's visual branches: the features of an image as prompts [n, P, C] of a language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GlobalPrompt", "VisualQueries"]


class GlobalPrompt(nn.Sequential):
    """Version 1: global features [n, 1, D], of several scales joined, become one vector [n, 1, C] for every prompt.

        Linear(D, width), SiLU, Linear(width, C)

    As all prompts of a layer get the same vector i, the attention between them stays what it was: an image adds
    act(gate) · V i to what every word gets, whatever the word asks for.

    The last layer starts at zero, so a language model whose prompts were trained on text alone is not disturbed by an
    image. The paper says "a simple MLP" and no widths: width 64 on four class tokens of CLIP ViT-L/14 has 0.53 M
    parameters, the paper's has about 0.56 M (1.79 M less the 1.23 M of prompts and gates).

    Source: Zhang et al., "LLaMA-Adapter" (arXiv 2303.16199), section 3.3, equation 9.

    Args:
        in_features: D.
        width: Of the layer between.
        out_features: C.
    """

    def __init__(self, in_features: int, width: int, out_features: int) -> None:
        last = nn.Linear(width, out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(nn.Linear(in_features, width), nn.SiLU(), last)


class VisualQueries(nn.Module):
    """Version 2: tokens [n, T, D] and learned queries pass through transformer blocks; the queries become prompts.

        z = LN(Linear(D, W)(x));  u = Blocks([queries; z])[:P];  out = LN(Linear(W, C)(u))   [n, P, C]

    Source: OpenGVLab/LLaMA-Adapter, llama_adapter_v2_multimodal7b/llama/llama_adapter.py (`forward_visual`).

    Args:
        in_features: D, of the encoder's tokens.
        width: W, of the blocks.
        num_queries: P.
        depth: Number of blocks.
        num_heads: Of the blocks' attention; W is a multiple of it.
        out_features: C.

    Raises:
        ValueError: If the width is no multiple of the heads.
    """

    def __init__(
        self, in_features: int, width: int, num_queries: int, depth: int, num_heads: int, out_features: int
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"VisualQueries: width is {width} and num_heads {num_heads}; a multiple is accepted")
        self.query = nn.Parameter(torch.empty(num_queries, width))
        nn.init.normal_(self.query)
        self.input_proj = nn.Linear(in_features, width)
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth))
        self.output_proj = nn.Linear(width, out_features)
        self.output_norm = nn.LayerNorm(out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Maps [n, T, D] to [n, P, C]."""
        tokens = self.input_norm(self.input_proj(features))
        hidden = torch.cat([self.query.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.output_norm(self.output_proj(hidden[:, : len(self.query)]))
        return out


class _Block(nn.Module):
    """timm's `Block`: pre-norm attention and a GELU MLP four times as wide."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = hidden + self.fc2(F.gelu(self.fc1(self.norm2(hidden))))
        return out
