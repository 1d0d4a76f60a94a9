"""Video-ChatGPT's pooling of a clip's features as a module."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.ops.spatio_temporal_pool import spatio_temporal_pool


class SpatioTemporalPool(nn.Module):
    """Means over the patches of each frame, then over the frames at each patch: see `ops.spatio_temporal_pool`.

    It has no parameters. A clip of fewer frames than `num_temporal_tokens` is filled up with rows of zeros, one of more
    is an error: choose frames before they are encoded.

    Args:
        num_temporal_tokens: rows of the temporal part; None: as many as there are frames. Video-ChatGPT has 100.

    Raises:
        ValueError: `num_temporal_tokens` is less than 1.

    Source: Maaz et al., "Video-ChatGPT" (arXiv 2306.05424), section 3.1.
    """

    def __init__(self, num_temporal_tokens: int | None = None) -> None:
        super().__init__()
        if num_temporal_tokens is not None and num_temporal_tokens < 1:
            raise ValueError(
                f"SpatioTemporalPool: num_temporal_tokens is {num_temporal_tokens}; expected at least 1, or None for "
                "as many as there are frames"
            )
        self.num_temporal_tokens = num_temporal_tokens

    def forward(self, features: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """features [B, T, N, D], frame_mask [B, T] (bool, True where a frame is real) -> [B, T' + N, D]."""
        return spatio_temporal_pool(features, self.num_temporal_tokens, frame_mask)

    def extra_repr(self) -> str:
        return f"num_temporal_tokens={self.num_temporal_tokens}"
