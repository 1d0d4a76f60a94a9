"""Features of frozen encoders on the disk: a cache of safetensors of our own, and Video-ChatGPT's pickled files."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmfast.files import replace_atomically

# What the pickle of a numpy array names; the modules have had other names in other releases of numpy.
_ARRAY_PARTS = {
    "_reconstruct": np.empty(1).__reduce_ex__(4)[0],
    "_frombuffer": np.empty(1).__reduce_ex__(5)[0],
    "ndarray": np.ndarray,
    "dtype": np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and nothing else, so that nothing in a file is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy" or name not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no part of a numpy array")
        return _ARRAY_PARTS[name]


def read_pickled_features(path: Path, rows: int) -> Tensor:
    """Reads a `{video_id}.pkl` of Video-ChatGPT: one float16 or float32 numpy array [rows, D].

    Args:
        path: the file.
        rows: rows that it must have.

    Returns:
        float32 [rows, D].

    Raises:
        ValueError: the file holds anything else; nothing in it is executed. Or a value is not finite.

    Source: Video-ChatGPT `scripts/save_spatio_temporal_clip_features.py`.
    """
    try:
        with path.open("rb") as file:
            array = _ArrayUnpickler(file).load()
    except Exception as error:  # on bytes that are no pickle, the unpickler raises nearly anything
        raise ValueError(
            f"'{path}' is not the pickle of a numpy array ({type(error).__name__}: {error}); such a file is accepted; "
            "other content could run code and is never loaded"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32) or array.ndim != 2:
        held = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"'{path}' holds {held}; a float16 or float32 array [{rows}, D] is accepted")
    if len(array) != rows:
        raise ValueError(
            f"'{path}' holds features {list(array.shape)}; {rows} rows are accepted, those of this encoder's patches "
            "and of the number of frames that is set"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"'{path}' holds values that are not finite; make the features again")
    return torch.from_numpy(array.astype(np.float32))


class Features(NamedTuple):
    """A medium as what the frozen parts of a model have made of it, in place of its pixels."""

    values: Tensor
    """[rows, P, D]: one row for an image, a video, or each view of an image in high resolution."""
    size: tuple[int, int] | None = None
    """Height and width of the image in pixels, in high resolution."""


class FeatureCache:
    """Tensors by key, each a safetensors file that is written whole or not at all and checked when it is read.

    Args:
        folder: made when the first tensor is written. Runs and processes may share it.
        revision: what the tensors come from (weights, preprocessing); part of every key.
    """

    def __init__(self, folder: str | Path, revision: str) -> None:
        self.folder = Path(folder).expanduser()
        self.revision = revision

    def path(self, key: str) -> Path:
        """The file of `key`."""
        name = hashlib.sha256(f"{self.revision}\n{key}".encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def holds(self, key: str) -> bool:
        """Whether there is a file of `key` of the length that its header tells; a cut one is removed, as in `get`."""
        return self._open(key, read=False) is not None

    def get(self, key: str) -> Tensor | None:
        """The tensor of `key`; None if there is none. One that is damaged is warned of, removed, and None too."""
        found = self._open(key, read=True)
        if found is None or found[1] == _sha256(found[0]):
            return None if found is None else found[0]
        self._discard(key, "its checksum does not fit")
        return None

    def put(self, key: str, tensor: Tensor) -> None:
        """Writes the tensor of `key`.

        Raises:
            OSError: it cannot be written, as on a full disk.
        """
        path = self.path(key)
        tensor = tensor.detach().cpu().contiguous()
        metadata = {"format": "pt", "sha256": _sha256(tensor)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_atomically(path, lambda new: save_file({"features": tensor}, new, metadata=metadata), shared=True)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"feature cache: {path} cannot be written ({error}); a folder on a disk with room for the features of "
                "all media is accepted; what is there stays valid; make room and start again, choose another folder, "
                "or set feature_cache to null"
            ) from error

    def _open(self, key: str, read: bool) -> tuple[Tensor, str | None] | None:
        """The tensor of `key`, empty if it is not to be read, and its checksum."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                tensor = file.get_tensor("features") if read else file.get_slice("features")[:0]
                return tensor, (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            self._discard(key, str(error))
            return None

    def _discard(self, key: str, reason: str) -> None:
        path = self.path(key)
        warnings.warn(f"feature cache: {path} is damaged ({reason}); it is removed and made again", stacklevel=4)
        path.unlink(missing_ok=True)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
