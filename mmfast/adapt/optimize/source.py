"""What a function of another package is, known by its source: a fingerprint that changes when the code does."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


class _WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return node if node.value is None else ast.copy_location(ast.Assign([node.target], node.value), node)


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str | None:
    """16 hexadecimal digits for the code of the innermost function; None where its source cannot be read.

    The function's docstring, comments, annotations and decorators do not count; its name, arguments and statements do.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    node.decorator_list, node.returns = [], None
    if ast.get_docstring(node, clean=False) is not None:
        node.body = node.body[1:]
    text = ast.unparse(ast.fix_missing_locations(_WithoutAnnotations().visit(node)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def wrapped_elsewhere(function: Callable[..., Any], *packages: str) -> str | None:
    """The module of a wrapper around `function` that is not one of these packages' own; None without one."""
    while hasattr(function, "__wrapped__"):
        module = getattr(function, "__globals__", {}).get("__name__", "an unknown module")
        if module.split(".")[0] not in packages:
            return module
        function = function.__wrapped__
    return None


def unlike(cls: type, known: str | set[str], example: str, *, wrappers: tuple[str, ...] = ()) -> str | None:
    """Why `cls.forward` cannot be taken for the known one of `example`; None if it can.

    Args:
        cls: A class with a `forward`.
        known: The fingerprints accepted.
        example: The class that the known forward is of.
        wrappers: Packages whose decorators around `forward` are known to leave its result as it is.
    """
    forward = cls.forward  # type: ignore[attr-defined]
    module = wrapped_elsewhere(forward, *wrappers)
    if module is not None:
        return f"its forward is wrapped by {module}"
    found = fingerprint(forward)
    if found is None:
        return "the source of its forward cannot be read"
    return None if found in ({known} if isinstance(known, str) else known) else f"its forward is not that of {example}"
