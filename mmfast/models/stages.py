"""What a training stage trains, and a model that can be set to a stage and keep what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmfast.adapt import add_lora, dequantize, has_lora, lora_parameters, merge
from mmfast.models.trained import check_projector_widths, check_state, write_trained
from mmfast.nn.base_linear import BaseLinear

__all__ = ["LLAMA_LINEARS", "LoraSpec", "Stage", "StagedModel", "check_base"]

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters on the language model's linear layers."""

    rank: int
    """Rank of each update."""
    alpha: float
    """Scale of the update before the division by the rank."""
    dropout: float = 0.0
    """Probability of dropping an element of the low-rank path's input while training."""
    targets: tuple[str, ...] = LLAMA_LINEARS
    """Last components of the names of the layers that get an adapter."""


@dataclass(frozen=True)
class Stage:
    """One training stage: everything that `train` does not name is frozen."""

    name: str
    """Name of the stage, such as "align"."""
    template: str
    """Name of the conversation template its data is rendered with."""
    train: Mapping[str, float]
    """Learning rate of each trained part, such as "connector", "language_model" or "lora"."""
    lora: LoraSpec | None = None
    """Adapters that the stage needs; they are added when absent."""
    routes: Mapping[str, tuple[str, ...]] | None = None
    """Where samples with media ("media") and samples of text alone ("text") are to train different parts: the parts of
    either kind. None: all samples train all parts."""


class StagedModel(nn.Module):
    """The half of a model that knows its parts: what trains, with which rate, and what has to be kept.

    A system with other parts names them in `parts`, with `frozen_parts` those that no stage may train, and says in
    `part_parameters` what belongs to each.

    Attributes:
        encoder: Has `hidden_size`.
        connector: Always saved.
        language_model: A causal language model of transformers.
        lora_spec: The LoRA that the language model has.
        trained_parts: Every part that a stage trained so far; these are saved.
    """

    parts: ClassVar[tuple[str, ...]] = ("encoder", "connector", "language_model", "lora")
    frozen_parts: ClassVar[tuple[str, ...]] = ("encoder",)
    zero_at_first: ClassVar[tuple[str, ...]] = ("*.lora_a",)
    """Patterns of names of trained tensors whose first gradient is zero: LoRA's A, as B starts at zero."""
    optional_tensors: ClassVar[tuple[str, ...]] = ()
    """Trained tensors that a run may start without, from one of a variant that lacks them; they are fresh then."""
    no_sharding: ClassVar[str | None] = None
    """Why the language model cannot be divided among processes; None where it can."""

    encoder: Any
    connector: nn.Module
    language_model: Any
    lora_spec: LoraSpec | None
    trained_parts: set[str]

    def stages(self) -> dict[str, Stage]:
        """The published training stages by name."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its stages train")

    def describe(self) -> dict[str, Any]:
        """What `mmfast.json` says of the parts; enough to build the same model again."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is described")

    def add_lora(self, spec: LoraSpec) -> list[str]:
        """Adds LoRA to the language model and returns the names of the adapted layers.

        Raises:
            ValueError: If the language model has LoRA already or a target names no layer.
        """
        if has_lora(self.language_model):
            raise ValueError(f"{type(self).__name__}.add_lora: the language model has LoRA already; merge_lora() first")
        names = add_lora(self.language_model, spec.targets, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout)
        self.lora_spec = spec
        self.trained_parts.add("lora")
        return names

    @property
    def base_dtype(self) -> str | None:
        """Format of the language model's frozen linear layers, "nf4" or "int8"; None where they are dense."""
        layers = [layer for layer in self.language_model.modules() if isinstance(layer, BaseLinear)]
        return next((layer.weight_format for layer in layers if layer.weight_format is not None), None)

    def merge_lora(self) -> None:
        """Merges LoRA into the language model, which counts as trained and is dense from then on."""
        dtype = self.language_model.get_input_embeddings().weight.dtype
        merge(self.language_model, dtype)
        dequantize(self.language_model, dtype)  # what had no LoRA
        self.lora_spec = None
        self.trained_parts = (self.trained_parts - {"lora"}) | {"language_model"}

    def part_parameters(self, part: str) -> dict[str, nn.Parameter]:
        """The parameters of a part by their full names, each once.

        Raises:
            ValueError: If the part is not one of `parts`.
        """
        if part not in self.parts:
            raise ValueError(f"{type(self).__name__}: the part is {part!r}; accepted are {', '.join(self.parts)}")
        adapters = {f"language_model.{name}": p for name, p in lora_parameters(self.language_model).items()}
        if part == "lora":
            return adapters
        named = getattr(self, part).named_parameters(prefix=part)
        return {name: parameter for name, parameter in named if name not in adapters}

    def set_stage(self, stage: Stage) -> None:
        """Adds the stage's LoRA where it is absent, freezes everything, then unfreezes what the stage trains.

        Raises:
            ValueError: If the stage trains a part that this model does not have or cannot train, or needs
                another LoRA than the one that is there.
        """
        self._check_stage(stage)
        if stage.lora is not None and self.lora_spec is None:
            self.add_lora(stage.lora)
        self.requires_grad_(False)
        for part in stage.train:
            for parameter in self.part_parameters(part).values():
                parameter.requires_grad_(True)
        self.trained_parts |= set(stage.train)

    def parameter_groups(self, stage: Stage) -> list[dict[str, Any]]:
        """One group {"name", "params", "lr"} for each part that the stage trains; only what requires a gradient."""
        groups = []
        for part, rate in stage.train.items():
            params = [p for p in self.part_parameters(part).values() if p.requires_grad]
            if params:
                groups.append({"name": part, "params": params, "lr": rate})
        return groups

    def parameter_table(self) -> str:
        """A table of the trainable and all parameters of each part."""
        rows = [("part", "trainable", "total")]
        sums = [0, 0]
        for part in self.parts:
            parameters = self.part_parameters(part).values()
            counts = [sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)]
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
            if counts[1]:
                rows.append((part, f"{counts[0]:,}", f"{counts[1]:,}"))
        rows.append(("all", f"{sums[0]:,}", f"{sums[1]:,}"))
        return "\n".join(f"{part:<15}{trainable:>17}{total:>17}" for part, trainable, total in rows)

    def trained_state(self) -> dict[str, Tensor]:
        """Every tensor that any stage so far trained, by its full name; a tied weight appears once."""
        parts = [part for part in self.parts if part in self.trained_parts]
        return {name: p.detach() for part in parts for name, p in self.part_parameters(part).items()}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies a `trained_state` into the model, whose LoRA and trained parts must be the same.

        Raises:
            ValueError: If a tensor is missing, unexpected or of another shape; nothing is copied then.
        """
        where = f"{type(self).__name__}.load_trained_state"
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.check_shapes(where, shapes, self.encoder.hidden_size, self._width)
        own = self.trained_state()
        check_state(where, own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @classmethod
    def check_shapes(
        cls, where: str, shapes: Mapping[str, tuple[int, ...]], encoder_size: int, hidden_size: int
    ) -> None:
        """Refuses trained tensors made for an encoder or a language model of another width, by their shapes alone.

        Raises:
            ValueError: If a width differs; the message has both.
        """
        check_projector_widths(where, shapes, encoder_size, hidden_size)

    def save_trained(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes `trained.safetensors` and `mmfast.json`, which `from_pretrained` opens on the same base models.

        Args:
            folder: Made if missing.
            state: What to write as the `trained_state`, where the model itself is divided among processes.

        Raises:
            ValueError: If LoRA was added or removed past `add_lora` and `merge_lora` of this model.
        """
        if has_lora(self.language_model) != (self.lora_spec is not None):
            raise ValueError(
                f"{type(self).__name__}.save_trained: the language model's LoRA was changed from outside; LoRA of "
                "this model's add_lora, set_stage and merge_lora is accepted; use those"
            )
        lora = None if self.lora_spec is None else asdict(self.lora_spec)
        trained = [part for part in self.parts if part in self.trained_parts]
        state = self.trained_state() if state is None else state
        write_trained(Path(folder), state, {**self.describe(), "lora": lora, "trained": trained})

    @property
    def _width(self) -> int:
        """Width C of the language model's embeddings."""
        return self.language_model.get_input_embeddings().weight.shape[1]

    def _check_stage(self, stage: Stage) -> None:
        where = f"{type(self).__name__}.set_stage: the stage {stage.name!r}"
        check_base(where, stage, self.base_dtype)
        accepted = [part for part in self.parts if part not in self.frozen_parts]
        refused = [part for part in stage.train if part not in accepted]
        if refused:
            raise ValueError(f"{where} trains {', '.join(refused)}; accepted are {', '.join(accepted)}")
        routed = [part for parts in (stage.routes or {}).values() for part in parts]
        if stage.routes is not None and (
            set(stage.routes) != {"media", "text"} or sorted(routed) != sorted(stage.train)
        ):
            raise ValueError(
                f"{where} trains {', '.join(stage.train)} and has the routes {dict(stage.routes)}; each part in one of "
                '"media" and "text" is accepted'
            )
        if stage.lora is not None and self.lora_spec is not None and stage.lora != self.lora_spec:
            raise ValueError(
                f"{where} needs {stage.lora} but the model has {self.lora_spec}; the same is accepted; call "
                "merge_lora() first, or set the stage's LoRA to the model's"
            )
        has_adapters = stage.lora is not None or self.lora_spec is not None
        if "lora" in stage.train and not has_adapters:
            raise ValueError(f"{where} trains lora but neither it nor the model has one; give the stage a LoraSpec")
        if "language_model" in stage.train and has_adapters:
            raise ValueError(
                f"{where} trains the language model under its LoRA; one of both is accepted; call merge_lora() first"
            )


def check_base(where: str, stage: Stage, base_dtype: str | None) -> None:
    """Refuses a stage that trains the language model, where its linear layers are quantised.

    Raises:
        ValueError: If it does; a quantised weight has no gradient, and the others alone would train.
    """
    if "language_model" in stage.train and base_dtype is not None:
        raise ValueError(
            f"{where} trains the language model, whose linear layers are in {base_dtype}, which nothing can train; a "
            "dense one is accepted; train LoRA on it instead (instruct_lora), or leave base_dtype out"
        )
