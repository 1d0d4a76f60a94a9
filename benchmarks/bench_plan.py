"""What `mmfast estimate --gpu` plans against what a step allocates: the tiny recipe of every system, policy by policy.

No times are taken. On a CPU the measure is PyTorch's allocator, on a GPU `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from mmfast.benchmarks.harness import Row, Settings, peak_extra_bytes
from mmfast.train import TrainConfig, load_recipe, recipe_names
from mmfast.train.batches import MicroBatch, micro_batch
from mmfast.train.plan import plan_stage
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_recompute, torch_dtype
from mmfast.train.step import accumulate_gradients

SIZE, LENGTH = 8, 100
POLICIES = ("none", "product", "mlp", "full")


def prepared(config: TrainConfig, index: int, device: str = "cpu") -> tuple[Any, Any]:
    """The real model in a stage, and the stage."""
    model = build_model(config)
    for stage_config in config.stages[: index + 1]:
        stage = resolve_stage(model, stage_config)
        enter_stage(model, stage, torch.device(device))
    set_recompute(model, config, index)
    return model.train(), stage


def step_peak(config: TrainConfig, model: Any, stage: Any, batches: list[MicroBatch], device: str = "cpu") -> int:
    """Bytes of a step's peak beyond the weights and the inputs."""
    accelerator = Accelerator(cpu=device == "cpu")

    def run() -> None:
        accumulate_gradients(model, batches, accelerator, torch_dtype(config), stage)

    run()  # what is allocated once is there afterwards
    model.zero_grad(set_to_none=True)
    return peak_extra_bytes(run, device)


def measured(config: TrainConfig, index: int, device: str) -> int:
    """Bytes of a step's peak, the weights and the inputs included."""
    model, stage = prepared(config, index, device)
    batch = micro_batch(["a"] * SIZE, model.example_inputs(SIZE, LENGTH))
    peak = step_peak(config, model, stage, [batch], device)
    language_model = {id(tensor): tensor for tensor in model.language_model.buffers()}
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *language_model.values()))
    inputs = sum(tensor.nbytes for tensor in batch.inputs.values()) if device == "cpu" else 0
    return weights + inputs + peak


def rows(settings: Settings) -> list[Row]:
    found: list[Row] = []
    recipes = [name for name in recipe_names() if name.endswith("-world")]
    for recipe in recipes[:1] if settings.quick else recipes:
        for dtype in ("float32", "bfloat16"):
            config = load_recipe(recipe)
            config.dtype = dtype  # type: ignore[assignment]
            for index, stage in enumerate(config.stages):
                stage.batch_size = SIZE
                for policy in POLICIES:
                    config.recompute = policy
                    plan = plan_stage(config, index, micro_batch_size=SIZE, length=LENGTH)
                    peak, planned = measured(config, index, settings.device), plan.weights + plan.step.peak
                    about = {"case": f"{recipe} {stage.name} {dtype}", "provider": policy}
                    found.append(about | {"planned": planned, "measured": peak, "planned / measured": planned / peak})
    return found
