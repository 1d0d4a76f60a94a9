"""What `optimize` replaced and what it left, and the way back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from mmfast.adapt.optimize.classes import restore_module
from mmfast.adapt.optimize.replacement import is_optimized

# How many names a line of the report spells out.
SHOWN = 2


class Replaced(NamedTuple):
    """A module that has a forward of mmfast now.

    Attributes:
        name: Its name in the model; "" is the model itself.
        op: The op, by its name in `ops=`.
        kind: The name of its class.
    """

    name: str
    op: str
    kind: str


class Left(NamedTuple):
    """A module that an op is meant for and that keeps its forward, or a part of what it does.

    Attributes:
        name: Its name in the model; "" is the model itself.
        op: The op, by its name in `ops=`.
        kind: The name of its class.
        reason: Why it was left.
    """

    name: str
    op: str
    kind: str
    reason: str


@dataclass(eq=False)
class OptimizeReport:
    """What `mmfast.optimize` did. In a `with` statement the model is restored at the end.

    Attributes:
        model: The name of the model's class.
        ops: The ops asked for.
        replaced: One record for each module with another forward.
        left: One record for each module that an op is meant for and that was left, with the reason.
        modules: The replaced modules, in the order of their records; none once they are restored.
        restored: Whether `restore` was called.
    """

    model: str
    ops: tuple[str, ...]
    replaced: Sequence[Replaced]
    left: Sequence[Left]
    modules: Sequence[weakref.ref[nn.Module]] = ()
    restored: bool = False

    def restore(self) -> None:
        """Gives the replaced modules their very classes back; again, or after modules went, it does nothing more."""
        changed = []
        for record, reference in zip(self.replaced, self.modules, strict=False):
            module = reference()
            if module is not None and not restore_module(module) and is_optimized(module):
                changed.append(record.name or self.model)
        self.modules = ()
        self.restored = True
        if changed:
            warnings.warn(
                f"OptimizeReport.restore: {_names(changed)} got another class after mmfast.optimize (fully_shard does "
                "so) and keep it; restore before that",
                stacklevel=2,
            )

    def __enter__(self) -> OptimizeReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"mmfast.optimize on {self.model}, ops {', '.join(self.ops)}:" + " restored since" * self.restored]
        for op in self.ops:
            kinds = [record.kind for record in self.replaced if record.op == op]
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
            if counts:
                lines.append(f"  {op}: replaced {counts}")
            left: dict[tuple[str, str], list[str]] = {}
            for record in self.left:
                if record.op == op:
                    left.setdefault((record.kind, record.reason), []).append(record.name)
            for (kind, reason), names in left.items():
                lines.append(f"  {op}: left {len(names)} {kind} ({_names(names)}): {reason}")
            if not counts and not left:
                lines.append(f"  {op}: no layer that it could serve")
        return "\n".join(lines)


def _names(names: Iterable[str]) -> str:
    listed = [name or "the model" for name in names]
    return ", ".join(listed[:SHOWN]) + f" and {len(listed) - SHOWN} more" * (len(listed) > SHOWN)
