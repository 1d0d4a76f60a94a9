"""What one kind of replacement is, and what the kinds share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

from torch import nn

Forward = Callable[..., Any]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def never(module: nn.Module) -> None:
    """Refuses no module."""


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
        misses: What a module cannot have although it is replaced, and why; None if it has everything.
    """

    name: str
    op: str
    concerns: Callable[[nn.Module], bool]
    refuses_class: Callable[[type[nn.Module]], str | None]
    refuses: Callable[[nn.Module], str | None]
    forward: Callable[[type[nn.Module]], Forward]
    misses: Callable[[nn.Module], str | None] = never


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more than its forward."""
    return any(getattr(module, name) for name in _HOOKS)


def is_bare_linear(module: Any) -> bool:
    """Whether the module is `nn.Linear` and nothing else: whoever has its weight and bias may do without calling it.

    Not so for one that is adapted, quantised, sharded or offloaded: its weight is elsewhere until it is called.
    """
    return type(module) is nn.Linear and "forward" not in module.__dict__ and not has_hooks(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one that it had before it was optimised."""
    return getattr(type(module), "_mmfast_original", type(module))


def is_optimized(module: nn.Module) -> bool:
    """Whether the module's class, or one that it was derived from since, is an optimised one."""
    return hasattr(type(module), "_mmfast_replacement")


def hides_forward(module: nn.Module) -> bool:
    """Whether a forward on the instance is called instead of the class's; that of accelerate's hooks calls it."""
    own = module.__dict__
    called = own.get("_old_forward", own.get("forward"))
    return called is not None and not (
        isinstance(called, MethodType) and called.__func__ is cast(Any, type(module).forward)
    )
