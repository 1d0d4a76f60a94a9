"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

__all__ = ["steps_in_stage", "warmup_cosine"]


def warmup_cosine(step: int, total: int, warmup_ratio: float) -> float:
    """Factor on the peak learning rate: a linear rise from zero, then half a cosine to zero.

    Equal to transformers' `get_cosine_schedule_with_warmup` with `ceil(total * warmup_ratio)` warm-up steps,
    which the published LLaVA runs used; like there, the very first step has rate 0 if there is a warm-up.

    Args:
        step: Optimiser steps of the stage done before this one.
        total: Optimiser steps of the stage.
        warmup_ratio: Share of the steps that warm up.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def steps_in_stage(samples: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a stage.

    The last window of an epoch may be smaller than the batch: it is trained, not dropped, which is exact
    because every window is normalised by its own supervised tokens.

    Args:
        samples: Samples in one epoch.
        batch_size: Samples per step.
        epochs: Passes over the data; a fraction ends inside an epoch.
        max_steps: Overrides `epochs` if given.
    """
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(epochs * math.ceil(samples / batch_size)))
