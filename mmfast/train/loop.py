"""Training: stage after stage, step after step, to be stopped and continued anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import Subset

from mmfast.adapt.compilation import LayerCompiler
from mmfast.data.budget import spent_budget
from mmfast.train.advice import explained_out_of_memory
from mmfast.train.batches import MicroBatch, batches_in_order, make_micro_batches, training_windows
from mmfast.train.checkpoint import Checkpoint, load_optimizer_state, optimizer_state, write_checkpoint
from mmfast.train.config import StageConfig, TrainConfig
from mmfast.train.held_out import HeldOut, held_out_loss
from mmfast.train.log import Display, StepLog
from mmfast.train.memory import peak_memory_mb, reset_peak_memory
from mmfast.train.rng import rng_state, seed_everything, set_rng_state
from mmfast.train.run import Progress, RunFolder, StageResult, versions
from mmfast.train.schedule import rate_factor, steps_in_stage
from mmfast.train.setup import (
    build_model,
    enter_stage,
    resolve_stage,
    set_processor,
    set_recompute,
    stage_seed,
    torch_dtype,
)
from mmfast.train.sharding import gather_state, holds_whole_weights, is_sharded, shard_model
from mmfast.train.signals import StopRequest, TrainingInterrupted
from mmfast.train.sources import Sources, check_first_samples
from mmfast.train.step import (
    WindowResult,
    accumulate_gradients,
    autocast,
    build_optimizer,
    check_gradients,
    check_optimizer,
    clip_gradients,
    clip_groups,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from mmfast.data import BatchPlan, JoinedDataset
    from mmfast.models.base import MultimodalModel
    from mmfast.models.stages import Stage

__all__ = ["TrainResult", "train"]

# More than there will be: processes and steps have seeds of their own.
_PROCESSES = 1_000_003


@dataclass
class TrainResult:
    """A finished run."""

    out: Path
    """The run folder; `mmfast.models.open_model` opens it, and its best/ where there are held-out samples."""
    stages: list[StageResult]
    """The stages in order, those finished before a resume included."""
    steps: int
    """Optimiser steps of the whole run."""
    nonfinite_steps: int
    """Steps that were skipped because the loss or a gradient was not finite."""
    bad_samples: list[str]
    """Errors of the bad samples that were replaced, each once in a stage; see `TrainConfig.max_bad`."""
    _trained: MultimodalModel | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> MultimodalModel:
        """The trained model, in evaluation mode; after a sharded run it is read from `out`, whole, when asked for."""
        from mmfast.models import open_model

        return open_model(self.out) if self._trained is None else self._trained


@dataclass
class _Run:
    """What the functions below share."""

    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    model: MultimodalModel
    progress: Progress
    log: StepLog
    stop: StopRequest
    held_out: HeldOut
    sources: Sources
    compiled: Callable[[nn.Module], AbstractContextManager[Any]]
    """In which the layers of a model compute: compiled, if they are to be."""


@dataclass
class _RunningStage:
    """One stage while it trains."""

    stage: Stage
    config: StageConfig
    plan: BatchPlan
    total: int
    optimizer: torch.optim.Optimizer
    names: dict[nn.Parameter, str]
    windows: Iterator[list[MicroBatch]]
    clipped: list[list[nn.Parameter]]
    micro_batch_size: int
    held_out: JoinedDataset | None
    allowed_bad: int


def train(
    config: TrainConfig,
    resume: bool = False,
    after_stage: Callable[[MultimodalModel, StageResult], None] | None = None,
) -> TrainResult:
    """Trains a model as `config` says and writes the run folder `config.out`.

    A resumed run gives bit for bit what the uninterrupted one gives, on the same machine and number of
    processes; with another number dropout draws other numbers. SIGTERM and Ctrl-C end the running step, write a
    checkpoint and stop.

    Args:
        config: The run.
        resume: Continue the run in `config.out` from its newest checkpoint, instead of starting one there.
        after_stage: Called with the model (in evaluation mode) and the result after each stage that ends in
            this call.

    Raises:
        ValueError: If the configuration is not complete, or is not the one of the run to resume, or `after_stage`
            would get a sharded model.
        FileExistsError: If a new run would overwrite one.
        FileNotFoundError: If there is nothing to resume.
        ImportError: If the optimiser needs a package that is missing or too old.
        OSError: If something cannot be written, as on a full disk; what was saved before stays whole.
        RuntimeError: If more than `config.max_nonfinite_steps` steps had to be skipped, more than `config.max_bad`
            samples are bad, something that should train gets no gradient, or `config.compile` is set and there is no
            compiler or a layer cannot be compiled.
        TrainingInterrupted: After a checkpoint was written because of SIGTERM or Ctrl-C.
    """
    from accelerate import Accelerator

    config.check_complete()
    check_optimizer(config.optimizer)
    # Autocast is entered by the step itself: accelerate fixes one precision for the whole process.
    # And without cpu=True it would not see that there are several processes on CPUs.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
    if after_stage and _shards(config, accelerator):
        raise ValueError(
            'train: after_stage is given, but with sharding "fsdp" no process has the whole model; "none" is accepted'
        )
    compiled = LayerCompiler(accelerator.device).applied if config.compile else nullcontext
    folder = RunFolder(config.out)
    # One process after the other: the first may have to move a damaged checkpoint out of the way.
    with accelerator.main_process_first():
        checkpoint = folder.resume(config) if resume else None
        if not resume:
            folder.check_new()
    held_out = HeldOut(config)
    progress = Progress.from_dict(checkpoint.state["progress"]) if checkpoint else Progress()
    model, stages = _open_model(config, progress, checkpoint, accelerator)
    for index in range(len(stages)):
        set_recompute(model, config, index)  # what cannot be is an error now, before there is a run folder
    sources = Sources(config)
    check_first_samples(model, stages, config, sources)
    if checkpoint:
        accelerator.print(f"train: continuing after step {progress.total_steps}, from {checkpoint.path}")
    elif accelerator.is_main_process:
        folder.start(config)
    with (
        StepLog(folder.log, progress.total_steps, accelerator.is_main_process) as log,
        StopRequest() as stop,
    ):
        run = _Run(config, folder, accelerator, model, progress, log, stop, held_out, sources, compiled)
        del model
        for index in range(progress.stage, len(stages)):
            if is_sharded(run.model):
                _reopen(run)
            with explained_out_of_memory(config, index):
                running = _begin_stage(run, stages[index], checkpoint if progress.step else None)
                checkpoint = None
                _train_stage(run, running)
            if after_stage:
                after_stage(run.model.eval(), progress.finished[-1])
    trained = gather_state(run.model.trained_state(), accelerator.is_main_process)
    if accelerator.is_main_process:
        run.model.save_trained(folder.model, trained)
    accelerator.wait_for_everyone()
    best = f", the best by the held-out loss in {folder.best}" if config.eval_data and config.keep_best else ""
    accelerator.print(f"train: done; the model is in {folder.model}{best}")
    bad = [error for stage in progress.finished for error in stage.bad_samples]
    counts = progress.total_steps, progress.nonfinite_steps
    opened = None if is_sharded(run.model) else run.model.eval()
    return TrainResult(folder.path, progress.finished, *counts, bad, opened)


def _shards(config: TrainConfig, accelerator: Accelerator) -> bool:
    return config.sharding == "fsdp" and accelerator.num_processes > 1


def _place(config: TrainConfig, accelerator: Accelerator) -> torch.device:
    """Where the model is put together: one that will be sharded goes to the devices layer by layer."""
    return torch.device("cpu") if _shards(config, accelerator) else accelerator.device


def _open_model(
    config: TrainConfig, progress: Progress, checkpoint: Checkpoint | None, accelerator: Accelerator
) -> tuple[MultimodalModel, list[Stage]]:
    """The model that the run starts with or, with a checkpoint, as it was then; and the run's stages."""
    seed_everything(config.seed)
    model = build_model(config)
    stages = [resolve_stage(model, stage) for stage in config.stages]
    if checkpoint:
        # Each stage adds and trains what it needs, in order; then the parts are as they were.
        for stage in stages[: progress.stage + (progress.step > 0)]:
            enter_stage(model, stage, _place(config, accelerator))
        model.load_trained_state(checkpoint.trained)
    return model, stages


def _reopen(run: _Run) -> None:
    """Begins the next stage of a sharded model as a resumed run would: its shares are those of the stage before."""
    del run.model
    with run.accelerator.main_process_first():
        checkpoint = run.folder.resume(run.config)
    run.model, _ = _open_model(run.config, run.progress, checkpoint, run.accelerator)


def _begin_stage(run: _Run, stage: Stage, checkpoint: Checkpoint | None) -> _RunningStage:
    """Gets the stage ready, from its beginning or, in the midst of it, from `checkpoint`."""
    progress, model, accelerator = run.progress, run.model, run.accelerator
    config = run.config.stages[progress.stage]
    seed = stage_seed(run.config, progress.stage)
    seed_everything(seed)
    if checkpoint is None:
        enter_stage(model, stage, _place(run.config, accelerator))
    if _shards(run.config, accelerator):
        shard_model(model, accelerator.device, torch_dtype(run.config))
        if holds_whole_weights(model):
            accelerator.print("train: the quantised weights are not divided: each process holds all of them")
    set_recompute(model, run.config, progress.stage)
    set_processor(model, stage, config, run.config.max_length)
    from mmfast.data import BatchPlan

    dataset, longest = run.sources.joined(config, cast(Any, model.processor))
    plan = BatchPlan(len(dataset), config.batch_size, seed)
    total = steps_in_stage(len(dataset), config.batch_size, config.epochs, config.max_steps)
    if run.config.feature_cache:
        _fill_feature_cache(run, dataset, plan, range(progress.step, total))
    held_out = run.held_out.dataset(cast(Any, model.processor))
    optimizer = build_optimizer(model, stage, config, run.config.optimizer)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    accelerator.print(f"\nstage {stage.name}: {total} steps of {config.batch_size} samples")
    accelerator.print(model.parameter_table())
    if run.config.compile:
        accelerator.print("train: the layers are compiled as they are first met: the first steps take longer")
    micro_batch_size = config.micro_batch_size or math.ceil(config.batch_size / accelerator.num_processes)
    _try_longest(run, stage, dataset, longest[:micro_batch_size])
    seed_everything(seed + accelerator.process_index)
    if checkpoint is not None:
        load_optimizer_state(optimizer, names, checkpoint.optimizer)
        _restore_random_state(run, checkpoint, seed)
    windows = training_windows(
        dataset,
        plan,
        range(progress.step, total),
        micro_batch_size,
        run.config.num_workers,
        accelerator.process_index,
        accelerator.num_processes,
        split_kinds=stage.routes is not None,
        packing=run.config.packing,
        group_by_length=run.config.group_by_length,
    )
    clipped = clip_groups(model, stage)
    evaluated = micro_batch_size, held_out
    return _RunningStage(stage, config, plan, total, optimizer, names, windows, clipped, *evaluated, dataset.max_bad)


def _try_longest(run: _Run, stage: Stage, dataset: JoinedDataset, indices: list[int]) -> None:
    """Takes the longest samples through forward and backward, so that memory runs out now or not at all."""
    if not indices:
        return
    run.model.train()
    batches = make_micro_batches(dataset, indices, stage.routes is not None, run.config.packing)
    with run.compiled(run.model.language_model):
        accumulate_gradients(run.model, batches, run.accelerator, torch_dtype(run.config), stage)
    run.model.zero_grad(set_to_none=True)
    tokens = max(batch.inputs["input_ids"].shape[1] for batch in batches)
    peak = peak_memory_mb(run.accelerator.device)
    run.accelerator.print(f"train: the longest {len(indices)} samples ({tokens} tokens) fit; peak {peak:,.0f} MB")


def _fill_feature_cache(run: _Run, dataset: JoinedDataset, plan: BatchPlan, steps: range) -> None:
    """Encodes what the stage's remaining steps read and the cache does not have, each process its share."""
    accelerator, model = run.accelerator, run.model
    used = sorted({index for batch in plan.batches(steps.start, steps.stop) for index in batch})
    encoded = start = 0
    # Nothing but the cache is written here, which is always whole: a signal ends it at once.
    with run.stop.suspended(), autocast(accelerator.device, torch_dtype(run.config)):
        for part in dataset.parts:
            own = [index - start for index in used if start <= index < start + len(part)]
            encoded += model.fill_feature_cache(
                cast(str, run.config.feature_cache),
                cast(Any, Subset(cast(Any, part.samples), own)),
                part.media_folder,
                accelerator.process_index,
                accelerator.num_processes,
                run.config.num_workers,
            )
            start += len(part)
    accelerator.print(f"feature cache {run.config.feature_cache}: {encoded} media encoded, the others were there")
    accelerator.wait_for_everyone()


def _train_stage(run: _Run, running: _RunningStage) -> None:
    """Trains the stage's remaining steps and moves `run.progress` to the next stage."""
    progress, device = run.progress, run.accelerator.device
    display = Display(running.stage.name, running.total, progress.step, run.accelerator.is_main_process)
    run.model.train()
    reset_peak_memory(device)
    started = time.perf_counter()
    for window in running.windows:
        rates = _set_rates(running, progress.step)
        result, norm = _optimizer_step(run, running, window)
        _count_bad(run, running, window, result)
        progress.step += 1
        progress.total_steps += 1
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        progress.peak_memory_mb = max(progress.peak_memory_mb, peak_memory_mb(device))
        _write_line(run, running, result, norm, rates, seconds)
        display.update(progress.step, result.loss, result.correct_tokens / result.supervised_tokens)
        if progress.total_steps % run.config.eval_every == 0 or progress.step == running.total:
            _evaluate(run, running, display)
        if progress.step < running.total:
            received = _stop_requested(run)
            if received or progress.total_steps % run.config.save_every == 0:
                path = _save(run, optimizer_state(running.optimizer, running.names))
                received = received or _stop_requested(run)
                if received:
                    _leave(run, received, path)
        started = time.perf_counter()
    display.close()
    _finish_stage(run, running)


def _optimizer_step(run: _Run, running: _RunningStage, window: list[MicroBatch]) -> tuple[WindowResult, float]:
    """One step, or none at all if the loss or a gradient is not finite; returns the sums and the gradient's norm."""
    progress, stage, optimizer = run.progress, running.stage, running.optimizer

    def clip() -> list[torch.Tensor]:
        return [clip_gradients(group, running.config.max_grad_norm) for group in running.clipped]

    with run.compiled(run.model.language_model):
        result = accumulate_gradients(run.model, window, run.accelerator, torch_dtype(run.config), stage, clip)
    norm = math.hypot(*result.norms)
    finite = math.isfinite(result.loss) and math.isfinite(norm)
    if finite:
        # A window of text alone has no gradient for the connector: the first with all that is needed is judged.
        if not progress.gradients_checked and _needed_kinds(stage) <= result.kinds:
            counts = check_gradients(run.model, stage, window)
            reached = ", ".join(f"{part} {count}" for part, count in counts.items())
            run.accelerator.print(f"train: every tensor that trains has a gradient ({reached})")
            progress.gradients_checked = True
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.supervised_tokens += result.supervised_tokens
    progress.last_loss = result.loss if finite else None
    if not finite:
        _count_nonfinite(run, window, result.loss)
    return result, norm


def _evaluate(run: _Run, running: _RunningStage, display: Display) -> None:
    """Measures the loss on the held-out samples, if there are any, and keeps the model if it is the stage's best."""
    if running.held_out is None:
        return
    progress, accelerator = run.progress, run.accelerator
    # A forward pass of a sharded model is one of all processes: each takes all samples.
    divided = not is_sharded(run.model)
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if divided else (0, 1)
    batches = batches_in_order(
        running.held_out,
        running.micro_batch_size,
        run.config.num_workers,
        rank,
        world_size,
        split_kinds=running.stage.routes is not None,
    )
    result = held_out_loss(run.model, batches, accelerator, torch_dtype(run.config), divided)
    finite, step = math.isfinite(result.loss), progress.total_steps
    best = finite and (progress.best_eval_loss is None or result.loss < progress.best_eval_loss)
    progress.eval_loss = result.loss if finite else None
    if best:
        progress.best_eval_loss, progress.best_step = result.loss, step
        if run.config.keep_best:
            trained = gather_state(run.model.trained_state(), accelerator.is_main_process)
            if accelerator.is_main_process:
                run.folder.save_best(run.model, trained, step, result.loss)
    run.log.write(
        {
            "step": step,
            "stage": running.stage.name,
            "stage_step": progress.step,
            "eval_loss": progress.eval_loss,
            "eval_token_accuracy": result.token_accuracy,
            "eval_supervised_tokens": result.supervised_tokens,
            "best": best,
        }
    )
    more = ", the best so far" if best else "" if finite else ", which is not finite: no best model is taken from here"
    display.note(f"{running.stage.name}: step {progress.step}, held-out loss {result.loss:.4f}{more}")


def _finish_stage(run: _Run, running: _RunningStage) -> None:
    progress = run.progress
    if not progress.gradients_checked:
        needed = " and ".join(sorted(_needed_kinds(running.stage)))
        run.accelerator.print(
            f"train: stage {running.stage.name} had no step with samples of {needed}: not all of its parts have trained"
        )
    progress.finished.append(
        StageResult(
            name=running.stage.name,
            steps=progress.step,
            trainable_parameters=sum(parameter.numel() for parameter in running.names),
            seconds=round(progress.seconds, 3),
            peak_memory_mb=round(progress.peak_memory_mb, 1),
            loss=progress.last_loss,
            eval_loss=progress.eval_loss,
            best_eval_loss=progress.best_eval_loss,
            best_step=progress.best_step,
            bad_samples=progress.bad_samples,
        )
    )
    progress.next_stage()
    path = _save(run, {})
    received = _stop_requested(run)
    if received and progress.stage < len(run.config.stages):
        _leave(run, received, path)


def _needed_kinds(stage: Stage) -> set[str]:
    """The kinds of samples without which a step gives no gradient to some part."""
    if stage.routes is not None:
        return set(stage.routes)
    return {"media"} if "connector" in stage.train else set()


def _set_rates(running: _RunningStage, step: int) -> dict[str, float]:
    factor = rate_factor(running.config, step, running.total)
    for group in running.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return {group["name"]: group["lr"] for group in running.optimizer.param_groups}


def _write_line(
    run: _Run,
    running: _RunningStage,
    result: WindowResult,
    norm: float,
    rates: dict[str, float],
    seconds: float,
) -> None:
    progress = run.progress
    skipped = progress.last_loss is None
    if progress.total_steps % run.config.log_every and not skipped:
        return
    run.log.write(
        {
            "step": progress.total_steps,
            "stage": running.stage.name,
            "stage_step": progress.step,
            "epoch": running.plan.locate(progress.step - 1)[0],
            "loss": progress.last_loss,
            "token_accuracy": result.correct_tokens / result.supervised_tokens,
            "supervised_tokens": result.supervised_tokens,
            "lr": max(rates.values()),
            "lr_by_part": rates,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens_per_second": round(result.tokens / seconds, 1),
            "skipped": skipped,
            "bad_samples": len(progress.bad_samples),
        }
    )


def _count_nonfinite(run: _Run, window: list[MicroBatch], loss: float) -> None:
    """Counts a step that is skipped in all processes, with the samples of all of them."""
    from accelerate.utils import gather_object

    progress, most = run.progress, run.config.max_nonfinite_steps
    progress.nonfinite_steps += 1
    ids = [sample for batch in window for sample in batch.ids]
    if run.accelerator.num_processes > 1:
        ids = gather_object(ids)
    what = "a gradient" if math.isfinite(loss) else "the loss"
    message = f"{what} was not finite in step {progress.total_steps + 1}, samples {', '.join(ids)}"
    advice = "look at these samples or lower the learning rate"
    if run.config.dtype != "float32":
        advice += f"; dtype float32 in place of {run.config.dtype} tells whether it is the precision"
    if progress.nonfinite_steps > most:
        raise RuntimeError(
            f"train: {message}; {progress.nonfinite_steps} steps were skipped so far, max_nonfinite_steps = {most} "
            f"are accepted; {advice}"
        )
    told = f"; {advice}" if progress.nonfinite_steps == 1 else ""
    run.accelerator.print(f"train: {message}; the step was skipped ({progress.nonfinite_steps} of {most}){told}")


def _count_bad(run: _Run, running: _RunningStage, window: list[MicroBatch], result: WindowResult) -> None:
    """Names the bad samples that a window has met first, and stops where they are more than may be."""
    if not result.bad:
        return
    errors = [error for batch in window for error in batch.bad]
    if run.accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        errors = gather_object(errors)
    known = run.progress.bad_samples
    for error in dict.fromkeys(errors):
        if error not in known:
            known.append(error)
            count = f"{len(known)} of {running.allowed_bad}"
            run.accelerator.print(f"train: a bad sample, the next takes its place ({count}): {error}")
    if len(known) > running.allowed_bad:
        raise RuntimeError(f"train: {spent_budget(known, running.allowed_bad)}")


def _save(run: _Run, optimizer: dict[str, torch.Tensor]) -> Path:
    """Writes a checkpoint of the whole run; every process calls it, the first one writes."""
    from accelerate.utils import gather_object

    accelerator = run.accelerator
    trained = gather_state(run.model.trained_state(), accelerator.is_main_process)
    optimizer = gather_state(optimizer, accelerator.is_main_process)
    state = rng_state(accelerator.device)
    own = {f"{accelerator.process_index}/{name}": value for name, value in state.items()}
    gathered = gather_object([own]) if accelerator.num_processes > 1 else [own]
    run.log.sync()
    if accelerator.is_main_process:
        write_checkpoint(
            run.folder.checkpoints,
            run.progress.total_steps,
            {"progress": run.progress.to_dict(), "versions": versions()},
            {
                "trained": trained,
                "optimizer": optimizer,
                "rng": {name: value for states in gathered for name, value in states.items()},
            },
            run.config.keep_checkpoints,
        )
    accelerator.wait_for_everyone()
    return run.folder.checkpoints / f"step-{run.progress.total_steps:08d}"


def _restore_random_state(run: _Run, checkpoint: Checkpoint, seed: int) -> None:
    """Goes on with the random numbers of this process, or with others where the number of processes is another."""
    accelerator, step = run.accelerator, run.progress.total_steps
    written = {name.partition("/")[0] for name in checkpoint.rng}
    if len(written) == accelerator.num_processes:
        prefix = f"{accelerator.process_index}/"
        own = {n.removeprefix(prefix): state for n, state in checkpoint.rng.items() if n.startswith(prefix)}
        set_rng_state(own, accelerator.device)
        return
    seed_everything(seed + _PROCESSES * step + accelerator.process_index)
    accelerator.print(
        f"train: the checkpoint is of {len(written)} processes, this run has {accelerator.num_processes}: the order of "
        f"the samples stays, the random numbers of dropout are drawn anew from the seed and step {step}"
    )


def _stop_requested(run: _Run) -> str | None:
    """The signal that asked to stop, in whichever process it arrived."""
    received = run.stop.received
    if run.accelerator.num_processes == 1:
        return received
    flag = torch.tensor(int(received is not None), device=run.accelerator.device)
    total: Any = run.accelerator.reduce(flag, reduction="sum")
    return received or ("a signal in another process" if int(total) else None)


def _leave(run: _Run, received: str, path: Path) -> None:
    raise TrainingInterrupted(
        f"train: stopped by {received} after step {run.progress.total_steps}; saved {path}; "
        f"continue with: mmfast train --config {run.folder.config} --resume"
    )
