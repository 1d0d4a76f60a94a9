"""What one call of an op costs in bytes, launches and saved memory, on each backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from guarded.cases import Case
from guarded.traffic import OnCall, Traffic, inside
from mmfast.ops import extension
from mmfast.ops.backends import OPS


class Counted(NamedTuple):
    """One call.

    Attributes:
        passes: traffic of forward, and of backward if there is one.
        saved: bytes kept for backward: of the case's inputs, of its outputs, and of neither ("own").
    """

    passes: dict[str, Traffic]
    saved: dict[str, int]


def count(case: Case, backend: str, *, deep: bool = True, on_call: OnCall | None = None) -> Counted:
    """Runs a case, as on a CPU without AVX-512 or AMX, that figures are the same on every machine.

    Args:
        deep: look inside our ops; otherwise each of them counts as one op that reads its inputs and writes its outputs.
        on_call: see `inside`.
    """
    for name, tensor in case.inputs.items():
        tensor.requires_grad_(name in case.trained)
    kept: list[Tensor] = []
    plain = patch.multiple(extension, has_avx512=lambda: False, has_amx=lambda: False)
    with plain, _one_thread(), torch.autograd.graph.saved_tensors_hooks(_noting(kept), lambda tensor: tensor):
        torch.manual_seed(0)
        with _counting(deep, on_call) as forward:
            outputs = [x for x in tree_leaves(case.call(backend)) if isinstance(x, Tensor)]
        saved = _saved(kept, case.inputs.values(), outputs)
        if not case.trained:
            return Counted({"forward": forward}, saved)
        outputs = [x for x in outputs if x.requires_grad]
        wanted = [torch.randn(x.shape).to(x.dtype) for x in outputs]
        with _counting(deep, on_call) as backward:
            torch.autograd.grad(outputs, [case.inputs[name] for name in case.trained], wanted)
    return Counted({"forward": forward, "backward": backward}, saved)


def rows(case: Case, backend: str) -> dict[str, dict[str, Any]]:
    """What is recorded of a case on a backend: figures of each pass, and of what is saved between them."""
    found = count(case, backend)
    table = {name: traffic.row() for name, traffic in found.passes.items()}
    if backend == "cpu":
        for name, traffic in count(case, backend, deep=False).passes.items():
            table[name] |= {"once": {"read": traffic.read, "written": traffic.written}}
    if case.trained:
        table["saved"] = found.saved
    return {f"{case.name} | {backend} | {name}": figures for name, figures in table.items()}


def backends(case: Case) -> list[str]:
    """Those on which a case is counted: all that its op has, but for CUDA, which runs nowhere without a GPU."""
    names = [backend.name for backend in OPS[case.name.split(",")[0]].backends]
    return [name for name in names if name not in ("cuda", case.without)]


def versions() -> dict[str, str]:
    """Whose ops the references are made of."""
    return {"torch": torch.__version__.split("+")[0]}


def beyond_once(case: Case) -> dict[str, tuple[int, int]]:
    """By pass: bytes that our op reads and writes on the CPU beyond its inputs and outputs, once each."""
    deep, once = (count(case, "cpu", deep=deep).passes for deep in (True, False))
    return {name: (deep[name].read - once[name].read, deep[name].written - once[name].written) for name in deep}


def declared_bytes(case: Case, formula: str) -> int:
    """The value of a formula of `Declared` in the sizes of the case's tensors."""
    sizes = {name: x.numel() * x.element_size() for name, x in case.inputs.items()}
    sizes |= {"number": 4, **case.sizes}
    value: int = eval(formula, {"__builtins__": {}}, sizes)
    return value


@contextlib.contextmanager
def _counting(deep: bool, on_call: OnCall | None) -> Iterator[Traffic]:
    with contextlib.ExitStack() as stack:
        traffic = Traffic()
        if deep:
            stack.enter_context(inside(traffic, on_call))
        yield stack.enter_context(traffic)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _noting(kept: list[Tensor]) -> Any:
    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    return note


def _saved(kept: list[Tensor], inputs: Any, outputs: list[Tensor]) -> dict[str, int]:
    """Bytes of the distinct storages of `kept`: a view keeps all of what it is a view of."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    given, made = ({x.untyped_storage().data_ptr() for x in tensors} for tensors in (inputs, outputs))
    found = {"inputs": 0, "outputs": 0, "own": 0}
    for address, size in storages.items():
        found["inputs" if address in given else "outputs" if address in made else "own"] += size
    return found
