"""Flamingo's perceiver resampler: any number of media features in, a fixed number of latents out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmfast.ops.resampler_attention import resampler_attention

# Rows of media from which it pays to fold the layers' norms into their weights, which costs some passes over these
# (two cores of an Intel Xeon with AMX; D = 1024, fp32 and bf16).
FOLD_ROWS = 1024


class MediaKV(NamedTuple):
    """What all layers attend to: made by `PerceiverResampler.precompute_media_kv`, taken by its `forward`.

    Attributes:
        layers: for each layer, keys and values side by side, [B · T, N, 2 · num_heads · head_dim].
        mask: [B · T, N] (bool), True where a medium is real; or None.
        batch, times: B and T.
    """

    layers: Sequence[Tensor]
    mask: Tensor | None
    batch: int
    times: int


class _Fold(torch.autograd.Function):
    """W diag(γ) and W β, in the passes over W that this takes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, scale, shift)
        return weight * scale, weight @ shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, shift = ctx.saved_tensors
        of_weight, of_scale, of_shift = ctx.needs_input_grad
        return (
            (grad_weight * scale).addr_(grad_bias, shift) if of_weight else None,
            (grad_weight * weight).sum(0) if of_scale else None,
            grad_bias @ weight if of_shift else None,
        )


class _Attention(nn.Module):
    """Attention of the latents to the media and to themselves, under OpenFlamingo's names."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, inner = num_heads, num_heads * head_dim
        self.norm_media = nn.LayerNorm(hidden_size)
        self.norm_latents = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`to_kv(norm_media(x))` as one linear on the normalised x: W diag(γ) and W β, rounded to `dtype` once."""
        wide = torch.promote_types(self.to_kv.weight.dtype, torch.float32)
        norm = self.norm_media
        weight, bias = _Fold.apply(*(x.to(wide) for x in (self.to_kv.weight, norm.weight, norm.bias)))
        return weight.to(dtype), bias.to(dtype)

    def forward(self, latents: Tensor, media: Tensor, media_mask: Tensor | None, projected: bool) -> Tensor:
        """latents [R or 1, n, D], media [R, N, D] or, projected, their keys and values, mask [R, N] -> [R, n, D]."""
        normed = self.norm_latents(latents)
        query = self._heads(self.to_q(normed)).expand(media.size(0), -1, -1, -1)
        latent_key = latent_value = None
        if projected:
            key, value = self._halves(media)
            own = self._halves(self.to_kv(normed))
            latent_key, latent_value = (half.expand(media.size(0), -1, -1, -1) for half in own)
        else:
            rows = torch.cat([self.norm_media(media), normed.expand(media.size(0), -1, -1)], 1)
            key, value = self._halves(self.to_kv(rows))
            if media_mask is not None:
                media_mask = F.pad(media_mask, (0, latents.size(1)), value=True)
        attended = resampler_attention(query, key, value, latent_key, latent_value, media_mask)
        out: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _halves(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        key, value = joint.chunk(2, -1)
        return self._heads(key), self._heads(value)


def feed_forward_of(hidden_size: int, mult: int) -> nn.Sequential:
    inner = hidden_size * mult
    return nn.Sequential(
        nn.LayerNorm(hidden_size),
        nn.Linear(hidden_size, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, hidden_size, bias=False),
    )


class PerceiverResampler(nn.Module):
    """The media of each image or video as `num_latents` vectors: OpenFlamingo's module, under its names.

        x = media (+ frame_embs[f]) (+ media_time_embs[t])
        for each layer:  z ← z + Attention(LN(x), LN(z));  z ← z + FeedForward(z)
        out = LN(z)

    The media never change from layer to layer. So they are normalised once for all layers, and each layer's norm is
    folded into its projection to keys and values (exactly: in fp32 or wider, rounded once, differentiable). Backward
    then makes no gradient of the media where they are frozen, and keys of media and latents are never concatenated.
    Fewer than 1,024 rows of media are not worth the folding: each layer takes them and the latents in one product; nor
    is a CPU's forward without gradients, where each layer norms the media itself.

    Args:
        hidden_size: D, of the media and of the result.
        depth: number of layers.
        num_heads, head_dim: of the attention, whose width need not be D.
        num_latents: vectors that come out for each image or video.
        ff_mult: width of the feed-forward over D.
        max_num_frames: frames that have an embedding, which is added to their media; None: no such embedding.
        max_num_media: images or videos of a sample that have an embedding; None: no such embedding.

    Raises:
        ValueError: a size is less than 1.

    Source: Alayrac et al., "Flamingo" (arXiv 2204.14198), section 3.1.1; mlfoundations/open_flamingo,
    open_flamingo/src/helpers.py:15-132. The mask is ours.
    """

    def __init__(
        self,
        hidden_size: int,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        num_latents: int = 64,
        ff_mult: int = 4,
        max_num_frames: int | None = None,
        max_num_media: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_latents": num_latents,
            "ff_mult": ff_mult,
            "max_num_frames": max_num_frames,
            "max_num_media": max_num_media,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"PerceiverResampler: {name} is {size}; expected at least 1")
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))
        self.frame_embs = None if max_num_frames is None else nn.Parameter(torch.randn(max_num_frames, hidden_size))
        self.media_time_embs = (
            None if max_num_media is None else nn.Parameter(torch.randn(max_num_media, 1, hidden_size))
        )
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(hidden_size, num_heads, head_dim), feed_forward_of(hidden_size, ff_mult)])
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(hidden_size)

    def forward(
        self, media: Tensor | None = None, media_mask: Tensor | None = None, *, media_kv: MediaKV | None = None
    ) -> Tensor:
        """The latents of each image or video.

        Args:
            media: [B, T, F, V, D] (T images or videos of F frames of V patches), or [B, T, N, D].
            media_mask (bool): True where media are real: [B, T, F] for whole frames, or the shape of `media` but D.
                Default: all are. An image of which nothing is real is no error: its latents see each other.
            media_kv: what `precompute_media_kv` gave, instead of `media` and `media_mask`.

        Returns:
            [B, T, num_latents, D].

        Raises:
            ValueError, TypeError: an argument is wrong.
        """
        if media is not None and media_kv is None:
            rows, mask = self._rows(media, media_mask)
            projected = rows.shape[:-1].numel() >= FOLD_ROWS
            inputs = self._project(rows) if projected else [rows] * len(self.layers)
            shape = media.size(0), media.size(1)
        elif media_kv is not None and media is None and media_mask is None:
            projected, inputs, mask, shape = True, media_kv.layers, media_kv.mask, (media_kv.batch, media_kv.times)
        else:
            raise ValueError("PerceiverResampler: give media, with or without media_mask, or media_kv alone")
        if len(inputs) != len(self.layers):
            raise ValueError(
                f"PerceiverResampler: media_kv is of {len(inputs)} layers; expected {len(self.layers)}; was it made by "
                "another resampler?"
            )
        # One copy until the first layer has seen the media.
        latents = self.latents[None]
        for (attention, feed_forward), layer_input in zip(self._parts(), inputs, strict=True):
            latents = latents + attention(latents, layer_input, mask, projected)
            latents = latents + feed_forward(latents)
        return self.norm(latents).unflatten(0, shape)

    def precompute_media_kv(self, media: Tensor, media_mask: Tensor | None = None) -> MediaKV:
        """The keys and values of all layers, for `forward(media_kv=...)`; arguments as of `forward`."""
        rows, mask = self._rows(media, media_mask)
        return MediaKV(self._project(rows), mask, media.size(0), media.size(1))

    def _parts(self) -> list[tuple[_Attention, nn.Module]]:
        layers: Any = self.layers
        return [(attention, feed_forward) for attention, feed_forward in layers]

    def _rows(self, media: Tensor, media_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Media with their embeddings [B · T, N, D], and their mask [B · T, N]."""
        self._check(media, media_mask)
        batch, times = media.shape[:2]
        if media_mask is not None:
            if media_mask.dim() < media.dim() - 1:
                media_mask = media_mask[..., None].expand(media.shape[:-1])
            media_mask = media_mask.reshape(batch * times, -1)
        if self.frame_embs is not None:
            frames = media if media.dim() == 5 else media[:, :, None]
            media = frames + self.frame_embs[: frames.size(2), None].to(media.dtype)
        if self.media_time_embs is not None:
            media = media.flatten(2, -2) + self.media_time_embs[:times].to(media.dtype)
        return media.flatten(2, -2).flatten(0, 1), media_mask

    def _project(self, media: Tensor) -> Sequence[Tensor]:
        """For each layer, keys and values side by side of media [R, N, D]."""
        attentions = [attention for attention, _ in self._parts()]
        if media.is_cpu and not torch.is_grad_enabled():
            # Forward alone, a norm of the media takes less than folding it: 1.06 to 1.13 times as fast.
            return [attention.to_kv(attention.norm_media(media)) for attention in attentions]
        normed = F.layer_norm(media, media.shape[-1:], eps=self.norm.eps)
        folded = [attention.folded(media.dtype) for attention in attentions]
        if media.is_cpu:
            return [F.linear(normed, weight, bias) for weight, bias in folded]
        weights, biases = zip(*folded, strict=True)
        return F.linear(normed, torch.cat(weights), torch.cat(biases)).chunk(len(folded), -1)

    def _check(self, media: Tensor, media_mask: Tensor | None) -> None:
        where, size = "PerceiverResampler", self.latents.size(1)
        shape = list(media.shape)
        if media.dim() not in (4, 5) or media.size(-1) != size:
            raise ValueError(f"{where}: media is {shape}; expected [B, T, F, V, {size}] or [B, T, N, {size}]")
        frames = media.size(2) if media.dim() == 5 else 1
        for name, embedding, count in (
            ("max_num_frames", self.frame_embs, frames),
            ("max_num_media", self.media_time_embs, media.size(1)),
        ):
            if embedding is not None and count > embedding.size(0):
                raise ValueError(f"{where}: media is {shape}, with {count} of {name} = {embedding.size(0)} at most")
        if media_mask is not None:
            if media_mask.dtype != torch.bool:
                raise TypeError(f"{where}: media_mask is {media_mask.dtype}; expected torch.bool, True where real")
            if media_mask.shape not in (media.shape[:3], media.shape[:-1]):
                raise ValueError(
                    f"{where}: media_mask is {list(media_mask.shape)} and media {shape}; expected {shape[:3]} or "
                    f"{shape[:-1]}"
                )

    def extra_repr(self) -> str:
        latents, hidden_size = self.latents.shape
        return f"hidden_size={hidden_size}, num_latents={latents}, depth={len(self.layers)}"
