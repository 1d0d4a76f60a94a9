"""A module becomes an instance of a subclass of its class that differs in `forward`, and of its class again.

So `isinstance`, parameters, hooks, the names in messages and in saved configurations stay what they are, and nothing
of another package is changed: the subclass is known to its instances alone.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from mmfast.adapt.optimize.kinds import BY_NAME
from mmfast.adapt.optimize.replacement import Replacement

_CLASSES: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def optimized_class(original: type[nn.Module], kind: Replacement) -> type[nn.Module]:
    """The subclass of `original` with the kind's forward, under its name: made once."""
    key = original, kind.name
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(original, kind)
    return _CLASSES[key]


def _make_class(original: Any, kind: Replacement) -> type[nn.Module]:
    namespace = {
        "forward": kind.forward(original),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "_mmfast_original": original,
        "_mmfast_replacement": kind,
    }
    return type(original)(original.__name__, (original,), namespace)


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles as itself: pickle finds classes by name, and under this name it finds the original."""
    cls = type(self)
    reduced = super(cls, self).__reduce_ex__(max(int(protocol), 2))
    if "_mmfast_original" not in cls.__dict__ or reduced[1] != (cls,):
        return reduced
    return _rebuild, (cls._mmfast_original, cls._mmfast_replacement.name), *reduced[2:]


def _rebuild(original: type[nn.Module], kind_name: str) -> nn.Module:
    """An empty module for unpickling: of the original class where this version does not know its forward."""
    kind = BY_NAME.get(kind_name)
    cls = original if kind is None or kind.refuses_class(original) else optimized_class(original, kind)
    return cls.__new__(cls)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Makes the module one of `cls`; accelerate's hooks keep the bound forward, which is changed likewise."""
    old: Any = type(module).forward
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is old:
            module.__dict__[name] = MethodType(cls.forward, module)


def restore(model: nn.Module) -> list[str]:
    """Gives every optimised module in `model` its original class back, whichever report has replaced it.

    Args:
        model: Any module: a model that was optimised, or a copy of one.

    Returns:
        The names of the modules that were restored.
    """
    return [name for name, module in model.named_modules() if restore_module(module)]


def restore_module(module: nn.Module) -> bool:
    """Gives a module its original class back, if it has an optimised one itself."""
    original = type(module).__dict__.get("_mmfast_original")
    if original is None:
        return False
    change_class(module, original)
    return True
