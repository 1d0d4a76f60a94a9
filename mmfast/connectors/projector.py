"""Position-wise projectors: [n, P, in_features] to [n, P, out_features]."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["build_connector"]


def build_connector(kind: str, in_features: int, out_features: int) -> nn.Module:
    """Builds a projector with fresh weights (torch's default initialisation of `nn.Linear`).

    Source: liuhaotian/LLaVA `llava/model/multimodal_projector/builder.py`; its names of the kinds and its
    state-dict keys are kept.

    Args:
        kind: "linear" is x Wᵀ + b. "mlp{d}x_gelu", d of 1 or more, is a linear layer followed by d - 1 times
            an exact GELU and a linear layer of width `out_features`. "identity" is x.
        in_features: Width D of the encoder's features.
        out_features: Width C of the language model's embeddings.

    Returns:
        The module; "mlp{d}x_gelu" is an `nn.Sequential` whose linear layers have the even indices.

    Raises:
        ValueError: If the kind is unknown, or "identity" is asked for between different widths.
    """
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "identity":
        if in_features != out_features:
            raise ValueError(
                f"build_connector: kind is 'identity' but the encoder is {in_features} wide and the language "
                f"model {out_features}; equal widths are accepted; use 'linear' or 'mlp2x_gelu'"
            )
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"build_connector: kind is {kind!r}; accepted are 'linear', 'identity' and 'mlp{{d}}x_gelu' "
            "with d of 1 or more, such as 'mlp2x_gelu'"
        )
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
