"""From a configuration to the model and its stages."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from mmfast.adapt.optimize import optimize
from mmfast.adapt.packing import attend_by_samples
from mmfast.adapt.recompute import decoder_layers, parse_policies, recompute
from mmfast.train.config import StageConfig, TrainConfig

if TYPE_CHECKING:
    from mmfast.data import Processor
    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage

__all__ = [
    "build_model",
    "build_processor",
    "enter_stage",
    "resolve_stage",
    "set_processor",
    "set_recompute",
    "stage_processor",
    "stage_seed",
    "system_options",
    "torch_dtype",
]


def torch_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype of the frozen weights and of the computation."""
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def stage_seed(config: TrainConfig, index: int) -> int:
    """The seed of a stage: of its data's order, among others. What happens in one stage cannot change the next."""
    return (config.seed + 1) * 1_000_003 + index


def build_model(config: TrainConfig) -> MultimodalModel:
    """The model that a run starts with: pretrained parts and, unless `start_from` says otherwise, fresh others.

    Raises:
        FileNotFoundError: If a part or `start_from` is not there.
        ValueError: If sizes do not fit, an option is not one of the system's, samples cannot be packed, `start_from`
            trained the language model, a stage is to train it though it is quantised, or it is to be sharded and
            cannot be.
    """
    from mmfast.models import get_system

    system = get_system(config.system)
    options = system_options(config, system)
    if config.feature_cache and system.no_feature_cache is not None:
        raise ValueError(
            f"train: feature_cache is set, but the system {config.system} has none, since {system.no_feature_cache}; "
            "null is accepted"
        )
    _check_sharding(config, system)
    if config.packing and system.no_packing is not None:
        raise ValueError(
            f"train: packing is set, but samples of the system {config.system} cannot share a row: "
            f"{system.no_packing}; false is accepted"
        )
    _check_base(config, system, options)
    model: MultimodalModel = system.from_parts(
        config.llm, config.encoder, dtype=torch_dtype(config), base_dtype=config.base_dtype, **options
    )
    if config.start_from:
        _start_from(model, config.start_from)
    if config.optimize:
        optimize(model.language_model)
    if not (config.compile and config.packing):
        # A loop over the samples would be another graph for each number of them: there a mask keeps them apart.
        attend_by_samples(model.language_model)
    return model


def system_options(config: TrainConfig, system: type[MultimodalModel]) -> dict[str, Any]:
    """The settings that the configuration gives `from_parts`.

    Raises:
        ValueError: If the system has no setting of a name.
    """
    options = dict(config.options)
    if config.connector is not None:
        options["connector"] = config.connector
    accepted = [*system.settings, *(base for base in system.bases if base not in ("llm", "encoder"))]
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise ValueError(
            f"train: the system {config.system} has no setting {', '.join(unknown)}; accepted are {', '.join(accepted)}"
        )
    return options


def resolve_stage(model: MultimodalModel, config: StageConfig) -> Stage:
    """The model's stage of that name, with the configuration's values over the published ones.

    Raises:
        ValueError: If the model has no such stage, a learning rate names a part that does not train in it, or LoRA
            is configured for a stage without.
    """
    table = model.stages()
    if config.name not in table:
        raise ValueError(f"train: stages.name is {config.name!r}; the model has {', '.join(table)}")
    stage = table[config.name]
    for part in config.lr:
        if part not in stage.train:
            raise ValueError(
                f"train: stages.lr names {part!r}, which does not train in stage {stage.name}; "
                f"{', '.join(stage.train)} are accepted"
            )
    changes = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    lora = stage.lora
    if lora is not None:
        lora = dataclasses.replace(lora, **given)
    elif given:
        raise ValueError(
            f"train: stages.lora_{next(iter(given))} is set, but stage {stage.name} has no LoRA; None is accepted "
            "there; use the stage instruct_lora"
        )
    rates = {**stage.train, **config.lr}
    return dataclasses.replace(stage, template=config.template or stage.template, train=rates, lora=lora)


def set_recompute(model: MultimodalModel, config: TrainConfig, index: int) -> None:
    """Sets what each layer of the language model computes again in stage `index`.

    Raises:
        ValueError: If it is not for as many layers as there are, or the layers cannot.
    """
    policies = config.stages[index].recompute or config.recompute
    count = len(decoder_layers(model.language_model))
    recompute(model.language_model, parse_policies(policies, count))


def enter_stage(model: MultimodalModel, stage: Stage, device: torch.device) -> None:
    """Adds, freezes and unfreezes as the stage says, and keeps what trains in float32.

    In bfloat16 an update smaller than 1/256 of a weight would be rounded away.
    """
    model.set_stage(stage)
    cast(nn.Module, model).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def set_processor(model: MultimodalModel, stage: Stage, config: StageConfig, max_length: int) -> None:
    """Gives the model's processor the stage's template and limits; the model is saved with the template too."""
    model.processor = stage_processor(model, stage, config, max_length)
    model.config.template = stage.template


def stage_processor(model: MultimodalModel, stage: Stage, config: StageConfig, max_length: int) -> Processor:
    """A copy of the model's processor with the stage's template and limits."""
    from mmfast.data import get_template

    processor: Any = copy.copy(model.processor)
    processor.template = get_template(stage.template)
    limit = getattr(model.language_model.config, "max_position_embeddings", None) or max_length
    processor.max_length = min(max_length, limit)
    for name in ("pad_to_square", "media_first"):
        if getattr(config, name) is not None:
            setattr(processor, name, getattr(config, name))
    return cast(Any, processor)


def _check_sharding(config: TrainConfig, system: type[MultimodalModel]) -> None:
    if config.sharding == "none":
        return
    if system.no_sharding is not None:
        raise ValueError(
            f"train: sharding is {config.sharding!r}, but the system {config.system} cannot be divided among "
            f'processes, since {system.no_sharding}; "none" is accepted'
        )
    if config.optimizer != "adamw":
        raise ValueError(
            f"train: sharding is {config.sharding!r}, but the optimizer {config.optimizer} cannot divide its state; "
            '"none" is accepted, or the optimizer adamw, of whose state each process holds its share'
        )


def _check_base(config: TrainConfig, system: type[MultimodalModel], options: dict[str, Any]) -> None:
    """Refuses a stage that trains a quantised language model, before anything large is loaded."""
    from mmfast.models.parts import quantized_format, resolve_language_model
    from mmfast.models.stages import check_base

    format = quantized_format(resolve_language_model(config.llm), config.base_dtype)
    if format is None:
        return
    model = system.skeleton(config.llm, config.encoder, **options)
    for stage in config.stages:
        check_base(f"train: stage {stage.name}", resolve_stage(model, stage), format)


def _start_from(model: MultimodalModel, folder: str) -> None:
    from mmfast.models.trained import find_trained, read_description, read_state

    found = find_trained(Path(folder).expanduser())
    if found is None:
        raise FileNotFoundError(
            f"train: start_from is {folder}, which holds no trained model; a finished run folder, or one written by "
            "save_trained, is accepted; train the recipe of the first stage, or set start_from to null to begin with "
            "an untrained connector"
        )
    description = read_description(found)
    if description["system"] != model.system:
        raise ValueError(
            f"train: start_from is {folder}, a model of the system {description['system']}; one of {model.system} is "
            "accepted"
        )
    others = [part for part in ("language_model", "lora") if part in description["trained"]]
    if others:
        raise ValueError(
            f"train: start_from is {folder}, which also trained {', '.join(others)}; a run that left the language "
            "model as it was is accepted"
        )
    model.trained_parts |= set(description["trained"])
    fresh = {name: tensor for name, tensor in model.trained_state().items() if name in model.optional_tensors}
    model.load_trained_state(fresh | read_state(found))


def build_processor(config: TrainConfig, stage: StageConfig | None = None) -> Processor:
    """The processor that samples go through in a stage; no weights are read.

    Args:
        config: The run. Its language model and encoder must be there, of which tokenizer, image processor and
            configuration are read.
        stage: The stage. None: the model's last one, with the published settings.

    Raises:
        FileNotFoundError: If a pretrained part is not there.
        ValueError: If an option or the stage is not one of the system's.
    """
    from mmfast.models import get_system

    system = get_system(config.system)
    model = system.skeleton(config.llm, config.encoder, **system_options(config, system))
    model.attach_processor(config.llm, config.encoder)
    stage = stage or StageConfig(list(model.stages())[-1])
    return stage_processor(model, resolve_stage(model, stage), stage, config.max_length)
