"""LLaMA-Adapter in the layouts of the original repository: version 1's adapter, and version 2's multimodal 7B.

Names and shapes: https://github.com/OpenGVLab/LLaMA-Adapter, extract_adapter_from_checkpoint.py of
alpaca_finetuning_v1 and of llama_adapter_v2_multimodal7b/util (GPL-3.0; nothing is copied).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmfast.adapt.bias_scale_checkpoint import from_interleaved, to_interleaved
from mmfast.files import load_pickled, replace_atomically
from mmfast.models.trained import some_of

__all__ = [
    "FILE",
    "Layout",
    "layout_of",
    "lora_rank_of",
    "read_checkpoint",
    "read_original",
    "version_of",
    "visual_sizes",
    "write_original",
]

FILE = "adapter.pth"
TABLE = "adapter_query.weight"

_CONNECTOR = {
    "visual_query.weight": "query",
    "clip_proj": "input_proj",
    "clip_proj_norm": "input_norm",
    "visual_proj": "output_proj",
    "visual_proj_norm": "output_norm",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
_BIASES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_LORA = {"attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj", **_BIASES}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


class Layout(NamedTuple):
    """Which tensors a file has, for a language model of a size.

    Attributes:
        names: Name here to name in the file. All prompts are rows of one table; the gates of layers without prompts
            have no name here.
        prompts: Names here of the prompts, in the table's order.
        idle: Gates in the file that nothing reads, of layers without prompts, and the values that they start with.
        rotated: Name here of what makes queries or keys, which a rotary embedding follows, to the heads it is of.
        heads: Heads of the language model.
        wrapped: Whether the file holds its tensors under "model", beside "config".
    """

    names: dict[str, str]
    prompts: list[str]
    idle: dict[str, Tensor]
    rotated: dict[str, int]
    heads: int
    wrapped: bool


def layout_of(config: Any, lora: bool = False) -> Layout:
    """The layout of the version that a `LlamaAdapterConfig` has.

    Args:
        config: The configuration.
        lora: Whether LoRA is beside the biases, as in LORA-BIAS-7B.

    Raises:
        ValueError: If that version was never published.
    """
    if config.version not in ("v1", "v2_multimodal_7b") or (lora and config.version == "v1"):
        raise ValueError(
            f"llama_adapter: there is no published layout of the version {config.version!r}{' with LoRA' * lora}; v1 "
            "and v2_multimodal_7b, this with or without LoRA, are accepted"
        )
    wrapped = config.version != "v1"
    text, outer = config.text_config, "llama." if wrapped else ""
    first = text.num_hidden_layers - config.prompt_layers
    prompts: list[str] = []
    idle: dict[str, Tensor] = {}
    rotated: dict[str, int] = {}
    names: dict[str, str] = dict(_connector_names(config.visual_depth)) if wrapped else {}
    for index in range(text.num_hidden_layers):
        here, there = f"language_model.model.layers.{index}", f"{outer}layers.{index}"
        gates = {"gate": f"{there}.attention.gate"} | ({"gate_scale": f"{there}.attention.new_gate"} if lora else {})
        if index < first:
            starts = {"gate": torch.zeros(1, text.num_attention_heads, 1, 1), "gate_scale": torch.ones(1, 1, 1, 1)}
            idle |= {gate: starts[name] for name, gate in gates.items()}
        else:
            prompts.append(f"{here}.self_attn.prompts.prompt")
            names |= {prompts[-1]: TABLE} | {f"{here}.self_attn.prompts.{name}": gate for name, gate in gates.items()}
        if wrapped:
            names |= {f"{here}.{ours}.adapter_bias": f"{there}.{theirs}.bias" for theirs, ours in _BIASES.items()}
            names |= {f"{here}.{ours}.weight": f"{there}.{theirs}.weight" for theirs, ours in _NORMS.items()}
            rotated[f"{here}.self_attn.q_proj.adapter_bias"] = text.num_attention_heads
        if lora:
            for theirs, ours in _LORA.items():
                block, _, linear = theirs.partition(".")
                for part, end in (("lora_a", "l1"), ("lora_b", "l2")):
                    names[f"{here}.{ours}.{part}"] = f"{there}.{block}.lora_{linear}_{end}.weight"
            rotated[f"{here}.self_attn.q_proj.lora_b"] = text.num_attention_heads
            rotated[f"{here}.self_attn.k_proj.lora_b"] = text.num_key_value_heads
    if wrapped:
        names["language_model.model.norm.weight"] = "llama.norm.weight"
    return Layout(names, prompts, idle, rotated, text.num_attention_heads, wrapped)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in one of the layouts; nothing in it is ever executed.

    Args:
        path: A file of `torch.save` or safetensors, or a folder with one such file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold tensors by name.
    """
    where = "llama_adapter"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".bin", ".safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{where}: {path} holds {len(files)} checkpoint files; the folder of one, or the file itself, is "
                "accepted"
            )
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(f"{where}: {path} does not exist; a .pth file of LLaMA-Adapter is accepted")
    content: Any = load_file(path) if path.suffix == ".safetensors" else load_pickled(path, where)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where}: {path} does not hold tensors by name; a state dict is accepted")
    # An early spelling of the repository's own.
    return {re.sub(r"^llma\.", "llama.", name): tensor for name, tensor in content.items()}


def version_of(state: Mapping[str, Tensor]) -> str:
    """The version that tensors belong to, by their names.

    Raises:
        ValueError: If they are of no version that can be read.
    """
    if "visual_query.weight" in state:
        return "v2_multimodal_7b"
    if TABLE in state:
        return "v1"
    raise ValueError(
        f"llama_adapter: the tensors {some_of(sorted(state))} are not LLaMA-Adapter's; files with {TABLE} and gates "
        "(version 1), and the multimodal 7B's of version 2, are accepted"
    )


def visual_sizes(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Settings of the visual branch that a version 2 file tells by its shapes."""
    blocks = [int(match[1]) for name in state if (match := re.match(r"visual_blocks\.(\d+)\.", name))]
    query = state["visual_query.weight"]
    return {
        "visual_length": query.shape[0],
        "visual_width": query.shape[-1],
        "visual_depth": max(blocks, default=0) + 1,
    }


def lora_rank_of(state: Mapping[str, Tensor]) -> int:
    """Rank of the LoRA that a version 2 file has beside its biases; 0: it has none."""
    downs = (tensor for name, tensor in state.items() if re.search(r"\.lora_w._l1\.weight$", name))
    return next((len(tensor) for tensor in downs if tensor.dim() == 2), 0)


def read_original(
    state: Mapping[str, Tensor], config: Any, lora_rank: int = 0
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A checkpoint's tensors under the names here, in float32.

    Args:
        state: Of `read_checkpoint`.
        config: The `LlamaAdapterConfig` of the model that they are for.
        lora_rank: Of `lora_rank_of`.

    Returns:
        The trained tensors, and the name in the checkpoint of each.

    Raises:
        ValueError: If tensors are missing, unexpected or of another size: all are listed.
    """
    layout, text = layout_of(config, lora_rank > 0), config.text_config
    wanted = {*layout.names.values(), *layout.idle}
    problems = [f"missing: {some_of(missing)}"] if (missing := sorted(wanted - state.keys())) else []
    problems += [f"unexpected: {some_of(extra)}"] if (extra := sorted(state.keys() - wanted)) else []
    table, length = state.get(TABLE), len(layout.prompts) * config.prompt_length
    if table is not None and tuple(table.shape) != (length, text.hidden_size):
        problems.append(
            f"{TABLE} is {list(table.shape)}, not [{len(layout.prompts)} layers · {config.prompt_length}, "
            f"{text.hidden_size}]"
        )
    for end, shape in ((".gate", (1, layout.heads, 1, 1)), (".new_gate", (1, 1, 1, 1))):
        wrong = [n for n in wanted & state.keys() if n.endswith(end) and tuple(state[n].shape) != shape]
        problems += [f"of another shape than {list(shape)}: {some_of(sorted(wrong))}"] if wrong else []
    size = getattr(text, "head_dim", None) or text.hidden_size // layout.heads
    rows = {layout.names[name]: heads * size for name, heads in layout.rotated.items()}
    uneven = [name for name in rows.keys() & state.keys() if state[name].shape[:1] != (rows[name],)]
    problems += [f"not of heads of {size} channels: {some_of(sorted(uneven))}"] if uneven else []
    if problems:
        raise ValueError(
            f"llama_adapter: the checkpoint does not fit a {config.version} of {text.num_hidden_layers} layers, "
            f"{text.hidden_size} wide: {'; '.join(problems)}; exactly the published tensors are accepted; pass the "
            "language model it was trained with"
        )
    found = {}
    for name, original in layout.names.items():
        tensor = state[original].float()
        if name.endswith(".prompt"):
            tensor = tensor.split(config.prompt_length)[layout.prompts.index(name)]
        elif name.endswith((".gate", ".gate_scale")):
            tensor = tensor.flatten()
        elif name in layout.rotated:
            tensor = from_interleaved(tensor, layout.rotated[name])
        found[name] = tensor.clone()
    return found, layout.names


def write_original(state: Mapping[str, Tensor], config: Any, folder: Path, lora_rank: int = 0) -> dict[str, str]:
    """Writes trained tensors as `adapter.pth` in the version's layout, in float32.

    Args:
        state: The trained tensors by their names here.
        config: The `LlamaAdapterConfig` of their model.
        folder: Where to write.
        lora_rank: Rank of their LoRA; 0: they have none.

    Returns:
        The name in the file of each tensor.

    Raises:
        ValueError: If the version has no published layout, or the state is not exactly what that holds.
    """
    layout = layout_of(config, lora_rank > 0)
    missing, extra = sorted(layout.names.keys() - state.keys()), sorted(state.keys() - layout.names.keys())
    if missing or extra:
        raise ValueError(
            f"llama_adapter: the published layout of {config.version} cannot hold this model: "
            f"{f'missing: {some_of(missing)}; ' if missing else ''}"
            f"{f'no place for: {some_of(extra)}; ' if extra else ''}"
            "exactly its tensors are accepted; train its stages, no others"
        )
    content = dict(layout.idle)
    content[TABLE] = torch.cat([state[name].float().cpu() for name in layout.prompts])
    for name, original in layout.names.items():
        tensor = state[name].detach().float().cpu()
        if name.endswith((".gate", ".gate_scale")):
            content[original] = tensor.reshape(1, -1, 1, 1).clone()
        elif name in layout.rotated:
            content[original] = to_interleaved(tensor, layout.rotated[name])
        elif original != TABLE:
            content[original] = tensor.clone()
    # The authors' loader has rank 16 where there is no LoRA too.
    config_of_file = {"w_bias": True, "w_lora": lora_rank > 0, "lora_rank": lora_rank or 16}
    whole: Any = {"model": content, "config": config_of_file} if layout.wrapped else content
    folder.mkdir(parents=True, exist_ok=True)
    replace_atomically(folder / FILE, lambda path: torch.save(whole, path))
    return layout.names


def _connector_names(depth: int) -> Iterator[tuple[str, str]]:
    for theirs, ours in _CONNECTOR.items():
        if theirs.endswith(".weight"):
            yield f"connector.{ours}", theirs
            continue
        for end in ("weight", "bias"):
            yield f"connector.{ours}.{end}", f"{theirs}.{end}"
    for index in range(depth):
        for theirs, ours in _BLOCK.items():
            for end in ("weight", "bias"):
                yield f"connector.blocks.{index}.{ours}.{end}", f"visual_blocks.{index}.{theirs}.{end}"
