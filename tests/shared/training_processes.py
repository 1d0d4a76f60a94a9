"""Training runs in processes of their own, copies of one that has imported everything: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "mmfast.models.llava", "mmfast.train.loop"])
_PATIENCE = 120


def start(
    config: Path, resume: bool = False, environment: dict[str, str] | None = None, poisoned: str | None = None
) -> ForkServerProcess:
    """Trains as a configuration file says; what is printed goes into a file beside it, see `printed`.

    The loss of a micro-batch with the sample `poisoned` is NaN.
    """
    process = _CONTEXT.Process(target=_train, args=(str(config), resume, environment or {}, poisoned))
    process.start()
    return process


def printed(config: Path) -> str:
    """What the last process of a configuration has printed."""
    return _output(config).read_text()


def wait_for_lines(process: ForkServerProcess, config: Path, log: Path, count: int) -> None:
    """Waits until the log has so many lines."""
    deadline = time.monotonic() + _PATIENCE
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.is_alive(), printed(config)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(process: ForkServerProcess, config: Path, status: int = 0) -> str:
    """Waits for the end, which must be as told; returns what was printed."""
    process.join(_PATIENCE)
    assert process.exitcode == status, printed(config)
    return printed(config)


def _output(config: Path) -> Path:
    return config.with_suffix(".txt")


def _train(config: str, resume: bool, environment: dict[str, str], poisoned: str | None) -> None:
    import torch

    from mmfast.train import load_config, train

    # Otherwise the loader's workers would come from a further fork server, and outlive this process.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    if environment.get("RANK", "0") == "0":
        output = os.open(_output(Path(config)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
    torch.set_num_threads(1)
    if poisoned is not None:
        _poison(poisoned)
    train(load_config(config), resume=resume)


def _poison(sample: str) -> None:
    from mmfast.models import Llava
    from mmfast.train import loop
    from mmfast.train.batches import MicroBatch

    accumulate, forward, bad = loop.accumulate_gradients, Llava.forward, []

    def noticing(model: Any, window: list[MicroBatch], *args: Any) -> Any:
        bad[:] = [sample in batch.ids for batch in window]
        return accumulate(model, window, *args)

    def poisoned(model: Any, **inputs: Any) -> Any:
        output = forward(model, **inputs)
        if bad and bad.pop(0):  # none while the held-out loss is measured
            output.loss = output.loss * float("nan")
        return output

    loop.accumulate_gradients = noticing
    Llava.forward = poisoned  # type: ignore[method-assign]
