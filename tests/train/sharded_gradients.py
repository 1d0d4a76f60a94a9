"""Program of test_processes: gradients of a model divided among the processes, beside those of a whole one, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mmfast.data import EncodedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.train import TrainConfig, load_config
from mmfast.train.batches import make_micro_batches
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_processor, set_recompute, torch_dtype
from mmfast.train.sharding import shard_model, whole
from mmfast.train.step import accumulate_gradients, clip_gradients, clip_groups

# The samples of a step, with and without an image, in the micro-batches of either process; the second has fewer.
WINDOWS = ([[0, 1], [2, 3], [4], [5, 6]], [[7, 8], [10]])


def measure(config: TrainConfig, accelerator: Accelerator, sharded: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The clipped gradients of the last stage, and what is said of the step."""
    torch.manual_seed(0)
    model: Any = build_model(config)
    for settings in config.stages:
        stage = resolve_stage(model, settings)
        enter_stage(model, stage, accelerator.device)
    with torch.no_grad():  # open LoRA and gates, so that everything has a gradient
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.1)
    if sharded:
        shard_model(model, accelerator.device, torch_dtype(config))
    set_recompute(model, config, len(config.stages) - 1)
    set_processor(model, stage, settings, config.max_length)
    samples, folder = open_samples(str(config.data))
    dataset: Any = EncodedDataset(samples, model.processor, folder)
    routed = stage.routes is not None
    own = [
        batch for chunk in WINDOWS[accelerator.process_index] for batch in make_micro_batches(dataset, chunk, routed)
    ]
    result = accumulate_gradients(model.train(), own, accelerator, torch_dtype(config), stage)
    norms = [clip_gradients(group, 1e-3).item() for group in clip_groups(model, stage)]
    held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return gradients, {"loss": result.loss, "tokens": result.supervised_tokens, "norms": norms, "held": held}


def main() -> None:
    """Writes one line for each configuration into the first argument."""
    torch.set_num_threads(1)
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    lines = []
    for path in sys.argv[2:]:
        config = load_config(path)
        (expected, one), (found, other) = (measure(config, accelerator, sharded) for sharded in (False, True))
        assert expected.keys() == found.keys()
        errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in expected.items()}
        lines.append(json.dumps({"whole": one, "sharded": other, "error": max(errors.values())}))
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text("\n".join(lines))


if __name__ == "__main__":
    main()
