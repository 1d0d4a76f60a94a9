"""`mmfast env`: what is installed here, which backends can run, and why the others cannot."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Any

import torch

from mmfast import __version__
from mmfast.ops import backends, crossovers, extension

PACKAGES = (
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "accelerate",
    "pillow",
    "jsonargparse",
    "triton",
    "peft",
)


def show(as_json: bool = False) -> None:
    """Prints versions, devices and, for each op, the backends that can run here and why the others cannot.

    Args:
        as_json: print JSON instead of text, e.g. for a bug report.
    """
    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found["versions"].items():
        print(f"{name:<14}{value}")
    print(f"\n{'extension':<14}{found['extension']}")
    for device, names in found["devices"].items():
        print(f"{device:<14}{names}")
    for device, source in found["crossovers"].items():
        print(f"crossovers on {device}: {source}")
    for device, entries in found["ops"].items():
        print(f"\nops on {device}:")
        for name, choices in entries.items():
            usable = [backend for backend, reason in choices.items() if reason is None]
            print(f"  {name}: {', '.join(usable)}")
            for backend, reason in choices.items():
                if reason is not None:
                    print(f"    no {backend}: {reason}")


def describe() -> dict[str, Any]:
    """What `show` prints, as a dictionary that JSON can hold."""
    versions = {"mmfast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = properties.total_memory / 1e9
        devices[f"cuda:{index}"] = f"{properties.name}, sm_{properties.major}{properties.minor}, {gigabytes:.0f} GB"
    return {
        "versions": versions,
        "extension": _extension(),
        "devices": devices,
        "crossovers": {device: _crossovers(torch.device(device)) for device in devices},
        "ops": {device: _backends(backends.machine(torch.device(device))) for device in devices},
    }


def _extension() -> str:
    missing = extension.missing("cpu")
    if missing:
        return missing
    architectures = extension.module().cuda_architectures
    return f"C++ kernels; CUDA kernels for {architectures}" if architectures else "C++ kernels; no CUDA kernels"


def _crossovers(device: torch.device) -> str:
    """Where the table comes from that says from which size kernels run."""
    return crossovers.in_force(crossovers.device_name(device)).source


def _backends(machine: backends.Machine) -> dict[str, dict[str, str | None]]:
    return {
        name: {backend.name: machine.lacks(backend.name) for backend in op.backends}
        for name, op in sorted(backends.OPS.items())
    }
