"""Training runs in processes of their own, copies of one that has imported everything: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from free_ports import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["accelerate", "mmfast.models.llava", "mmfast.train.loop"])
_PATIENCE = 120


def start(
    config: Path,
    resume: bool = False,
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """Trains as a configuration file says; what is printed goes into a file beside it, see `printed`.

    Args:
        prepare: Called in the process before the run: a function of a module, or a partial of one.
    """
    process = _CONTEXT.Process(target=_train, args=(str(config), resume, environment or {}, prepare))
    process.start()
    return process


def start_two(config: Path, resume: bool = False, prepare: Callable[[], None] | None = None) -> list[ForkServerProcess]:
    """A run of two processes, which find each other as under a launcher."""
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(config, resume, {**address, "RANK": rank, "LOCAL_RANK": rank}, prepare) for rank in ("0", "1")]


def printed(config: Path, rank: int = 0) -> str:
    """What the last process of a configuration with this rank has printed."""
    return _output(config, rank).read_text()


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


def finish_two(processes: list[ForkServerProcess], config: Path, status: int = 0) -> tuple[str, str]:
    """Waits for the end of both; returns what each has printed."""
    try:
        for process in processes:
            finish(process, config, status)
    finally:
        for process in processes:
            process.kill()
    return printed(config, 0), printed(config, 1)


def _output(config: Path, rank: int) -> Path:
    return config.with_suffix(f".{rank}.txt")


def _train(config: str, resume: bool, environment: dict[str, str], prepare: Callable[[], None] | None) -> None:
    import torch

    from mmfast.train import load_config, train

    # Otherwise the loader's workers would come from a further fork server, and outlive this process.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    rank = int(environment.get("RANK", "0"))
    output = os.open(_output(Path(config), rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    settings = load_config(config)
    train(settings, resume=resume)
    if settings.compile:
        print("graphs:", torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_quickly() -> None:
    """What is compiled is traced as ever, but runs PyTorch's own kernels."""
    from mmfast.adapt import compilation

    compilation.BACKEND = "eager"


def stop_second(step: int) -> None:
    """The second process is told to stop in this step."""
    from mmfast.train.log import StepLog

    write = StepLog.write

    def interrupt(log: StepLog, record: dict[str, Any]) -> None:
        write(log, record)
        if os.environ["RANK"] == "1" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    StepLog.write = interrupt  # type: ignore[method-assign]


def poison(sample: str) -> None:
    """The loss of a micro-batch with this sample is NaN."""
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
