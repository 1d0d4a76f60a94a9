"""Rotary position embedding: a function of transformers' modelling file that the attention's forward calls by name.

The attention gets its own forward again, the same code, whose name `apply_rotary_pos_emb` means mmfast's: a Python
function has its own dictionary of globals. The modelling file keeps what it has.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmfast.adapt.optimize.replacement import Forward, Replacement, never
from mmfast.adapt.optimize.source import fingerprint
from mmfast.ops.rope import rope

NAME = "apply_rotary_pos_emb"
# transformers/models/llama/modeling_llama.py: halves are rotated, over the whole head.
ROTARY = "4a8f8b85ee37bd3f"
ROTATE_HALF = "7b6c9b425ca04287"


@functools.cache
def _globals_read(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL")


def _calls_rotary(module: nn.Module) -> bool:
    forward = type(module).forward
    return isinstance(forward, types.FunctionType) and any("rotary" in name for name in _globals_read(forward))


def _refuses_class(cls: type[nn.Module]) -> str | None:
    forward: Any = cls.forward
    if hasattr(forward, "__wrapped__"):
        return f"its forward is wrapped by {forward.__globals__.get('__name__')}"
    if NAME not in _globals_read(forward):
        return f"its forward does not call {NAME}"
    rotary, half = (forward.__globals__.get(name) for name in (NAME, "rotate_half"))
    if not callable(rotary) or not callable(half) or (fingerprint(rotary), fingerprint(half)) != (ROTARY, ROTATE_HALF):
        return f"its {NAME} is not that of Llama"
    return None


def _forward(original: type[nn.Module]) -> Forward:
    function: Any = original.forward
    plain = function.__globals__[NAME]

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and cos.dim() == 3:
            return rope(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim)

    namespace = {**function.__globals__, NAME: apply_rotary_pos_emb}
    # By a module's name torch.compile would look a global up in the module instead of here.
    del namespace["__name__"]
    forward = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    forward.__kwdefaults__ = function.__kwdefaults__
    forward.__annotations__ = function.__annotations__
    return forward


ATTENTION = Replacement("rope", "rope", _calls_rotary, _refuses_class, never, _forward)
