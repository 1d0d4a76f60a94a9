"""What `mmfast estimate --gpu` plans against what a step allocates: the tiny recipe of every system, policy by policy.

No times are taken. On a CPU the measure is PyTorch's allocator, on a GPU `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from accelerate import Accelerator

from mmfast.benchmarks.harness import arguments, environment, peak_extra_bytes
from mmfast.train import TrainConfig, load_recipe, recipe_names
from mmfast.train.batches import micro_batch
from mmfast.train.plan import plan_stage
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_recompute, torch_dtype
from mmfast.train.step import accumulate_gradients

SIZE, LENGTH = 8, 100
POLICIES = ("none", "product", "mlp", "full")


def measured(config: TrainConfig, index: int, device: str) -> int:
    """Bytes of a step's peak, the weights and the inputs included."""
    model = build_model(config)
    for stage_config in config.stages[: index + 1]:
        stage = resolve_stage(model, stage_config)
        enter_stage(model, stage, torch.device(device))
    set_recompute(model, config, index)
    batch = micro_batch(["a"] * SIZE, model.train().example_inputs(SIZE, LENGTH))
    accelerator = Accelerator(cpu=device == "cpu")

    def run() -> None:
        accumulate_gradients(model, [batch], accelerator, torch_dtype(config), stage)

    run()  # what is allocated once is there afterwards
    model.zero_grad(set_to_none=True)
    language_model = {id(tensor): tensor for tensor in model.language_model.buffers()}
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *language_model.values()))
    inputs = sum(tensor.nbytes for tensor in batch.inputs.values()) if device == "cpu" else 0
    return weights + inputs + peak_extra_bytes(run, device)


def main() -> None:
    options = arguments(__doc__ or "")
    rows: list[dict[str, Any]] = []
    recipes = [name for name in recipe_names() if name.endswith("-world")]
    for recipe in recipes[:1] if options.quick else recipes:
        for dtype in ("float32", "bfloat16"):
            config = load_recipe(recipe)
            config.dtype = dtype  # type: ignore[assignment]
            for index, stage in enumerate(config.stages):
                stage.batch_size = SIZE
                for policy in POLICIES:
                    config.recompute = policy
                    plan = plan_stage(config, index, micro_batch_size=SIZE, length=LENGTH)
                    peak, planned = measured(config, index, options.device), plan.weights + plan.step.peak
                    row = {"recipe": recipe, "stage": stage.name, "dtype": dtype, "recompute": policy}
                    rows.append({**row, "planned": planned, "measured": peak, "ratio": planned / peak})
                    print(
                        *row.values(),
                        f"planned {planned / 1e6:.2f} MB, measured {peak / 1e6:.2f}, {planned / peak:.3f}",
                    )
    worst = max(abs(row["ratio"] - 1) for row in rows)
    print(f"{len(rows)} settings, the plan is off by {worst:.1%} at the most")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / "plan.json"
        partial = target.with_suffix(".tmp")
        partial.write_text(json.dumps({"environment": environment(options.device), "rows": rows}, indent=1) + "\n")
        os.replace(partial, target)


if __name__ == "__main__":
    main()
