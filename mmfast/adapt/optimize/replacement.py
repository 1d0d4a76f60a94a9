"""What one kind of replacement is, and what the kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Forward = Callable[..., Any]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Replacement:
    """One kind of module and the forward it gets.

    Attributes:
        name: Unique; a pickled module is rebuilt by it.
        op: The name in `ops=`.
        concerns: Whether a module is of this kind or looks like it, so that the report must mention it.
        refuses_class: Why modules of a class keep their forward; None if they need not.
        refuses: Likewise of a single module, whose class is not refused.
        forward: From the original class to the new forward.
    """

    name: str
    op: str
    concerns: Callable[[nn.Module], bool]
    refuses_class: Callable[[type[nn.Module]], str | None]
    refuses: Callable[[nn.Module], str | None]
    forward: Callable[[type[nn.Module]], Forward]


def never(module: nn.Module) -> None:
    """Refuses no module."""


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name) for name in _HOOKS)


def is_bare_linear(module: Any) -> bool:
    """Whether the module is `nn.Linear` and nothing else: whoever has its weight and bias may do without calling it.

    Not so for one that is adapted, quantised, sharded or offloaded: its weight is elsewhere until it is called.
    """
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not has_hooks(module)
