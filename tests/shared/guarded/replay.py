"""Calls C++ kernels again, as they were recorded; a script of its own, for valgrind: it needs neither PyTorch nor site.

    python -I -S replay.py EXTENSION CALLS

EXTENSION is the compiled mmfast._C, CALLS what `guarded.instructions` pickles: (kernel, arguments), where a dict stands
for a tensor. Each call lies between getppid(), before which callgrind forgets what it counted, and getpid(), before
which it writes that down.
"""

import ctypes
import importlib.util
import mmap
import os
import pickle
import sys


def main(extension, calls):
    spec = importlib.util.spec_from_file_location("_C", extension)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(calls, "rb") as file:
        recorded = pickle.load(file)
    for name, arguments in recorded:
        memory = {}
        _fill(arguments, memory)
        kernel, arguments = getattr(module, name), [_live(value, memory) for value in arguments]
        os.getppid()
        kernel(*arguments)
        os.getpid()


def _fill(value, memory):
    """Memory for each tensor among the arguments; what lay at one address does so again."""
    if isinstance(value, dict):
        content = value["content"]
        old = memory.get(value["address"], b"")
        if len(old) < len(content) or not old:
            memory[value["address"]] = old = mmap.mmap(-1, max(len(content), 1))
        old[: len(content)] = content
    elif isinstance(value, (list, tuple)):
        for part in value:
            _fill(part, memory)


def _live(value, memory):
    """An argument as a kernel takes it."""
    if isinstance(value, list):
        return [_live(part, memory) for part in value]
    if not isinstance(value, dict):
        return value
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory[value["address"]]))
    return address, value["dtype"], value["shape"], value["strides"]


main(*sys.argv[1:])
