"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from mmfast.train.config import StageConfig

__all__ = ["rate_factor", "steps_in_stage", "warmup_cosine", "warmup_unshifted_cosine"]


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


def warmup_unshifted_cosine(step: int, total: int, warmup_ratio: float, start: float, end: float) -> float:
    """Factor on the peak learning rate: a linear rise from `start`, then half a cosine to `end`, begun at step 0.

    As the cosine is that of all steps, the rate drops when the warm-up ends: with a fifth of the steps to where a tenth
    of the way from the peak to `end` is done.

    Source: salesforce/LAVIS `lavis/common/optims.py` as MiniGPT-4 has it (`linear_warmup_cosine_lr`, by the step).

    Args:
        step: Optimiser steps of the stage done before this one.
        total: Optimiser steps of the stage.
        warmup_ratio: Share of the steps that warm up.
        start: Factor of step 0, if there is a warm-up.
        end: Factor that the cosine goes to.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return start + (1 - start) * step / warmup
    return end + (1 - end) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def rate_factor(config: StageConfig, step: int, total: int) -> float:
    """Factor on the peak learning rates in step `step` of `total`, counted from 0, by the stage's schedule."""
    if config.schedule == "cosine":
        return warmup_cosine(step, total, config.warmup_ratio)
    return warmup_unshifted_cosine(step, total, config.warmup_ratio, config.start_factor, config.end_factor)


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
