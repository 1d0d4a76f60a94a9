"""The host does not wait for the device within a step: what it must know of a batch, it knows before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.data import BatchPlan, EncodedDataset
from mmfast.evaluate.samples import open_samples
from mmfast.train import StageConfig, TrainConfig
from mmfast.train.batches import MicroBatch, training_windows
from mmfast.train.setup import build_model, enter_stage, resolve_stage, set_processor
from mmfast.train.step import accumulate_gradients, build_optimizer, clip_gradients

MakeConfig = Callable[..., TrainConfig]
# What copies to the host, or has a result whose shape depends on values.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class Waits(TorchDispatchMode):
    """Collects the operations for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indexed = func.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_")
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if indexed else []
        if any(func.overloadpacket.__name__.startswith(name) for name in _WAITING) or masks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits_counted(window: list[MicroBatch], host_inputs: tuple[str, ...]) -> Iterator[list[str]]:
    """Collects these operations, and the calls of `tolist`, except on what stays on the host."""
    on_host = {batch.inputs[name].data_ptr() for batch in window for name in host_inputs if name in batch.inputs}
    tolist = Tensor.tolist
    mode = Waits()

    def counted(tensor: Tensor) -> Any:
        if tensor.data_ptr() not in on_host:
            mode.found.append("tolist")
        return tolist(tensor)

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(Tensor, "tolist", counted)
        yield mode.found


def prepared(config: TrainConfig, device: str = "cpu") -> tuple[Any, Any, list[MicroBatch]]:
    model = build_model(config)
    stage = resolve_stage(model, config.stages[0])
    enter_stage(model, stage, torch.device(device))
    set_processor(model, stage, config.stages[0], config.max_length)
    samples, folder = open_samples(config.data)  # type: ignore[arg-type]
    dataset = EncodedDataset(samples, model.processor, folder)  # type: ignore[arg-type]
    window = next(training_windows(dataset, BatchPlan(len(dataset), 8, 5), range(1), 4, packing=config.packing))
    return model.train(), stage, window


def config_of(make_config: MakeConfig, system: str, packing: bool) -> TrainConfig:
    if system == "llava":
        config = make_config(packing=packing)
        config.stages = config.stages[1:]
        return config
    return make_config(system=system, packing=packing, stages=[StageConfig("instruct", batch_size=8)])


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("system", ["llava", "lavin"])
def test_a_step_waits_once(system: str, packing: bool, make_config: MakeConfig) -> None:
    config = config_of(make_config, system, packing)
    model, stage, window = prepared(config)
    optimizer = build_optimizer(model, stage, config.stages[0])
    assert len(window) == 2 and any("pixel_values" in batch.inputs for batch in window)

    def clip() -> list[Tensor]:
        return [clip_gradients([p for p in model.parameters() if p.requires_grad], 1.0)]

    with waits_counted(window, model.host_inputs) as waits:
        result = accumulate_gradients(model, window, Accelerator(cpu=True), torch.float32, stage, clip)
        assert waits == ["tolist"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert waits == ["tolist"]
    assert result.loss > 0 and result.norms[0] > 0


def test_what_waits_is_seen(make_config: MakeConfig) -> None:
    """Without what the host knows, the same batch waits: the counting above can fail."""
    model, _, window = prepared(config_of(make_config, "llava", True))
    known = ("media_tokens", "label_rows")
    inputs = {name: value for name, value in window[0].inputs.items() if name not in known}
    with waits_counted(window, model.host_inputs) as waits:
        alone = model(**inputs).loss
    assert "tolist" in waits and any("nonzero" in wait for wait in waits)
    model.eval()
    assert torch.equal(model(**inputs).loss, model(**window[0].inputs).loss) and alone.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("system", ["llava", "lavin"])
def test_no_micro_batch_waits_on_a_gpu(system: str, packing: bool, make_config: MakeConfig) -> None:
    model, _, window = prepared(config_of(make_config, system, packing), "cuda")
    batches = [batch.pin_memory() for batch in window]
    losses = []
    for first in (True, False):  # the first run may compile and allocate
        torch.cuda.set_sync_debug_mode("default" if first else "error")
        try:
            for batch in batches:
                inputs = {
                    name: value if name in model.host_inputs else value.to("cuda", non_blocking=True)
                    for name, value in batch.inputs.items()
                }
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    losses.append(model(**inputs, loss_reduction="sum").loss)
                losses[-1].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)
