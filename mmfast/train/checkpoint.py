"""Checkpoints as folders of safetensors and JSON, written whole or not at all, and checked when read.

checkpoints/step-00000123/
    trained.safetensors     every tensor that any stage so far trained
    optimizer.safetensors   <moment>/<parameter name>
    rng.safetensors         <process>/<generator>
    state.json              position, counters, every file's size and SHA-256, and its own
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmfast.files import (
    explained_writing,
    file_sha256,
    replace_atomically,
    replace_folder,
    system_error,
    write_json,
)
from mmfast.train.sharding import shard_like

__all__ = [
    "Checkpoint",
    "load_optimizer_state",
    "optimizer_state",
    "read_newest_checkpoint",
    "write_checkpoint",
]

_FORMAT = 2
_NAME = re.compile(r"step-(\d{8,})")
_TENSOR_FILES = ("trained", "optimizer", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory, its tensors on the CPU."""

    path: Path
    """Its folder."""
    state: dict[str, Any]
    """What `write_checkpoint` was given as `state`."""
    trained: dict[str, Tensor]
    """Trained tensors by name."""
    optimizer: dict[str, Tensor]
    """The optimiser's moments, as `optimizer_state` names them."""
    rng: dict[str, Tensor]
    """Random states, by process and generator."""


def write_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    keep: int,
) -> Path:
    """Writes `folder/step-<step>`, then deletes the oldest ones beyond `keep`.

    Everything is written under a temporary name and brought to the disk before the rename, and older
    checkpoints go only afterwards: at every moment the newest complete one is there.

    Args:
        folder: The run's `checkpoints` folder; made if missing.
        step: Optimiser steps of the whole run so far; names the checkpoint and orders it.
        state: JSON-able values. A finite number stays exactly the same through JSON.
        tensors: `trained`, `optimizer` and `rng`.
        keep: How many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: If the disk is full or refuses it; nothing half-written stays, and the older checkpoints do.
    """

    def write(temporary: Path) -> None:
        files: dict[str, dict[str, Any]] = {}
        for name in _TENSOR_FILES:
            path = temporary / f"{name}.safetensors"
            # Copies: safetensors refuses tensors that share memory, and wants them dense.
            dense = {key: value.detach().cpu().clone().contiguous() for key, value in tensors[name].items()}
            replace_atomically(path, lambda place, dense=dense: save_file(dense, place))  # type: ignore[misc]
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        content = {"files": files, "state": dict(state)}
        write_json(temporary / "state.json", {"format": _FORMAT, "sha256": _json_sha256(content), **content})

    final = folder / f"step-{step:08d}"
    try:
        with explained_writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        replace_folder(final, write)
    except OSError as error:
        before = _checkpoints(folder)
        left = f"{before[-1]} is whole, and --resume goes on from there" if before else "there is no earlier one"
        raise system_error(error.errno, f"checkpoint: step {step} is not saved: {error}; {left}") from error
    for old in _checkpoints(folder)[:-keep]:
        # Half-deleted it must not look like a checkpoint.
        shutil.rmtree(old.rename(old.with_name(f".tmp-{old.name}")))
    return final


def read_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Reads the newest checkpoint that is whole.

    A damaged one is renamed to `damaged-<name>` and named in a warning, and the one before it is taken.

    Args:
        folder: The run's `checkpoints` folder; it may be missing.

    Returns:
        The checkpoint, or None if there is none at all.

    Raises:
        ValueError: If there are checkpoints, and every one is damaged; the message says how.
    """
    damages: list[str] = []
    for path in reversed(_checkpoints(folder)):
        try:
            checkpoint = _read(path)
        except (OSError, ValueError) as error:
            damages.append(f"{path}: {error}")
            continue
        for damage in damages:
            warnings.warn(f"checkpoint: damaged and left out: {damage}; going back to {path.name}", stacklevel=2)
        for newer in _checkpoints(folder):
            if newer.name > path.name:
                aside = newer.with_name(f"damaged-{newer.name}")
                shutil.rmtree(aside, ignore_errors=True)
                newer.rename(aside)
        return checkpoint
    if damages:
        raise ValueError(
            "checkpoint: no checkpoint is whole; one with every file named in its state.json is accepted; "
            f"start again with another --out, or restore one of: {'; '.join(damages)}"
        )
    return None


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The optimiser's state per parameter (moments, what they are quantised with) under `<key>/<parameter name>`.

    A step count that is no tensor becomes one of int64. What belongs to a sharded parameter are shares, see
    `gather_state`.
    """
    return {
        f"{key}/{names[cast(nn.Parameter, parameter)]}": torch.tensor(value) if isinstance(value, int) else value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], state: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_state` returned, in whole tensors; a sharded parameter gets its share.

    Raises:
        ValueError: If the state names a parameter that the optimiser does not have.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    for full_name, value in state.items():
        key, _, name = full_name.partition("/")
        if name not in parameters:
            raise ValueError(
                f"checkpoint: the optimiser's state names {name}, which does not train in this stage; "
                "the configuration that wrote the checkpoint is accepted"
            )
        parameter = parameters[name]
        # Only what was no tensor is an int64 one.
        found = value.item() if value.dtype == torch.int64 else shard_like(value, parameter)
        optimizer.state[parameter][key] = found


def _checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _read(path: Path) -> Checkpoint:
    """Raises OSError or ValueError, naming the file, if anything is missing or altered."""
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        format, content = document["format"], {name: document[name] for name in ("files", "state")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state.json is not readable ({type(error).__name__}: {error})") from error
    if format != _FORMAT:
        raise ValueError(f"state.json has format {format!r}; {_FORMAT} is accepted")
    if document.get("sha256") != _json_sha256(content):
        raise ValueError("state.json differs from what was written (its SHA-256 changed)")
    files, state = content["files"], content["state"]
    for name in (f"{kind}.safetensors" for kind in _TENSOR_FILES):
        try:
            size, sha256 = files[name]["bytes"], files[name]["sha256"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"state.json does not say what {name} holds") from error
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, but {size} were written")
        if file_sha256(path / name) != sha256:
            raise ValueError(f"{name} differs from what was written (its SHA-256 changed)")
    trained, optimizer, rng = (load_file(path / f"{name}.safetensors") for name in _TENSOR_FILES)
    return Checkpoint(path, state, trained, optimizer, rng)


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
