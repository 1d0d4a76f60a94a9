"""From which size a backend is faster than the reference: measured, kept in tables, one of which is in force.

A table is a JSON file: `{"device": ..., "environment": {...}, "ops": {op: {backend: {key: size}}}}`. A key is a kind
of call that the op tells apart, "backward" for one that will ask for gradients, say; the size is what the op counts of
such a call, elements as a rule, and null means never. `mmfast bench crossover` measures a table;
`crossover_tables/cpu.json` knows every key and fills what another table leaves open.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A size that no call has.
NEVER = sys.maxsize

BACKENDS = ("cpu", "triton", "cuda")
SHIPPED = Path(__file__).parent / "crossover_tables"
VARIABLE = "MMFAST_CROSSOVERS"

Ops = dict[str, dict[str, dict[str, int]]]


class Table(NamedTuple):
    """A table, and where it comes from.

    Attributes:
        device: what it was measured on, as `device_name` writes it.
        ops: op, backend and key to the least size at which the backend is to run.
        source: where it comes from, and what was passed over, for people.
    """

    device: str
    ops: Ops
    source: str

    def cpu(self, op: str) -> dict[str, int]:
        """The sizes from which an op's C++ kernels run: the very dictionary that selection looks into."""
        return self.ops[op]["cpu"]


def read(path: Path, known: Ops | None = None) -> Table:
    """The table in a file.

    Args:
        path: The file.
        known: A table that has every key; others are refused. None: any key is taken.

    Raises:
        ValueError: The file is not a table; the message names it and the key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad(path, f"it cannot be read as JSON ({error})", "a table") from error
    if not isinstance(found, dict) or not isinstance(found.get("device"), str):
        raise _bad(path, "it names no device", 'an object with "device" and "ops"')
    ops: Ops = {}
    for op, backends in _entries(path, "ops", found.get("ops"), known):
        ops[op] = {}
        for backend, sizes in _entries(path, f"ops.{op}", backends, dict.fromkeys(BACKENDS)):
            keys = None if known is None else known[op]["cpu"]
            where = f"ops.{op}.{backend}"
            ops[op][backend] = {
                key: _size(path, f"{where}.{key}", size) for key, size in _entries(path, where, sizes, keys)
            }
    return Table(found["device"], ops, str(path))


def _entries(path: Path, where: str, value: Any, known: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise _bad(path, f"{where} is {value!r}", "an object")
    for name in value:
        if known is not None and name not in known:
            raise _bad(path, f"{where} has {name!r}", f"any of {', '.join(map(repr, known))}")
    return list(value.items())


def _size(path: Path, where: str, value: Any) -> int:
    if value is None:
        return NEVER
    if type(value) is not int or value < 0:
        raise _bad(path, f"{where} is {value!r}", "a whole number from 0, or null for never")
    return value


def _bad(path: Path, what: str, accepted: str) -> ValueError:
    advice = "mend it, or measure one with `mmfast bench crossover`"
    return ValueError(f"crossovers: {path}: {what}; expected {accepted}; {advice}")


def find(device: str, environ: Mapping[str, str] = os.environ, shipped: Path = SHIPPED) -> Table:
    """The table in force for a device, filled up from the shipped one for any CPU, which has no size for a GPU.

    In this order: the file that MMFAST_CROSSOVERS names, whatever it was measured on; the user's own and the shipped
    one, if they were measured on this very device; the shipped one for any CPU.

    Args:
        device: see `device_name`.
        environ: environment variables.
        shipped: the folder of the shipped tables.

    Raises:
        ValueError: the file that MMFAST_CROSSOVERS names is not a table. (The user's own is passed over with a
            warning if it is none: a newer version may have other keys.)
    """
    base = read(shipped / "cpu.json")
    if named := environ.get(VARIABLE):
        return _filled(read(Path(named), base.ops), base, f"{named} ({VARIABLE})")
    passed_over = ""
    own = user_file(device, environ)
    if os.path.isfile(own):  # False, and no error, in a folder that may not be read
        try:
            table = read(own, base.ops)
        except ValueError as error:
            passed_over = f"; passed over: {error}"
            warnings.warn(str(error), stacklevel=2)
        else:
            if table.device == device:
                return _filled(table, base, f"{own}, measured on this device")
            passed_over = f"; passed over: {own}, measured on {table.device}, while this is {device}"
    ours = shipped / own.name
    if ours.is_file():
        return _filled(read(ours, base.ops), base, f"shipped for {device}{passed_over}")
    what = "shipped for any CPU" if device.startswith(base.device) else "none: kernels run at every size"
    return base._replace(source=what + passed_over)


def _filled(table: Table, base: Table, source: str) -> Table:
    ops: Ops = {op: {backend: dict(sizes) for backend, sizes in entry.items()} for op, entry in base.ops.items()}
    for op, entry in table.ops.items():
        for backend, sizes in entry.items():
            ops[op].setdefault(backend, {}).update(sizes)
    return Table(table.device, ops, source)


def user_file(device: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where `mmfast bench crossover` writes the user's own table for a device."""
    cache_folder = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_folder, "mmfast", "crossovers", re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def device_name(device: torch.device) -> str:
    """A device as tables name it: "CPU, <model>, <instruction set>", or "<GPU>, sm_<capability>"."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}"
    return f"CPU, {_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


@cache
def in_force(device: str) -> Table:
    """`find` for a device of this machine, once and for all."""
    return find(device)


# Read at import: constants to ops, and to torch.compile.
CPU = in_force(device_name(torch.device("cpu")))


def least(gpu: str | None, op: str, backend: str, key: str) -> int:
    """The size from which a backend runs calls of this kind: 0 where nothing is measured.

    Args:
        gpu: see `device_name`; None for the CPU.
    """
    table = CPU if gpu is None else in_force(gpu)
    return table.ops[op].get(backend, {}).get(key, 0)


# The marker that torch.compiler.assume_constant_result sets; calling that would import all of Dynamo.
least._dynamo_marked_constant = True  # type: ignore[attr-defined]
