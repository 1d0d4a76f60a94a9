"""What to say when memory has run out: where it goes, and what would save some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmfast.train.config import TrainConfig
from mmfast.train.memory import is_out_of_memory

__all__ = ["explained_out_of_memory"]

_NAMED = 3


@contextmanager
def explained_out_of_memory(config: TrainConfig, index: int) -> Iterator[None]:
    """Turns running out of memory in stage `index` into an error that has the plan and the cheapest changes.

    Raises:
        RuntimeError: In place of the allocator's.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        # Outside of this block nothing holds the frames of the failed step, and so its tensors, any more.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise RuntimeError(_advice(config, index, reason))


def _advice(config: TrainConfig, index: int, reason: str) -> str:
    from mmfast.train.plan import as_bytes, knobs, plan_stage, plan_table

    head = f"train: out of memory in stage {config.stages[index].name} ({reason})"
    try:
        plan, found = plan_stage(config, index), knobs(config, index)[:_NAMED]
    except ValueError as error:
        return f"{head}; it cannot be planned: {error}"
    lines = [f"{head}; as planned for samples of the longest length allowed:", plan_table(plan)]
    lines.append("what would save memory, the cheapest first:")
    for name, other in found:
        saved, more = as_bytes(plan.total - other.total), other.work / plan.work - 1
        lines.append(f"  {name:<36} {saved:>8} less, about {more:.0%} more work")
    lines.append("  or a smaller max_length")
    lines.append("mmfast estimate RECIPE --gpu 24GB --fit finds what fits before anything is loaded")
    return "\n".join(lines)
