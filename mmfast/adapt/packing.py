"""Attention in training batches: rows of one sample with padding behind it, and rows of several without any.

Neither needs a mask in memory. A causal model sees no padding that comes behind, and the samples of a packed row are
attended to one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["attend_by_samples", "sample_rows"]

# The attention function that `attend_by_samples` gives a decoder.
IMPLEMENTATION = "mmfast_samples"


def attend_by_samples(model: nn.Module) -> None:
    """Lets a language model with SDPA take batches that `sample_rows` describes without a mask.

    The work on a packed row is then the sum of the samples' squared lengths, and each has the bits that it has alone;
    with the block mask that transformers makes otherwise it is the square of the row's length. All else is SDPA's as
    before. A model with another attention implementation stays as it is.

    Args:
        model: A model of transformers that uses its attention interface, or one that holds such a decoder; changed in
            place.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    decoder: Any = model.get_decoder()  # type: ignore[operator]
    if decoder.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    decoder.set_attn_implementation(IMPLEMENTATION)


def sample_rows(
    decoder: Any, sample_lengths: Sequence[int], inputs_embeds: Tensor, attention_mask: Tensor | None = None
) -> dict[str, Any]:
    """The arguments with which a decoder of transformers takes a batch whose samples have these lengths.

    Each sample has a row, of which the rest is padding; or all of them share one row, one after the other, and each has
    positions from 0 on and attends to itself alone. What keeps them apart is, after `attend_by_samples`, a loop over
    them; with flash-attn its kernel for sequences of several lengths; with any other implementation the block mask that
    transformers makes of positions that restart.

    Args:
        decoder: The model of transformers that holds the layers.
        sample_lengths: Tokens of each sample, in order.
        inputs_embeds: [B, L, C], the embeddings.
        attention_mask: None; the lengths say it all.

    Raises:
        ValueError: If the lengths are neither one for each row nor those of the samples of one row, or there is a mask.
    """
    if attention_mask is not None:
        raise ValueError("sample_rows: sample_lengths and attention_mask are given; one is accepted; leave one out")
    rows, length, _ = inputs_embeds.shape
    packed = rows == 1 and sum(sample_lengths) == length
    padded = rows == len(sample_lengths) and max(sample_lengths) <= length
    if not (packed or padded) or min(sample_lengths) < 1:
        raise ValueError(
            f"sample_rows: sample_lengths is {list(sample_lengths)} with {rows} rows of {length} tokens; lengths of 1 "
            "or more are accepted, one for each row, or several that add up to the only one; let the processor make "
            "the batch"
        )
    arguments: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    device, implementation = inputs_embeds.device, decoder.config._attn_implementation
    if implementation == IMPLEMENTATION:
        # transformers hands a mask of four dimensions down as it is, and so makes none; `attend` does not read it.
        arguments["attention_mask"] = inputs_embeds.new_empty(1, 1, 1, 1)
        arguments["sample_lengths"] = () if padded else tuple(sample_lengths)
    if padded:
        return arguments
    positions = torch.cat([torch.arange(count) for count in sample_lengths])
    arguments["position_ids"] = positions[None].to(device, non_blocking=True)
    if implementation.startswith("flash_attention"):
        starts = torch.tensor([0, *sample_lengths]).cumsum(0).int().to(device, non_blocking=True)
        arguments |= {f"cu_seq_lens_{side}": starts for side in "qk"}
        arguments |= {f"max_length_{side}": max(sample_lengths) for side in "qk"}
    return arguments


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sample_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA as transformers calls it, over a packed row once for each of its samples.

    Args:
        sample_lengths: Tokens of each sample of the only row. Empty where each row is one sample, with padding behind
            it at most. None: the mask tells what attends to what. All else is as transformers has it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sample_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    lengths = sample_lengths or query.shape[2]
    samples = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, _mask(q, window), **options)[0] for q, k, v in samples]
    return attended[0] if len(attended) == 1 else torch.cat(attended, 1), None


def _mask(query: Tensor, window: int | None) -> Tensor | None:
    """None for causal attention; a mask [1, 1, L, L] where the window of a sliding one is shorter than the sample."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
