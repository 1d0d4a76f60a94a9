"""Quantise a checkpoint from file to file without ever holding the dense model, and open the result."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from mmfast.adapt.quantize import HEAD, QuantizeReport, select_linears
from mmfast.files import fsync_folder, replace_atomically, write_json
from mmfast.nn import QuantizedLinear
from mmfast.nn.quantized_state import NF4_STATE, Format, from_state, state_names, to_state
from mmfast.ops.int8 import Int8Weight, int8_quantize
from mmfast.ops.nf4 import BLOCK, NF4Weight, nf4_quantize, quantize_absmax

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_quantized", "quantize_checkpoint", "quantize_command"]

# Elements of a weight that are read and quantised at a time.
SLICE_ELEMENTS = 2**22
# Files that hold weights, in whatever format; everything else in the folder is copied.
_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# The entry of a quantised weight that tells its format.
_FORMAT_OF: dict[str, Format] = {NF4_STATE: "nf4", "SCB": "int8"}
_STATE_SUFFIXES = {name for kind in (("nf4", True), ("int8", False)) for name in state_names(*kind)} - {"weight"}


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    format: Format = "nf4",
    double_quant: bool = True,
    targets: Sequence[str] | None = None,
    skip: Sequence[str] = HEAD,
    max_shard_bytes: int = 2**30,
) -> QuantizeReport:
    """Writes a quantised copy of a model's folder; the same layers as `mmfast.adapt.quantize`, to the same bits.

    The weights are read slice by slice, so that memory holds one output file's tensors and one slice. What is written
    opens with `load_quantized`, and with transformers where bitsandbytes is installed. It is written beside the target
    and renamed when it is whole: after an error or Ctrl-C nothing is left.

    Args:
        source: Folder of a transformers model with safetensors files.
        target: Folder to write; it must not exist.
        format: "nf4" or "int8".
        double_quant: Of NF4: whether the scales of blocks are stored in 8 bits.
        targets: Last components of the layers' names; by default every linear layer of the language model.
        skip: Last components of the names of layers to leave out.
        max_shard_bytes: Largest file to write, unless a single tensor is larger.

    Raises:
        FileNotFoundError: If the source or its weights do not exist.
        FileExistsError: If the target exists.
        ValueError: If the source is quantised already, lacks a weight, or has one that cannot be quantised.
        OSError: If a file cannot be read or written.
    """
    checkpoint, out = _Checkpoint("quantize", source), Path(target).expanduser()
    if already := checkpoint.config.get("quantization_config"):
        method = already.get("quant_method")
        raise ValueError(f"quantize: {checkpoint.folder} is quantised already ({method}); a dense model is accepted")
    if out.exists():
        raise FileExistsError(f"quantize: {out} exists; choose a folder that does not")
    model = _empty_model(checkpoint, None)
    names = _model_names("quantize", model, checkpoint)
    chosen = select_linears("quantize", model, targets, skip)
    elements = sum(layer.weight.numel() for layer in chosen.values())
    lacking = sorted({f"{name}.weight" for name in chosen} - set(names.values()))
    if lacking:
        raise ValueError(f"quantize: {checkpoint.folder} lacks the weights {lacking[:8]}; was the download complete?")
    before = after = 0
    with _whole_folder(out) as folder, _progress(elements) as bar:
        shards = _Shards(folder, max_shard_bytes)
        for key, model_key in names.items():
            with checkpoint.open(key) as file:
                name = model_key.removesuffix(".weight")
                if name not in chosen or name == model_key:
                    shards.add({key: file.get_tensor(key)})
                    continue
                weight, dense_bytes = _quantize_slices(name, file.get_slice(key), format, double_quant, bar)
            prefix = key.removesuffix("weight")
            shards.add({prefix + entry: tensor for entry, tensor in to_state(weight).items()})
            before += dense_bytes
            after += sum(part.nbytes for part in weight.tensors())
        shards.finish()
        described = _describe(checkpoint, model, set(chosen), format, double_quant)
        write_json(folder / "config.json", checkpoint.config | {"quantization_config": described})
        for path in sorted(checkpoint.folder.iterdir()):
            if path.is_file() and path.name != "config.json" and not _WEIGHT_FILES.fullmatch(path.name):
                shutil.copy2(path, folder / path.name)
    return QuantizeReport(list(chosen), before, after)


def quantize_command(
    source: str, target: str, format: Literal["nf4", "int8"] = "nf4", no_double_quant: bool = False
) -> None:
    """Writes a quantised copy of a model's folder, without ever holding the dense model.

    Args:
        source: Folder of a transformers model with safetensors files.
        target: Folder to write; it must not exist. It opens with mmfast, and with transformers and bitsandbytes.
        format: nf4 (4 bits) or int8 (8 bits).
        no_double_quant: NF4 with its scales in 32 bits instead of 8: 4.5 bits a weight instead of 4.13.
    """
    report = quantize_checkpoint(source, target, format, not no_double_quant)
    print(f"{report}\nwritten to {target}")


def load_quantized(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    format: Format | None = None,
) -> PreTrainedModel:
    """Opens what `quantize_checkpoint`, or transformers with bitsandbytes, wrote; never holding a dense weight.

    With `format` a dense folder is opened too: its weights are quantised slice by slice while they are read, the same
    layers to the same bits as `quantize_checkpoint` would write.

    Args:
        folder: The folder.
        dtype: Of everything that is not quantised, and so of the computation; by default that of the configuration.
        device: Where to put the model.
        format: "nf4" or "int8": what the weights are to be in memory. None: what they are in the folder.

    Returns:
        The model, in evaluation mode, with every parameter frozen.

    Raises:
        FileNotFoundError: If the folder or its weights do not exist.
        ValueError: If the folder is not quantised and `format` is None, it is quantised to another format, a tensor is
            missing or does not fit, or a weight cannot be quantised.
    """
    checkpoint = _Checkpoint("load_quantized", folder)
    model = _empty_model(checkpoint, dtype)
    names = _model_names("load_quantized", model, checkpoint)
    quantised: dict[str, dict[str, str]] = {}
    for name, entry in map(_split, names.values()):
        if entry in _FORMAT_OF:
            quantised[name] = {}
            _check_format(checkpoint, name, _FORMAT_OF[entry], format)
    if not quantised and format is None:
        raise ValueError(
            f"load_quantized: {checkpoint.folder} holds no weight in NF4 or int8 under bitsandbytes' names; what "
            "quantize_checkpoint writes is accepted; open others with transformers, or say which format they shall have"
        )
    dense: dict[str, str] = {}
    for key, model_key in names.items():
        name, entry = _split(model_key)
        if name in quantised and entry != "bias":
            quantised[name][entry] = key
        else:
            dense[model_key] = key
    with torch.no_grad():
        for name, entries in quantised.items():
            state = {entry: checkpoint.read(key, device) for entry, key in entries.items()}
            _fill_quantised(model, name, state, checkpoint)
        if format is not None and not quantised:
            _fill_quantising(model, dense, checkpoint, device, format)
        unused = [key for model_key, key in dense.items() if not _fill_dense(model, model_key, key, checkpoint, device)]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [key for key in unused if not any(re.search(pattern, key) for pattern in ignored)]
    if unused:
        warnings.warn(f"load_quantized: {type(model).__name__} has no use for {unused[:8]}", stacklevel=2)
    missing = {name for name, tensor in _tensors(model).items() if tensor.is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    missing = {name for name, tensor in _tensors(model).items() if tensor.is_meta}
    if missing:
        raise ValueError(
            f"load_quantized: {checkpoint.folder} lacks {sorted(missing)[:8]}, which {type(model).__name__} needs; "
            "was the download complete?"
        )
    if (checkpoint.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.to(device).requires_grad_(False).eval()  # type: ignore[arg-type, return-value]


class _Checkpoint:
    """A folder of safetensors files, of which one tensor at a time is mapped into memory."""

    def __init__(self, where: str, folder: str | Path) -> None:
        self.where, self.folder = where, Path(folder).expanduser()
        index = self.folder / _INDEX
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{where}: {self.folder} has no config.json; a local folder of a transformers model is accepted"
            )
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.files: dict[str, Path] = {}
        if index.is_file():
            self.files = {key: self.folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        elif (self.folder / _SINGLE).is_file():
            with self._open(self.folder / _SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), self.folder / _SINGLE)
        absent = [path.name for path in set(self.files.values()) if not path.is_file()]
        if absent or not self.files:
            raise FileNotFoundError(
                f"{where}: {self.folder} has no {' and no '.join(sorted(absent) or (_SINGLE, _INDEX))}; safetensors "
                "files are accepted; convert other formats with transformers' save_pretrained"
            )

    @contextmanager
    def open(self, key: str, device: torch.device | str = "cpu") -> Iterator[Any]:
        """The file with the tensor `key`. Opened anew each time: until then, what was read counts as memory."""
        with self._open(self.files[key], device) as file:
            yield file

    @contextmanager
    def _open(self, path: Path, device: torch.device | str = "cpu") -> Iterator[Any]:
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                yield file
        except SafetensorError as error:
            raise OSError(f"{self.where}: {path} cannot be read ({error}); was the download complete?") from error

    def read(self, key: str, device: torch.device | str) -> Tensor:
        """The tensor `key` in memory of its own: a later change of the file changes nothing."""
        with self.open(key, device) as file:
            tensor = file.get_tensor(key)
            return tensor.clone() if tensor.device.type == "cpu" else tensor


class _Shards:
    """Output files of a bounded size, numbered when their number is known."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.written: list[list[str]] = []
        self.total_bytes = self.pending_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.pending and self.pending_bytes + size > self.max_bytes:
            self._write()
        self.pending.update(tensors)
        self.pending_bytes += size

    def finish(self) -> None:
        """Writes what is pending and the index, or a single file without one."""
        self._write()
        if len(self.written) == 1:
            self._part(0).rename(self.folder / _SINGLE)
            return
        weight_map = {}
        for number, keys in enumerate(self.written):
            name = f"model-{number + 1:05d}-of-{len(self.written):05d}.safetensors"
            self._part(number).rename(self.folder / name)
            weight_map.update(dict.fromkeys(keys, name))
        metadata = {"total_size": self.total_bytes}
        write_json(self.folder / _INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def _write(self) -> None:
        pending = self.pending
        try:
            replace_atomically(
                self._part(len(self.written)), lambda path: save_file(pending, path, metadata={"format": "pt"})
            )
        except SafetensorError as error:
            raise OSError(f"quantize: a file in {self.folder.parent} cannot be written: {error}") from error
        self.written.append(list(self.pending))
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` at the end, or vanishes if anything is raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system.
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_folder(target.parent)


def _quantize_slices(
    name: str, weight: Any, format: Format, double_quant: bool, bar: Any
) -> tuple[NF4Weight | Int8Weight, int]:
    """Quantises a weight [N, K] of a file, some rows at a time: (weight, bytes of the dense one)."""
    rows, columns = weight.get_shape()
    step = max(1, SLICE_ELEMENTS // columns)
    # Whole blocks, except at the end.
    step = -(-step // BLOCK) * BLOCK
    quantise: Callable[[Tensor], Any] = int8_quantize
    if format == "nf4":

        def quantise(part: Tensor) -> Any:
            return nf4_quantize(part, double_quant=False)

    parts, dense_bytes = [], 0
    for first in range(0, rows, step):
        dense = weight[first : first + step]
        try:
            parts.append(quantise(dense))
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize: the weight of {name} cannot be quantised: {error}") from error
        dense_bytes += dense.nbytes
        bar.update(dense.numel())
    first_part, second = (torch.cat([part[index] for part in parts]) for index in (0, 1))
    dtype = parts[0].dtype
    if format == "int8":
        return Int8Weight(first_part, second, dtype), dense_bytes
    if not double_quant:
        return NF4Weight(first_part, second, dtype), dense_bytes
    codes, *nested = quantize_absmax(second)
    return NF4Weight(first_part, codes, dtype, *nested), dense_bytes


def _empty_model(checkpoint: _Checkpoint, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of the folder, its parameters on the meta device and its buffers with their values."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder)
    if dtype is None:
        dtype = config.dtype or _stored_dtype(checkpoint)
    kind: Any = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
    build = kind.from_config if kind is AutoModelForCausalLM else kind._from_config
    with init_empty_weights(include_buffers=False):
        return build(config, dtype=dtype)


def _stored_dtype(checkpoint: _Checkpoint) -> torch.dtype:
    """The dtype of the first floating tensor that is no part of a quantised weight."""
    for key in checkpoint.files:
        if _split(key)[1] not in _STATE_SUFFIXES:
            with checkpoint.open(key) as file:
                dtype = file.get_tensor(key).dtype
            if dtype.is_floating_point:
                return dtype
    return torch.get_default_dtype()


def _model_names(where: str, model: PreTrainedModel, checkpoint: _Checkpoint) -> dict[str, str]:
    """For each tensor of the files, the name that the model has for it, whether the model has such a one or not."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    expected, names = model.state_dict(), {}
    for key in checkpoint.files:
        name, entry = _split(key)
        suffix = entry if entry in _STATE_SUFFIXES else None
        # Parts of a quantised weight are called what the weight is called.
        plain = f"{name}.weight" if suffix else key
        renamed, converter = rename_source_key(plain, renamings, converters, model.base_model_prefix, expected)
        if converter is not None:
            raise ValueError(
                f"{where}: {checkpoint.folder} stores {key} in pieces that {type(model).__name__} joins ({converter}); "
                "models whose files hold each of their tensors as it is are accepted; save it in that form first"
            )
        names[key] = f"{renamed.removesuffix('.weight')}.{suffix}" if suffix else renamed
    return names


def _split(key: str) -> tuple[str, str]:
    """(module, entry) of a key: the entry is what a quantised linear calls it, or the last component."""
    for suffix in _STATE_SUFFIXES:
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), suffix
    name, _, entry = key.rpartition(".")
    return name, entry


def _describe(
    checkpoint: _Checkpoint, model: PreTrainedModel, chosen: set[str], format: Format, double_quant: bool
) -> dict[str, Any]:
    """The `quantization_config` with which transformers opens the folder through bitsandbytes."""
    compute = str(model.dtype).removeprefix("torch.")
    options: dict[str, Any] = {"load_in_4bit": False, "load_in_8bit": True}
    if format == "nf4":
        options = {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
        }
    return {"quant_method": "bitsandbytes", **options, "llm_int8_skip_modules": _dense_parts(model, chosen)}


def _dense_parts(model: nn.Module, chosen: set[str]) -> list[str]:
    """The largest parts of the model that hold linear layers, of which none is quantised."""
    parts: list[str] = []
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, _ in model.named_modules():
        inside = {linear for linear in linears if f"{linear}.".startswith(f"{name}.")}
        if name and inside and not inside & chosen and not any(name.startswith(f"{part}.") for part in parts):
            parts.append(name)
    return parts


def _progress(elements: int) -> Any:
    # Without a terminal there is no bar.
    return tqdm(total=elements, desc="quantising", unit=" weights", unit_scale=True, disable=None)


def _check_format(checkpoint: _Checkpoint, name: str, found: Format, wanted: Format | None) -> None:
    if wanted not in (None, found):
        raise ValueError(
            f"load_quantized: the weight of {name} in {checkpoint.folder} is quantised to {found}, but format is "
            f"{wanted!r}; {found!r} or None is accepted; to have another format, open the dense model's folder"
        )


def _fill_quantised(model: nn.Module, name: str, state: dict[str, Tensor], checkpoint: _Checkpoint) -> None:
    """Puts a layer with the quantised weight of these entries in the place of a linear one."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        linear = parent.get_submodule(child)
    except AttributeError:
        linear = None
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"load_quantized: {checkpoint.folder} holds a quantised {name}, which in {type(model).__name__} is "
            f"{'missing' if linear is None else type(linear).__name__}; linear layers are accepted"
        )
    shape = linear.out_features, linear.in_features
    layer = QuantizedLinear(shape[1], shape[0], bias=False, format="int8", device="meta")
    try:
        layer.hold(from_state(state, shape, linear.weight.dtype))
    except ValueError as error:
        raise ValueError(f"load_quantized: the weight of {name} in {checkpoint.folder}: {error}") from error
    layer.bias = linear.bias
    parent._modules[child] = layer


def _fill_quantising(
    model: PreTrainedModel, keys: dict[str, str], checkpoint: _Checkpoint, device: torch.device | str, format: Format
) -> None:
    """Takes the weights that `quantize` would quantise out of `keys`, and quantises each while it is read."""
    chosen = select_linears("load_quantized", model, None)
    with _progress(sum(layer.weight.numel() for layer in chosen.values())) as bar:
        # One that is in no file stays on the meta device, and is found missing.
        for name in [name for name in chosen if f"{name}.weight" in keys]:
            key = keys.pop(f"{name}.weight")
            with checkpoint.open(key, device) as file:
                weight, _ = _quantize_slices(name, file.get_slice(key), format, True, bar)
            _fill_quantised(model, name, to_state(weight), checkpoint)


def _fill_dense(model: nn.Module, name: str, key: str, checkpoint: _Checkpoint, device: torch.device | str) -> bool:
    """Puts a tensor of the files in its place in the model; False if it has none."""
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        return False
    place: Any = parent._parameters if parent._parameters.get(child) is not None else parent._buffers
    if place.get(child) is None:
        return False
    expected, tensor = place[child], checkpoint.read(key, device)
    if tensor.shape != expected.shape:
        raise ValueError(
            f"load_quantized: {key} in {checkpoint.folder} is {list(tensor.shape)}; {type(model).__name__} expects "
            f"{list(expected.shape)}"
        )
    tensor = tensor.to(expected.dtype) if tensor.is_floating_point() else tensor
    place[child] = nn.Parameter(tensor, requires_grad=False) if place is parent._parameters else tensor
    return True


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
