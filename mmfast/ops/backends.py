"""Which implementation of an op runs, why the others do not, and how ops enter PyTorch's dispatcher.

Every op has the backends below, in order of preference; an op lists those it has. Selection is a pure
function of the call (device, dtype, shape, stride), the machine and the request, so it is tested
without a GPU. A kernel that raises is an error and never a reason to fall back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad, function

from mmfast.ops import crossovers, extension

NAMES = ("cuda", "cpu", "triton", "reference")

LIBRARY = torch.library.Library("mmfast", "FRAGMENT")


class BackendUnavailable(NotImplementedError):
    """A backend was asked for by name and cannot run this call; the message says why."""


class Machine(NamedTuple):
    """What selection depends on besides the call. (A tuple, so that torch.compile takes it as a constant.)

    Attributes:
        device: device type of the call's tensors, e.g. "cpu", "cuda".
        capability: CUDA compute capability, e.g. (9, 0); None off the GPU.
        no_extension: why the compiled extension cannot serve C++ on the CPU; None if it can.
        no_cuda_extension: why it cannot serve CUDA kernels; None if it can.
        no_triton: why Triton cannot be used; None if it can.
        triton_interpreted: Triton kernels run in its interpreter (TRITON_INTERPRET=1), on the CPU.
        gpu: the GPU as tables of crossovers name it; None off the GPU, or where nothing is measured.
    """

    device: str
    capability: tuple[int, int] | None = None
    no_extension: str | None = None
    no_cuda_extension: str | None = None
    no_triton: str | None = None
    triton_interpreted: bool = False
    gpu: str | None = None

    def lacks(self, backend: str) -> str | None:
        """Why no op at all can run on `backend` here; None if some can."""
        if backend == "cpu":
            return self.no_extension if self.device == "cpu" else f"the tensors are on {self.device}"
        if backend == "cuda":
            return self.no_cuda_extension if self.device == "cuda" else f"the tensors are on {self.device}"
        if backend == "triton":
            if self.no_triton:
                return self.no_triton
            if self.device != "cuda" and not (self.device == "cpu" and self.triton_interpreted):
                return f"the tensors are on {self.device} and TRITON_INTERPRET is not set"
            if self.capability is not None and self.capability < (8, 0):
                return f"compute capability {self.capability[0]}.{self.capability[1]} is below 8.0"
        return None


_machines: dict[torch.device, Machine] = {}


def machine(device: torch.device) -> Machine:
    """The machine as seen from a call whose tensors live on `device`."""
    found = _machines.get(device)
    if found is None:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        found = _machines[device] = Machine(
            device=device.type,
            capability=capability,
            no_extension=extension.missing("cpu"),
            no_cuda_extension=extension.missing("cuda"),
            no_triton=_triton_missing(),
            triton_interpreted=_interpreting(),
            gpu=crossovers.device_name(device) if device.type == "cuda" else None,
        )
    return found


# The marker that torch.compiler.assume_constant_result sets; calling that would import all of Dynamo.
machine._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_missing() -> str | None:
    # Found, not imported: that takes half a second, and a call on the CPU needs only the answer.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install mmfast[triton]"
    return None


class Size(NamedTuple):
    """How large a call is, to be held against what `mmfast.ops.crossovers` knows of the op.

    Attributes:
        key: the kind of call, as tables name it.
        size: the call's; below that of the table the reference runs.
        what: the size in words, with {} for the number: "x has {} elements".
    """

    key: str
    size: int
    what: str


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of `NAMES`.
        cannot: given (call, machine), why this backend cannot run the call; None if it can.
        avoids: given (call, machine), why it should not although it can (slower than another, say);
            such a backend runs only when asked for by name.
    """

    name: str
    cannot: Callable[[Any, Machine], str | None] = lambda call, machine: None
    avoids: Callable[[Any, Machine], str | None] = lambda call, machine: None

    def refusal(self, call: Any, machine: Machine, by_name: bool) -> str | None:
        reason = machine.lacks(self.name) or self.cannot(call, machine)
        if reason is None and not by_name:
            if self.name == "triton" and machine.device == "cpu":
                return "the Triton interpreter is for tests; ask for it by name"
            reason = self.avoids(call, machine)
        return reason


class Op:
    """An op's name, its argument check and its backends in order of preference.

    `check(*args, **kwargs)` takes the public function's arguments without `backend`, raises on a bad
    one and returns the call: what `Backend.cannot` and `Backend.avoids` look at. `sizes` gives what of a call, on a
    machine, is held against the measured crossovers, which are those of `measured_as`, by default the op's own.
    """

    def __init__(
        self,
        name: str,
        check: Callable[..., Any],
        backends: tuple[Backend, ...],
        sizes: Callable[[Any, Machine], tuple[Size, ...]] = lambda call, machine: (),
        measured_as: str | None = None,
    ) -> None:
        self.name, self.check, self.backends, self.sizes = name, check, backends, sizes
        self.measured_as = measured_as or name
        OPS[name] = self

    def _refusal(self, candidate: Backend, call: Any, machine: Machine) -> str | None:
        """Why `candidate` does not run a call for which no backend was asked for."""
        reason = candidate.refusal(call, machine, by_name=False)
        if reason or candidate.name == "reference":
            return reason
        for key, size, what in self.sizes(call, machine):
            least = crossovers.least(machine.gpu, self.measured_as, candidate.name, key)
            if size < least:
                limit = "at every size" if least == crossovers.NEVER else f"below {least}"
                # In a traced graph the size is a symbol, which would become this number if it were written.
                shown = "few" if torch.compiler.is_compiling() else size
                return f"{what.format(shown)}; {limit} the reference is faster"
        return None

    def select(self, call: Any, machine: Machine, backend: str | None = None) -> str:
        """The name of the backend that runs `call`.

        Raises:
            BackendUnavailable: the backend asked for (argument, `use_backend`, MMFAST_BACKEND, in that
                order) cannot run the call.
            ValueError: no such backend.
        """
        request = backend or _requested
        for candidate in self.backends:
            if request is None:
                if self._refusal(candidate, call, machine) is None:
                    return candidate.name
            elif candidate.name == request:
                reason = candidate.refusal(call, machine, by_name=True)
                if reason is None:
                    return request
                raise BackendUnavailable(f"{self.name}: backend {request!r} cannot run this call: {reason}")
        have = ", ".join(candidate.name for candidate in self.backends)
        if request in NAMES:
            raise BackendUnavailable(f"{self.name}: has no {request!r} backend; it has {have}")
        raise ValueError(f"{self.name}: unknown backend {request!r}; use one of {', '.join(NAMES)}")

    def explain(self, call: Any, machine: Machine, backend: str | None = None) -> str:
        """One line for each backend: chosen, or why not."""
        chosen = self.select(call, machine, backend)
        lines = [f"{self.name} runs on: {chosen}"]
        for candidate in self.backends:
            if candidate.name != chosen:
                reason = self._refusal(candidate, call, machine) or f"{chosen} comes first"
                lines.append(f"  {candidate.name}: {reason}")
        return "\n".join(lines)


OPS: dict[str, Op] = {}


def known(backend: str | None) -> str | None:
    """Returns `backend` if it names one (or None), else raises ValueError."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend: got {backend!r}; use one of {', '.join(NAMES)}")
    return backend


# A plain global, not a context variable: torch.compile guards on it and traces through.
_requested = known(os.environ.get("MMFAST_BACKEND") or None)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within the context every op, in every thread, runs on `backend`; where it cannot: BackendUnavailable."""
    global _requested
    before, _requested = _requested, known(backend)
    try:
        yield
    finally:
        _requested = before


def explain(op: Callable[..., Any] | str, *args: Any, backend: str | None = None, **kwargs: Any) -> str:
    """Which backend `op(*args, **kwargs)` would run on, and why each other one would not.

    Args:
        op: a function of `mmfast.ops`, or its name.
        backend: as in the op itself.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in OPS:
        raise ValueError(f"explain: {name!r} is no op of mmfast; use one of {', '.join(sorted(OPS))}")
    entry = OPS[name]
    call = entry.check(*args, **kwargs)
    return entry.explain(call, machine(call.device), backend)


def plain(tensors: tuple[Tensor | None, ...], backend: str | None) -> bool:
    """Whether these are floating tensors on the CPU, no backend is asked for and autocast is off.

    An op may then take its reference for a small call at once: reading its own code from memory, for a check and a
    selection, costs more (30 to 70 us where a large weight has emptied the caches) than a small call can win back.
    """
    if backend or _requested or torch.is_autocast_enabled("cpu"):
        return False
    for tensor in tensors:
        if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_cpu and tensor.is_floating_point()):
            return False
    return True


# By names of their own: to look them up in a package, with caches cold, takes a part of a small call's time.
_is_compiling = torch.compiler.is_dynamo_compiling
_cpp_fits, _cpp_packed = extension.fits, extension.packed


def fits(backend: str | None, pattern: str, *tensors: Any) -> int:
    """What the first word of `pattern` counts, if a check of these tensors could find nothing; else -1.

    For an op that takes its reference at once where a call is small: no backend is asked for, nothing is traced, and
    C++ has seen that each is a floating `Tensor` or `Parameter` on the CPU, and what `pattern` says of it. In Python
    this would take a tenth of a small call: code that is not in the caches is slow to read, more than to run.

    Args:
        backend: the public function's argument.
        pattern: what is counted, then a word for each tensor. A word is a letter for each dimension, which stands for
            a size, the same wherever it is met and not 0; 1 is one; * in front is any other dimensions, the same in
            every word;
            ~ in front lets it be one number, [] or [1], as well. Behind it = demands the dtype of the first tensor, #
            int64 instead of a floating one, and a last ? lets it be None. A linear layer, whose output is counted:
            "*n *k nk= n=?".
    """
    if backend or _requested or _is_compiling():
        return -1
    return _cpp_fits()(pattern, *tensors)


def packed(backend: str | None, pattern: str, *tensors: Any) -> int:
    """What `fits` returns, if kernels in C++ take those tensors as they are, without views made in Python; else -1.

    Each is contiguous then, each * of a dtype that kernels have, and nobody is to hear of one (`extension.overheard`).
    """
    if backend or _requested or _is_compiling():
        return -1
    return _cpp_packed()(pattern, *tensors)


def lies_packed(*tensors: Tensor) -> bool:
    """Whether `packed` would take these if C++ could read them: tensors without memory, as a plan has, pick alike."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return forward_ad._current_level < 0 and all(tensor.is_contiguous() for tensor in tensors)


def straight(differentiable: type[Function]) -> Callable[..., Any]:
    """`apply` of a function, for tensors that are `packed`: without asking for torch.func once more, in Python."""
    apply: Callable[..., Any] = super(Function, differentiable).apply  # type: ignore[misc]
    return apply


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of this name, which alone takes 5 to 8 us, where a graph of the gradients is asked for."""
    refusing = function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def checked_late(reference: Callable[..., Any], check: Callable[..., Any], *arguments: Any) -> Any:
    """`reference(*arguments)`; where PyTorch's ops refuse them, `check` says what is wrong in the op's own words."""
    try:
        return reference(*arguments)
    except RuntimeError:
        check(*arguments)
        raise


def define(name: str, schema: str, fake: Callable[..., Any], kernels: Mapping[str, Callable[..., Any]]) -> Any:
    """Registers `mmfast::<name>`, whose implementation is picked by its last argument, `str backend`.

    Args:
        name: e.g. "spatio_temporal_pool_fwd".
        schema: arguments without `backend`, and the result: "(Tensor x, int n) -> Tensor".
        fake: same arguments, `backend` included; gives outputs of the right shape, dtype and device.
        kernels: backend name to implementation, which takes the arguments without `backend`.

    Returns:
        The op, to be called with `backend` last; its first argument is a tensor or a list of some. Where nothing
        listens to the dispatcher (compilation, a dispatch mode, functorch, a tensor without memory or of another
        class), it calls the implementation straight: on a CPU that saves 17 to 38 us of the host's time.
    """
    arguments, result = schema.rsplit("->", 1)
    arguments = arguments.rstrip().removesuffix(")")
    LIBRARY.define(f"{name}{arguments}, str backend) -> {result.strip()}")

    def run(*args: Any) -> Any:
        return kernels[args[-1]](*args[:-1])

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"mmfast::{name}", fake, lib=LIBRARY)
    dispatched = getattr(torch.ops.mmfast, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _overheard(args[0]):
            return dispatched(*args)
        return kernels[args[-1]](*args[:-1])

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def _overheard(argument: Tensor | Sequence[Tensor]) -> bool:
    """Whether a call must go through PyTorch's dispatcher, because somebody listens there."""
    tensor = argument if isinstance(argument, Tensor) else argument[0]
    return extension.overheard()() or type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda)
