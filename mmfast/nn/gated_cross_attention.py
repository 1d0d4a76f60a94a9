"""Flamingo's gated cross-attention block: what lets the text of a frozen language model see media."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfast.nn.perceiver_resampler import feed_forward_of
from mmfast.ops.gated_cross_attention import gated_cross_attention
from mmfast.ops.gated_residual import gated_residual


class _MaskedCrossAttention(nn.Module):
    """Attention of text to media, under OpenFlamingo's names. Media have no norm: a resampler gave them one."""

    def __init__(self, hidden_size: int, media_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.norm = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(media_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor, text_time: Tensor, media_kv: Tensor, only_latest: bool, leak: bool) -> Tensor:
        """x [B, L, D], text_time [B, L], media_kv [B, T, n, 2 · inner] -> [B, L, D]."""
        key, value = (self._heads(half.flatten(1, 2)) for half in media_kv.chunk(2, -1))
        query, length = self._heads(self.to_q(self.norm(x))), media_kv.size(2)
        attended = gated_cross_attention(query, key, value, text_time, length, only_latest=only_latest, leak=leak)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention to media and a feed-forward, each behind a gate that is closed at first: OpenFlamingo's block.

        x ← x + tanh(attn_gate) · Attention(LN(x), media)
        x ← x + tanh(ff_gate) · FeedForward(LN(x))

    A fresh block returns x, bit for bit, and only its gates have a gradient that is not zero. State-dict names are
    OpenFlamingo's, so its checkpoints load.

    Args:
        hidden_size: D, of the text.
        media_size: of the media.
        num_heads, head_dim: of the attention, whose width need not be D.
        ff_mult: width of the feed-forward over D.
        only_latest: whether a token sees the latest medium before it, or all of them.
        leak: let tokens that see nothing see all media alike where OpenFlamingo does, for checkpoints that were trained
            so; `mmfast.ops.gated_cross_attention.reference` says where. Default: they see nothing.

    Raises:
        ValueError: a size is less than 1.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), section 3.1.2 and figure 4; mlfoundations/open_flamingo,
    open_flamingo/src/helpers.py:136-279.
    """

    def __init__(
        self,
        hidden_size: int,
        media_size: int,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_mult: int = 4,
        *,
        only_latest: bool = True,
        leak: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "media_size": media_size,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "ff_mult": ff_mult,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"GatedCrossAttentionBlock: {name} is {size}; expected at least 1")
        self.only_latest, self.leak = only_latest, leak
        self.attn = _MaskedCrossAttention(hidden_size, media_size, num_heads, head_dim)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward_of(hidden_size, ff_mult)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, text_time: Tensor, media: Tensor | None = None, *, media_kv: Tensor | None = None
    ) -> Tensor:
        """The text after it has seen the media.

        Args:
            x: [B, L, D], the text, or those tokens of it that are not in a cache yet.
            text_time: [B, L] (int32, int64), the number of media at or before each token, from `mmfast.ops.text_times`;
                of a cached step, with `past`, so that a token sees the last medium of its prefix.
            media: [B, T, n, media_size], T media of n rows each, as a resampler gives them. T may be 0.
            media_kv: what `precompute_media_kv` gave, instead of `media`.

        Returns:
            [B, L, D] in the dtype of x, also under autocast.

        Raises:
            ValueError, TypeError: an argument is wrong.
        """
        if media is not None and media_kv is None:
            media_kv = self.precompute_media_kv(media)
        elif media_kv is None or media is not None:
            raise ValueError("GatedCrossAttentionBlock: give media or media_kv, and not both")
        self._check("x", x, ("B", "L", self.attn.to_q.in_features))
        self._check("media_kv", media_kv, ("B", "T", "n", self.attn.to_kv.out_features))
        attended = self.attn(x, text_time, media_kv, self.only_latest, self.leak)
        x = gated_residual(x, attended.to(x.dtype), self.attn_gate)
        return gated_residual(x, self.ff(x).to(x.dtype), self.ff_gate)

    def precompute_media_kv(self, media: Tensor) -> Tensor:
        """Keys and values side by side of media [B, T, n, media_size], for `forward(media_kv=...)`: once a generation.

        Returns:
            [B, T, n, 2 · num_heads · head_dim].

        Raises:
            ValueError: media has another shape.
        """
        self._check("media", media, ("B", "T", "n", self.attn.to_kv.in_features))
        joint: Tensor = self.attn.to_kv(media)
        return joint

    def _check(self, name: str, x: Tensor, shape: tuple[str | int, ...]) -> None:
        if x.dim() != len(shape) or x.size(-1) != shape[-1]:
            expected = ", ".join(map(str, shape))
            raise ValueError(f"GatedCrossAttentionBlock: {name} is {list(x.shape)}; expected [{expected}]")

    def extra_repr(self) -> str:
        return f"only_latest={self.only_latest}, leak={self.leak}"
