"""Whether a run fits into a memory, and the cheapest way in which it does, before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mmfast.adapt.compilation import refused_policy
from mmfast.adapt.optimize import optimize
from mmfast.adapt.packing import attend_by_samples
from mmfast.adapt.recompute import decoder_layers, parse_policies, recompute
from mmfast.models.parts import quantized_format
from mmfast.train.batches import micro_batch
from mmfast.train.config import StageConfig, TrainConfig
from mmfast.train.setup import enter_stage, resolve_stage, system_options, torch_dtype
from mmfast.train.simulate import StepMemory, as_fake, simulate_step

if TYPE_CHECKING:
    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage

__all__ = ["Plan", "PlanError", "as_bytes", "fit", "knobs", "parse_bytes", "plan_stage", "plan_table"]

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
# What the work of a step is reckoned from, in forward passes of the language model: forward, and the gradients of its
# inputs; what is computed again comes on top. A micro-batch of few tokens leaves a GPU idle: as much work is lost as
# this many tokens are. A quantised base is dequantised in every pass.
_PASSES, _LOST_TOKENS, _DEQUANTISE = 2.0, 256, {"int8": 0.03, "nf4": 0.05}
# A knob that saves less than this is not named.
_WORTHWHILE = 0.98
# Plans that are tried before the next dtype of the base is: what the straight lines promised may be a little off.
_TRIED = 12
# State of the optimiser in bytes per trained number: two moments, in 32 bits or in 8 with a scale per block.
_STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.03}


class PlanError(ValueError):
    """No setting fits."""


@dataclass(frozen=True)
class Plan:
    """The memory of one stage, in bytes."""

    stage: str
    micro_batch_size: int
    length: int
    recompute: str
    """In the words of `TrainConfig.recompute`."""
    base_dtype: str | None
    parts: Mapping[str, Mapping[str, int]]
    """For each part "weights", "gradients" and "optimizer"."""
    step: StepMemory
    work: float
    """Estimated work of a step per sample, in forward passes of the language model."""

    @property
    def weights(self) -> int:
        """Of all parts."""
        return sum(part["weights"] for part in self.parts.values())

    @property
    def optimizer(self) -> int:
        """State of the optimiser."""
        return sum(part["optimizer"] for part in self.parts.values())

    @property
    def total(self) -> int:
        """The peak: weights and optimiser, and the most that a step holds beside them."""
        return self.weights + self.optimizer + self.step.peak

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stage": self.stage,
            "micro_batch_size": self.micro_batch_size,
            "length": self.length,
            "recompute": self.recompute,
            "base_dtype": self.base_dtype,
            "work": round(self.work, 3),
            "parts": {name: dict(part) for name, part in self.parts.items()},
            "step": dataclasses.asdict(self.step),
            "total": self.total,
        }


def parse_bytes(text: str) -> int:
    """24GB (of 10^9 bytes), 24GiB (of 2^30) and the like, in bytes.

    Raises:
        ValueError: If it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or not float(found[1]):
        raise ValueError(f"gpu: {text!r} is no size of a memory; a number with its unit is accepted: 24GB or 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def plan_stage(
    config: TrainConfig,
    index: int,
    *,
    micro_batch_size: int | None = None,
    length: int | None = None,
) -> Plan:
    """The memory of a stage as it is configured.

    Args:
        config: The run.
        index: Number of the stage.
        micro_batch_size: Samples of a forward pass; None: as configured.
        length: Tokens of each sample; None: the longest that the run allows.

    Raises:
        ValueError: If a sample of this length has no room for its media, or the settings are not the system's.
    """
    stage = config.stages[index]
    paper = _StageOnPaper(config, index, _base_dtype(config), length)
    return paper.plan(micro_batch_size or _micro_batch_size(stage), _policies(config, stage))


def fit(
    config: TrainConfig, budget: int, *, micro_batch_size: int | None = None, length: int | None = None
) -> tuple[TrainConfig, list[Plan]]:
    """The cheapest change of a run with which every stage fits into `budget` bytes.

    What may change is what leaves the result alone: which layers are computed again, and the micro-batch. Only where
    that is not enough the language model's frozen weights are quantised, to int8 and then to NF4. Among the changes
    that fit the one of least work per sample is taken: work computed again, and what small micro-batches waste.

    Args:
        config: The run.
        budget: Bytes.
        micro_batch_size: The most samples of a forward pass; None: as configured.
        length: As in `plan_stage`.

    Returns:
        The changed configuration, and the plan of each stage.

    Raises:
        PlanError: If nothing fits; the message has the nearest.
    """
    dtypes = [_base_dtype(config)]
    if dtypes == [None] and all("language_model" not in _trained_parts(config, s) for s in config.stages):
        dtypes += ["int8", "nf4"]
    nearest: list[Plan] = []
    for base_dtype in dtypes:
        plans, nearest = [], []
        for index, stage in enumerate(config.stages):
            paper = _StageOnPaper(config, index, base_dtype, length)
            found = paper.cheapest(micro_batch_size or _micro_batch_size(stage), budget)
            nearest.append(found)
            if found.total <= budget:
                plans.append(found)
        if len(plans) == len(config.stages):
            return _with_plans(config, plans), plans
    worst = max(nearest, key=lambda plan: plan.total)
    raise PlanError(
        f"estimate: nothing fits into {as_bytes(budget)}: stage {worst.stage} takes {as_bytes(worst.total)} at the "
        f"least, with micro_batch_size {worst.micro_batch_size}, recompute {worst.recompute}, base_dtype "
        f"{worst.base_dtype}; a smaller max_length, a smaller language model or a larger memory is accepted"
    )


def knobs(config: TrainConfig, index: int) -> list[tuple[str, Plan]]:
    """Single changes that save memory in a stage, the cheapest first: what to set, and the plan with it."""
    stage = config.stages[index]
    size, policies = _micro_batch_size(stage), _policies(config, stage)
    paper = _StageOnPaper(config, index, _base_dtype(config))
    now = paper.plan(size, policies)
    found = [(f"recompute: {policy}", paper.plan(size, policy)) for policy in ("mlp", "full") if paper.allows(policy)]
    if size > 1:
        found.append((f"stages[{index}].micro_batch_size: {size // 2}", paper.plan(size // 2, policies)))
    if paper.base_dtype is None and "language_model" not in _trained_parts(config, stage):
        for kind in ("int8", "nf4"):
            found.append((f"base_dtype: {kind}", _StageOnPaper(config, index, kind).plan(size, policies)))
    saving = [(name, plan) for name, plan in found if plan.total < _WORTHWHILE * now.total]
    return sorted(saving, key=lambda knob: (knob[1].work, knob[1].total))


def plan_table(plan: Plan, budget: int | None = None) -> str:
    """The plan to be read, one line a part."""
    columns = ("weights", "gradients", "optimizer")
    held = {
        name: [as_bytes(part[column]) for column in columns] for name, part in plan.parts.items() if part["weights"]
    }
    width = max(map(len, held))
    lines = [
        f"memory of stage {plan.stage}: micro_batch_size {plan.micro_batch_size}, {plan.length} tokens a sample, "
        f"recompute {plan.recompute}, base_dtype {plan.base_dtype or 'as dtype'}",
        " " * (2 + width) + "".join(f"{column:>11}" for column in columns),
        *(f"  {name:<{width}}" + "".join(f"{value:>11}" for value in values) for name, values in held.items()),
        f"  activations {as_bytes(plan.step.activations)}, workspace {as_bytes(plan.step.workspace)}",
    ]
    verdict = ""
    if budget is not None:
        verdict = f" of {as_bytes(budget)}: " + ("it fits" if plan.total <= budget else "it does not fit")
    return "\n".join([*lines, f"  peak {as_bytes(plan.total)}{verdict}"])


@dataclass
class _StageOnPaper:
    """A stage's model without memory, and what it takes under one setting after the other."""

    config: TrainConfig
    index: int
    base_dtype: str | None
    length: int | None = None

    def plan(self, size: int, policies: str) -> Plan:
        """What a setting takes, from a simulation of its step."""
        windows = -(-self._stage_config.batch_size // size)
        recompute(self._model.language_model, parse_policies(policies, len(self._layers)))
        batch = micro_batch([], self._model.example_inputs(size, self._tokens)).inputs
        step = simulate_step(self._model, batch, self._mode, torch_dtype(self.config), self._stage, windows)
        inputs = sum(tensor.nbytes for tensor in batch.values())
        step = dataclasses.replace(step, workspace=step.workspace + inputs, peak=step.peak + inputs)
        work = self._work(parse_policies(policies, len(self._layers)), size * self._tokens)
        return Plan(self._stage.name, size, self._tokens, policies, self.base_dtype, self._parts, step, work)

    def cheapest(self, most: int, budget: int) -> Plan:
        """The setting of least work that fits with at most `most` samples; the smallest one where none does."""
        largest, smallest = self.plan(most, "none"), self.plan(1, "full")
        if largest.total <= budget:
            return largest
        if smallest.total > budget:
            return smallest
        policies = [policy for policy in ("none", "product", "mlp", "full") if self.allows(policy)]
        # Both are straight lines: what is kept in the number of samples, and between the policies of the layers.
        lines = {}
        for policy in policies:
            one, two = (self.plan(size, policy).total for size in (1, 2))
            lines[policy] = one - (two - one), two - one
        options = []
        for size in _halves(most):
            totals = {policy: start + size * slope for policy, (start, slope) in lines.items()}
            for mixture in _mixtures(policies, len(self._layers)):
                if sum(totals[policy] for policy in mixture) <= budget * len(mixture):
                    options.append((self._work(mixture, size * self._tokens), -size, mixture))
        for _, size, mixture in sorted(options)[:_TRIED]:
            found = self.plan(-size, _runs(mixture))
            if found.total <= budget:
                return found
        return smallest

    def allows(self, policy: str) -> bool:
        """Whether the layers can be computed again in this way."""
        if self.config.compile and refused_policy(policy):
            return False
        try:
            recompute(self._model.language_model, policy)
        except ValueError:
            return False
        return True

    def _work(self, policies: list[str], tokens: int) -> float:
        again = sum(self._again[policy] for policy in policies) / len(policies)
        return (_PASSES + again) * (1 + _LOST_TOKENS / tokens) * (1 + _DEQUANTISE.get(self.base_dtype or "", 0.0))

    @cached_property
    def _stage_config(self) -> StageConfig:
        return self.config.stages[self.index]

    @cached_property
    def _built(self) -> tuple[MultimodalModel, Stage, Any]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        from mmfast.models import get_system

        system = get_system(self.config.system)
        model = system.skeleton(self.config.llm, self.config.encoder, **system_options(self.config, system))
        if self.config.optimize:
            optimize(model.language_model)
        attend_by_samples(model.language_model)
        if self.base_dtype in ("int8", "nf4"):
            _quantise_on_paper(model.get_decoder(), self.base_dtype)
        _set_dtypes(model, self.config)
        for config in self.config.stages[: self.index + 1]:
            stage = resolve_stage(model, config)
            enter_stage(model, stage, torch.device("meta"))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        as_fake(model, mode)
        return model, stage, mode

    @property
    def _model(self) -> MultimodalModel:
        return self._built[0]

    @property
    def _stage(self) -> Stage:
        return self._built[1]

    @property
    def _mode(self) -> Any:
        return self._built[2]

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        return decoder_layers(self._model.language_model)

    @cached_property
    def _tokens(self) -> int:
        limit = getattr(self._model.language_model.config, "max_position_embeddings", None) or self.config.max_length
        return self.length or min(self.config.max_length, limit)

    @cached_property
    def _again(self) -> dict[str, float]:
        """The share of a layer's forward pass that is computed again."""
        layer: Any = next(iter(self._layers.values()))
        modules = layer.named_modules()
        linears = {name: m.in_features * m.out_features for name, m in modules if isinstance(m, nn.Linear)}
        wide = sum(size for name, size in linears.items() if name in ("mlp.gate_proj", "mlp.up_proj"))
        share = wide / max(1, sum(linears.values()))
        return {"none": 0.0, "product": 0.01, "mlp": share + 0.01, "full": 1.0, "offload": 1.02}

    @cached_property
    def _parts(self) -> dict[str, dict[str, int]]:
        model, state = self._model, _STATE_BYTES[self.config.optimizer]
        parts = {}
        for name in model.parts:
            parameters = model.part_parameters(name).values()
            trained = [p for p in parameters if p.requires_grad]
            parts[name] = {
                "weights": sum(_nbytes(p) for p in parameters),
                "gradients": sum(_nbytes(p) for p in trained),
                "optimizer": int(sum(p.numel() for p in trained) * state),
            }
        # Quantised weights are buffers.
        buffers = {id(buffer): buffer for buffer in model.language_model.buffers()}
        parts["language_model"]["weights"] += sum(map(_nbytes, buffers.values()))
        return parts


def _set_dtypes(model: MultimodalModel, config: TrainConfig) -> None:
    """What comes pretrained has the run's dtype; what is put between and inside is made in float32."""
    pretrained = {"encoder", "language_model", "norms"} | {base for base in model.bases if config.options.get(base)}
    for part in model.parts:
        for parameter in model.part_parameters(part).values() if part in pretrained else ():
            parameter.data = parameter.data.to(torch_dtype(config))


def _quantise_on_paper(decoder: nn.Module, kind: Any) -> None:
    from mmfast.nn.base_linear import BaseLinear
    from mmfast.nn.quantized_linear import QuantizedLinear

    for module in list(decoder.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Linear or (isinstance(child, BaseLinear) and child.weight_format is None):
                empty = QuantizedLinear(child.in_features, child.out_features, False, format=kind, device="meta")
                if isinstance(child, BaseLinear):
                    child.adopt(empty)
                else:
                    empty.bias = child.bias
                    module._modules[name] = empty


def _with_plans(config: TrainConfig, plans: list[Plan]) -> TrainConfig:
    stages = [
        dataclasses.replace(stage, micro_batch_size=plan.micro_batch_size, recompute=plan.recompute)
        for stage, plan in zip(config.stages, plans, strict=True)
    ]
    return dataclasses.replace(config, base_dtype=cast(Any, plans[0].base_dtype), stages=stages)


def _base_dtype(config: TrainConfig) -> str | None:
    """The configured one, or that of a language model whose folder is quantised already."""
    folder = Path(config.llm).expanduser()
    return config.base_dtype or (quantized_format(folder, None) if folder.is_dir() else None)


def _trained_parts(config: TrainConfig, stage: StageConfig) -> set[str]:
    from mmfast.models import get_system

    system = get_system(config.system)
    model = system.skeleton(config.llm, config.encoder, **system_options(config, system))
    return set(resolve_stage(model, stage).train)


def _micro_batch_size(stage: StageConfig) -> int:
    return stage.micro_batch_size or stage.batch_size


def _policies(config: TrainConfig, stage: StageConfig) -> str:
    return stage.recompute or config.recompute


def _halves(size: int) -> Iterator[int]:
    while size:
        yield size
        size //= 2


def _mixtures(policies: list[str], count: int) -> Iterator[list[str]]:
    """Two policies at the most: more never costs less. The first layers are those that keep less.

    They are computed again when the others have given up what they kept.
    """
    for place, less in enumerate(policies):
        yield [less] * count
        for more in policies[:place]:
            yield from ([less] * many + [more] * (count - many) for many in range(1, count))


def _runs(policies: list[str]) -> str:
    runs = [(name, len(list(run))) for name, run in groupby(policies)]
    return runs[0][0] if len(runs) == 1 else ",".join(f"{name}*{times}" for name, times in runs)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def as_bytes(size: int) -> str:
    """A number of bytes to be read, in units of 10^9 or 10^6."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"
