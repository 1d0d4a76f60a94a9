"""What a training run is made of: `TrainConfig` and its stages, recipes, and the copy kept in the run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from mmfast.data.budget import allowed_bad
from mmfast.files import write_atomically

__all__ = ["StageConfig", "TrainConfig", "load_config", "load_recipe", "recipe_names", "save_config"]


@dataclass
class StageConfig:
    """One stage of a run: which parts train is the model's own table, the numbers are here."""

    name: str
    """Name of the stage in the model's table: align (the connector alone), instruct (connector and language
    model) or instruct_lora (connector and LoRA)."""
    data: str | list[str] | None = None
    """Training samples of this stage, as `data` of the run; a list joins several. None: the run's `data`."""
    media_folder: str | None = None
    """Folder of this stage's images. None: the run's `media_folder`."""
    template: str | None = None
    """Conversation template. None: the one the model's table names for this stage."""
    pad_to_square: bool | None = None
    """Whether images are padded to a square before they are resized. None: as the model's processor is set."""
    media_first: bool | None = None
    """Whether a turn's media are written before its text, wherever the data has them. None: as the model's
    processor is set."""
    lr: dict[str, float] = field(default_factory=dict)
    """Peak learning rate per part (connector, language_model, lora), over those of the model's table."""
    batch_size: int = 128
    """Samples per optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Samples per forward pass of one process. Smaller needs less memory and gives the same gradients.
    None: the process's whole share of the batch."""
    epochs: float = 1.0
    """Passes over the data. Ignored if `max_steps` is given."""
    max_steps: int | None = None
    """Optimiser steps of this stage. None: what `epochs` needs."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises; then it follows a cosine."""
    schedule: Literal["cosine", "unshifted_cosine"] = "cosine"
    """cosine: it rises from zero, and its cosine begins after that and ends at zero. unshifted_cosine: the cosine is
    that of all steps, so that it has come some way when the rise ends (MiniGPT-4)."""
    start_factor: float = 0.0
    """Learning rate of the first step as a share of the peak, with unshifted_cosine."""
    end_factor: float = 0.0
    """Learning rate that the cosine goes to as a share of the peak, with unshifted_cosine."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only (never on biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm. 0: never."""
    recompute: str | None = None
    """What each layer of the language model computes again in backward, in this stage. None: the run's `recompute`."""
    lora_rank: int | None = None
    """Rank of the LoRA update. None: the model's table. The same for alpha and dropout."""
    lora_alpha: float | None = None
    """Scale of the LoRA update before the division by the rank."""
    lora_dropout: float | None = None
    """Dropout on the input of the low-rank path."""

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str) and self.name != "", "stages.name", self.name, "the name of a stage")
        _check(isinstance(self.lr, dict), "stages.lr", self.lr, "a learning rate for each part by name")
        for part, rate in self.lr.items():
            _check(_number(rate) and rate >= 0, f"stages.lr.{part}", rate, "a learning rate of 0 or more")
        _check_count("stages.batch_size", self.batch_size)
        if self.micro_batch_size is not None:
            _check_count("stages.micro_batch_size", self.micro_batch_size)
        if self.max_steps is not None:
            _check_count("stages.max_steps", self.max_steps)
        _check(_number(self.epochs) and self.epochs > 0, "stages.epochs", self.epochs, "a number above 0")
        for name in ("warmup_ratio", "start_factor", "end_factor"):
            _check_share(f"stages.{name}", getattr(self, name), 1.0)
        known = self.schedule in ("cosine", "unshifted_cosine")
        _check(known, "stages.schedule", self.schedule, "cosine or unshifted_cosine")
        if self.schedule == "cosine":
            factors = (self.start_factor, self.end_factor)
            _check(factors == (0, 0), "stages.start_factor, end_factor", factors, "0 with the schedule cosine")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _check(_number(value) and value >= 0, f"stages.{name}", value, "a number of 0 or more")
        pair = isinstance(self.betas, (list, tuple)) and len(self.betas) == 2
        _check(pair, "stages.betas", self.betas, "a pair of numbers")
        self.betas = (self.betas[0], self.betas[1])  # a list, when it comes from YAML
        for beta in self.betas:
            _check(_number(beta) and 0 <= beta < 1, "stages.betas", beta, "numbers in [0, 1)")
        if self.recompute is not None:
            _check_recompute("stages.recompute", self.recompute)
        if self.lora_rank is not None:
            _check_count("stages.lora_rank", self.lora_rank)
        if self.lora_alpha is not None:
            alpha = self.lora_alpha
            _check(_number(alpha) and alpha > 0, "stages.lora_alpha", alpha, "a number above 0")
        if self.lora_dropout is not None:
            _check(
                _number(self.lora_dropout) and 0 <= self.lora_dropout < 1,
                "stages.lora_dropout",
                self.lora_dropout,
                "a probability in [0, 1)",
            )


@dataclass
class TrainConfig:
    """A whole training run. Saved as `config.yaml` in the run folder; `--resume` reads it back."""

    system: str = "llava"
    """Which system is trained, a name in `mmfast.models.SYSTEMS`."""
    llm: str = ""
    """The language model: a local folder, or `world` for the one in the package. Nothing is downloaded."""
    encoder: str = ""
    """The frozen image encoder: a local folder, or `world` for the one in the package."""
    connector: str | None = None
    """What joins the two, for systems that have a choice: for LLaVA linear, mlp<depth>x_gelu or identity. None: the
    system's own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of the system, by the names of its `from_parts`."""
    start_from: str | None = None
    """A finished run (or saved model folder) whose trained parts this run starts with. None: fresh ones."""
    data: str | list[str] | None = None
    """Training samples: a JSON or JSONL file, a tar, a folder of Hugging Face datasets, or <format>:<rest> as in
    docs/data.md, such as world:<split> for the embedded world; a list joins several. A stage may name its own."""
    media_folder: str | None = None
    """Folder to which the samples' image paths are relative. None: the folder of the data file."""
    out: str = "runs/train"
    """The run folder: config.yaml, log.jsonl, checkpoints/, best/ with `eval_data` and, at the end, model/."""
    eval_data: str | list[str] | None = None
    """Held-out samples, as `data`, whose loss is measured; their media are looked for as those of `data`. None: no
    loss is measured."""
    eval_every: int = 500
    """The loss on `eval_data` every so many optimiser steps; it is always measured at the end of a stage."""
    keep_best: bool = True
    """Whether the model with the lowest loss on `eval_data` stays in best/, beside the last checkpoints. Each stage
    begins anew."""
    feature_cache: str | None = None
    """Folder in which the features of the frozen parts (encoder, frozen Q-Former) are kept, so that these run once per
    image or video; runs may share it. None: they run in every step. Not for lavin, which trains inside its encoder."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 keeps frozen weights in bfloat16 and computes in it; what trains stays float32."""
    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """How the language model's frozen linear layers are held: int8 and nf4 are made while they are read, and take a
    half and a quarter of bfloat16. Dense ones are of the same `dtype` as all else. None: as the folder has them."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps the moments of tensors of 4096 elements or more in 8 bits, about 2 bytes a parameter in place of
    8; it needs bitsandbytes."""
    max_length: int = 2048
    """Longest sequence, in tokens, image tokens included. Longer text is cut at its end."""
    optimize: bool = True
    """Whether the language model's norms, MLPs and rotary embeddings are computed by mmfast's ops, as `mmfast.optimize`
    does it. What is trained and saved is the same."""
    sharding: Literal["none", "fsdp"] = "none"
    """Under torchrun or accelerate launch: none keeps the whole model in each process (DDP), fsdp divides the language
    model's weights, and the gradients and optimiser state of all that trains, among them. Of one process nothing is
    divided."""
    recompute: str = "none"
    """What the language model's layers compute again in backward instead of keeping it: none, product (the product in
    the MLP), mlp (the MLP's wide matrices), full (the layer: least memory, about a third more time) or offload (full,
    its inputs kept on the host); or runs of layers such as full*20,none*12."""
    compile: bool = False
    """Whether the language model's layers are compiled by `torch.compile`, in training steps alone. Layers of one form
    share a graph, whatever the length; the first steps take longer, a minute or more. A compiler must be there."""
    packing: bool = False
    """Whether the samples of a micro-batch share one row without padding, in which each attends to itself alone. The
    gradients are the same, and no work is done on padding. For every system but llama_adapter."""
    group_by_length: bool = False
    """Whether the samples of a step are sorted by kind (media or text alone) and length before they are divided into
    micro-batches: less padding, and the same gradients. It matters where micro_batch_size is less than the batch."""
    stages: list[StageConfig] = field(default_factory=list)
    """The stages, in order."""
    num_workers: int = 0
    """Processes that prepare batches. 0: the training process does it. The order never depends on it."""
    log_every: int = 1
    """A line in log.jsonl every so many optimiser steps."""
    save_every: int = 500
    """A checkpoint every so many optimiser steps; there is always one at the end of a stage."""
    keep_checkpoints: int = 2
    """How many checkpoints stay on the disk."""
    max_nonfinite_steps: int = 10
    """The run stops when more than so many steps had to be skipped because of a loss that is not finite."""
    max_bad: int | str = 0
    """How many samples of a stage's data may be bad, such as with a broken image: a number, or a share such as 0.1%.
    Each is named and counted, and the next good one takes its place; one more stops the run."""

    def __post_init__(self) -> None:
        from mmfast.models import SYSTEMS

        _check(self.system in SYSTEMS, "system", self.system, " or ".join(SYSTEMS))
        _check(isinstance(self.options, dict), "options", self.options, "a mapping of settings by name")
        _check(self.dtype in ("float32", "bfloat16"), "dtype", self.dtype, "float32 or bfloat16")
        _check(self.sharding in ("none", "fsdp"), "sharding", self.sharding, "none or fsdp")
        known = self.optimizer in ("adamw", "adamw_8bit")
        _check(known, "optimizer", self.optimizer, "adamw or adamw_8bit")
        bases = (None, self.dtype, "int8", "nf4")
        _check(self.base_dtype in bases, "base_dtype", self.base_dtype, f"null, {', '.join(bases[1:])}")
        _check_recompute("recompute", self.recompute)
        for name in ("compile", "packing", "group_by_length"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if self.compile:
            self._check_compile()
        _check(isinstance(self.out, str) and self.out != "", "out", self.out, "a folder")
        sources = [self.eval_data] if self.eval_data is None or isinstance(self.eval_data, str) else self.eval_data
        named = isinstance(sources, list) and all(name is None or (isinstance(name, str) and name) for name in sources)
        _check(named and sources != [], "eval_data", self.eval_data, "a data set, a list of some or null")
        _check(isinstance(self.keep_best, bool), "keep_best", self.keep_best, "true or false")
        for name in ("max_length", "log_every", "save_every", "eval_every", "keep_checkpoints"):
            _check_count(name, getattr(self, name))
        for name in ("seed", "num_workers", "max_nonfinite_steps"):
            value = getattr(self, name)
            _check(_integer(value) and value >= 0, name, value, "a whole number of 0 or more")
        allowed_bad(self.max_bad, 1)
        if self.feature_cache is not None:
            _check(str(self.max_bad) == "0", "max_bad", self.max_bad, "0 with a feature_cache, which reads all videos")

    def _check_compile(self) -> None:
        from mmfast.adapt.compilation import refused_policy

        if self.sharding != "none":
            raise ValueError(
                f"config: sharding is {self.sharding!r} and compile is true, but layers that are gathered as they run "
                'are not compiled; "none" is accepted there; choose one of the two'
            )
        chosen = [("recompute", self.recompute), *(("stages.recompute", stage.recompute) for stage in self.stages)]
        for name, policies in chosen:
            refused = refused_policy(policies or "none")
            if refused:
                raise ValueError(
                    f"config: {name} is {policies!r} and compile is true, but {refused} works by hooks on saved "
                    "tensors, which cannot be traced; none, full and offload are accepted there; use full, or set "
                    "compile to false"
                )

    def check_complete(self) -> None:
        """Raises ValueError naming the first field without which no run can start."""
        for name in ("llm", "encoder"):
            if not getattr(self, name):
                raise ValueError(f"train: {name} is not set; a local folder or world is accepted")
        if not self.stages:
            raise ValueError("train: stages is empty; name one stage at least, or start from a recipe")
        for index, stage in enumerate(self.stages):
            if not (stage.data or self.data):
                raise ValueError(f"train: stage {index} ({stage.name}) has no data; set data, or stages[{index}].data")


def recipe_names() -> list[str]:
    """The names that `load_recipe` accepts, sorted."""
    folder = resources.files("mmfast") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name: str) -> TrainConfig:
    """Reads a recipe of the package.

    Args:
        name: One of `recipe_names()`, such as llava-1.5-lora.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in recipe_names() and name.replace("-7b", "") in recipe_names():
        name = name.replace("-7b", "")  # a recipe of one size is of that size
    if name not in recipe_names():
        raise ValueError(f"recipe: {name!r} is not known; the recipes are {', '.join(recipe_names())}")
    text = (resources.files("mmfast") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return _from_yaml(text, f"recipe {name}")


def load_config(path: str | Path) -> TrainConfig:
    """Reads a configuration from a YAML file, such as a run's `config.yaml`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is no mapping, has an unknown field or a value out of range; the message names both.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as YAML: it is no UTF-8 text ({error})") from error
    return _from_yaml(text, str(path))


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the configuration so that `load_config` gives an equal one."""
    values = asdict(config)
    for stage in values["stages"]:
        stage["betas"] = list(stage["betas"])
    write_atomically(path, yaml.safe_dump(values, sort_keys=False))


def _from_yaml(text: str, where: str) -> TrainConfig:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not readable as YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: holds a {type(values).__name__}; a mapping of field names is accepted")
    values = dict(values)
    try:
        stages = [_known(StageConfig, stage, "stages.") for stage in values.pop("stages", None) or []]
        for stage in stages:
            _check("name" in stage, "stages.name", None, "the name of a stage")
        return TrainConfig(**_known(TrainConfig, values, "config."), stages=[StageConfig(**stage) for stage in stages])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _known(kind: type[StageConfig] | type[TrainConfig], values: Any, prefix: str) -> dict[str, Any]:
    """`values` with numbers such as 1e-3 (text to YAML 1.1) read as numbers; an unknown name is an error."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}{values!r} is no mapping; a mapping of field names is accepted")
    types = {item.name: str(item.type) for item in fields(kind)}
    for name in values:
        if name not in types:
            raise ValueError(f"{prefix}{name} is not a field; the fields are {', '.join(types)}")
    return {name: _numbers(value) if "float" in types[name] else value for name, value in values.items()}


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check(good: bool, name: str, value: object, accepted: str) -> None:
    if not good:
        raise ValueError(f"config: {name} is {value!r}; {accepted} is accepted")


def _check_recompute(name: str, value: object) -> None:
    from mmfast.adapt.recompute import policy_runs

    try:
        policy_runs(str(value))
    except ValueError as error:
        raise ValueError(f"config: {name}: {error}") from error


def _check_count(name: str, value: object) -> None:
    _check(isinstance(value, int) and _integer(value) and value >= 1, name, value, "a whole number of 1 or more")


def _check_share(name: str, value: float, most: float) -> None:
    _check(_number(value) and 0 <= value <= most, name, value, f"a number from 0 to {most:g}")


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
