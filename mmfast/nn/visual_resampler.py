"""Qwen-VL's resampler: the patches of an image as a fixed number of vectors, by one layer of cross-attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops.resampler_attention import resampler_attention


def sin_cos_positions(hidden_size: int, grid_size: int) -> Tensor:
    """[grid_size², hidden_size] (fp32), row by row: sin and cos of the column, then of the row."""
    frequencies = 10000 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    of_one = torch.cat([angles.sin(), angles.cos()], 1)
    columns = of_one.expand(grid_size, -1, -1)
    return torch.cat([columns, columns.transpose(0, 1)], 2).flatten(0, 1).float()


class VisualResampler(nn.Module):
    """Qwen-VL's `Resampler`, under its names.

        x̂ = LN_kv(kv_proj(x));  q̂ = LN_q(query)
        out = MultiheadAttention(query = q̂ + P_q, key = x̂ + P_k, value = x̂)

    P are fixed sin-cos positions on a grid: the queries' grid, interpolated (bicubic) to that of the keys. There is no
    residual connection and no feed-forward. The norm and the projection after it (Qwen-VL's `ln_post` and `proj`) are
    its vision encoder's. The queries, which do not depend on the image, are projected once for all samples.

    Args:
        grid_size: of the queries; grid_size² of them.
        hidden_size: D, of the result; a multiple of 4 and of num_heads.
        num_heads: of the attention.
        encoder_hidden_size: C, of what comes in. Default, or if it is D: D, and there is no `kv_proj`.
        layer_norm_eps: of both norms.

    Raises:
        ValueError: a size is wrong.

    Source: Bai et al., "Qwen-VL" (arXiv 2308.12966), section 2.1; huggingface.co/Qwen/Qwen-VL, visual.py, `Resampler`
    and `get_abs_pos`. Grids that are not square are ours.
    """

    def __init__(
        self,
        grid_size: int = 16,
        hidden_size: int = 4096,
        num_heads: int = 32,
        encoder_hidden_size: int | None = None,
        layer_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        encoder_hidden_size = hidden_size if encoder_hidden_size is None else encoder_hidden_size
        sizes = {
            "grid_size": grid_size,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "encoder_hidden_size": encoder_hidden_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"VisualResampler: {name} is {size}; expected at least 1")
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(
                f"VisualResampler: hidden_size is {hidden_size}; expected a multiple of 4 and of num_heads = "
                f"{num_heads}"
            )
        self.grid_size, self.encoder_hidden_size = grid_size, encoder_hidden_size
        self.pos_embed = nn.Parameter(sin_cos_positions(hidden_size, grid_size), requires_grad=False)
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.empty(grid_size**2, hidden_size), std=0.02))
        self.kv_proj = (
            nn.Identity()
            if encoder_hidden_size == hidden_size
            else nn.Linear(encoder_hidden_size, hidden_size, bias=False)
        )
        # It holds the weights; its forward is not called.
        self.attn = nn.MultiheadAttention(hidden_size, num_heads)
        self.ln_q = nn.LayerNorm(hidden_size, layer_norm_eps)
        self.ln_kv = nn.LayerNorm(hidden_size, layer_norm_eps)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x [B, N, C], patches row by row -> [B, grid_size², D].

        Args:
            x: what the vision encoder gave.
            grid: rows and columns of the patches. Default: as many of both.

        Raises:
            ValueError: `x` is of the wrong shape, or the patches are no such grid.
        """
        if x.dim() != 3 or x.size(2) != self.encoder_hidden_size:
            raise ValueError(f"VisualResampler: x is {list(x.shape)}; expected [B, N, {self.encoder_hidden_size}]")
        rows, columns = (math.isqrt(x.size(1)),) * 2 if grid is None else grid
        if rows * columns != x.size(1) or rows < 1:
            wanted = "a square number; give grid" if grid is None else f"{rows} · {columns}"
            raise ValueError(f"VisualResampler: x is {list(x.shape)}, of {x.size(1)} patches; expected {wanted}")
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        patches = self.ln_kv(self.kv_proj(x))
        inputs = self.ln_q(self.query)[None] + self.pos_embed, patches + self._positions(rows, columns), patches
        query, key, value = (
            F.linear(states, weight, bias).unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip(inputs, weights, biases, strict=True)
        )
        attended = resampler_attention(query.expand(x.size(0), -1, -1, -1), key, value)
        out: Tensor = self.attn.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The positions on another grid [rows · columns, D]."""
        size = self.grid_size
        if (rows, columns) == (size, size):
            return self.pos_embed
        wide = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        grid = wide.T.unflatten(1, (size, size))[None]
        resized = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(self.pos_embed.dtype)

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, encoder_hidden_size={self.encoder_hidden_size}"
