"""The training loop, from the first step to the last."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linchain_cli import run as runs
from linchain_cli import storage
from linchain_cli.chain import folded
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.machine import release_memory
from linchain_cli.training import state as states
from linchain_cli.training.display import Display
from linchain_cli.training.job import Job
from linchain_cli.training.memory import within_budget
from linchain_cli.training.metrics import Interval, peak_memory_bytes
from linchain_cli.training.processes import on_main, raise_on_all, sum_over_processes
from linchain_cli.training.schedule import learning_rate, warmup_steps
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.threads import LoadedCpus

# Between two returns of freed memory. Taking a gigabyte again costs the next step a quarter of a second.
_RELEASE_SECONDS = 30.0


def train(job: Job, display: Display, stop: StopRequest, cpus: LoadedCpus) -> None:
    """Runs optimizer steps until the last one, an early stop, or a signal.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        LinchainError: the loss or the gradient stopped being finite; the checkpoints are kept.
    """
    training, state, data = job.recipe.training, job.state, job.data.train
    warmup = warmup_steps(training, job.total_steps)
    interval, released = Interval(), time.perf_counter()
    stop.deferred = True
    while state.step < job.total_steps and not stops_early(job):
        started = time.perf_counter()
        rows = job.next_rows()
        rate = learning_rate(
            state.step, job.total_steps, training.learning_rate, warmup, training.lr_scheduler
        )
        cpus.adjust(rows)
        step = optimizer_step(job, rows, rate, stop)

        state.step += 1
        state.rows += len(rows)
        state.tokens += (tokens := int(data.lengths[rows].sum()))
        state.supervised_tokens += int(data.supervised_counts[rows].sum())
        state.seconds += (seconds := time.perf_counter() - started)
        interval.add(seconds, tokens, step.slots)
        display.step(state.step, step.loss, interval.tokens / interval.seconds)
        _record_rows(job, rows)
        last = state.step == job.total_steps
        if state.step % training.log_every == 0 or last:
            display.row(_record(job, _measures(job, step, rate, interval)))
            interval = Interval()
        if job.data.validation is not None and (state.step % training.eval_every == 0 or last):
            validate(job, display)
        if state.step % training.save_every == 0 or last or step.signum or stops_early(job):
            save(job)
        if job.device.type == "cpu" and time.perf_counter() - released > _RELEASE_SECONDS:
            release_memory()
            released = time.perf_counter()
        if step.signum:
            message = f"stopped at step {state.step} of {job.total_steps}; continue with --resume"
            raise_on_all(job.accelerator, Stopped(message, step.signum))
    if stops_early(job):
        display.note(f"stopped early at step {state.step}: {state.stale} validations without a better one")


def stops_early(job: Job) -> bool:
    """Whether validation has not got better for as many times as the recipe tolerates."""
    patience = job.recipe.training.early_stopping
    return patience is not None and job.state.stale >= patience


def _measures(job: Job, step: Step, rate: float, interval: Interval) -> dict[str, Any]:
    return {
        "loss": step.loss,
        "learning_rate": rate,
        "grad_norm": step.grad_norm,
        "tokens": job.state.tokens,
        "supervised_tokens": job.state.supervised_tokens,
        **interval.row(),
        "peak_memory_bytes": peak_memory_bytes(job.device),
    }


class Step(NamedTuple):
    """What one optimizer step was, over all processes.

    `loss` is the mean over its supervised tokens, `grad_norm` the gradient's norm before clipping, `slots`
    the tokens computed, padding included, and `signum` the signal that asked any process to stop, 0 for none.
    """

    loss: float
    grad_norm: float
    slots: int
    signum: int


def optimizer_step(job: Job, rows: np.ndarray, rate: float, stop: StopRequest) -> Step:
    """One step over these training rows: forward and backward of all micro-batches, one sum, one update.

    Raises:
        LinchainError: loss or gradient norm is not finite. Nothing is updated then, on any process.
    """
    optimizer, state = job.optimizer, job.state
    while True:
        # The step's only meeting of host and device.
        norm, step_loss, slots, *flags = _sum_gradients(job, rows, stop).tolist()
        if math.isfinite(step_loss) and math.isfinite(norm):
            break
        optimizer.zero_grad()
        if not (math.isfinite(step_loss) and state.halve_loss_scale()):
            raise_on_all(job.accelerator, _not_finite(job, rows, step_loss, norm))
    state.count_scaled_step(job.model.dtype)
    optimizer.set_learning_rate(rate)
    optimizer.step()
    optimizer.zero_grad()
    return Step(step_loss, norm, int(slots), _signum(flags))


def _sum_gradients(job: Job, rows: np.ndarray, stop: StopRequest) -> torch.Tensor:
    """Leaves the mean loss's gradient in the optimizer, summed over all processes and clipped.

    Returns:
        (1 + EXTRAS,) the gradient's norm before clipping, the loss, the tokens computed, and a number for
        each signal; all over all processes.
    """
    optimizer, loss_scale = job.optimizer, job.state.loss_scale
    total, slots = within_budget(job, lambda: _add_gradients(job, rows))
    optimizer.extras.copy_(torch.tensor([0.0, slots, *_flags(stop.signum)]), non_blocking=True)
    optimizer.extras[0] = total / loss_scale
    sum_over_processes(job.accelerator, optimizer.sums)
    norm = optimizer.clip_gradients(job.recipe.training.max_grad_norm, loss_scale)
    return torch.cat([norm[None], optimizer.extras])


def _add_gradients(job: Job, rows: np.ndarray) -> tuple[Tensor, int]:
    """This process's share of a step's scaled gradient: its share of the scaled loss, and the tokens computed
    for it."""
    data, rank = job.data.train, job.accelerator.process_index
    scale = job.state.loss_scale / float(data.supervised_counts[rows].sum())
    total, slots = torch.zeros((), device=job.device), 0
    with folded(job.model), job.dropping_out():
        for index, part in enumerate(job.micro_batches(rows, data)):
            if job.recipe.adapter.dropout:
                torch.manual_seed(dropout_seed(job.recipe.seed, job.state.step, index, rank))
            batch = job.objective.collate(data, part, job.base.pad_id)
            slots += batch.input_ids.numel()
            total += job.objective.add_gradients(job.model, batch, scale, job.device)
    return total, slots


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _flags(signum: int) -> list[float]:
    """A signal as numbers that can be summed over processes."""
    return [float(signum == number) for number in _SIGNALS]


def _signum(flags: list[float]) -> int:
    return int(next((number for number, flag in zip(_SIGNALS, flags, strict=True) if flag), 0))


def _not_finite(job: Job, rows: np.ndarray, value: float, norm: float) -> LinchainError:
    return LinchainError(
        f"step {job.state.step + 1}: the loss is {value} and the gradient norm {norm}; nothing was updated,"
        f" the checkpoints are kept. The step's rows are {rows.tolist()}. A lower training.learning_rate or"
        " model.dtype=float32 may help."
    )


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The dropout stream of one micro-batch; no random state has to be saved for an exact resume."""
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def validate(job: Job, display: Display) -> None:
    """Measures and records the validation loss (and how well labels are told), and keeps the best adapter.

    Raises:
        LinchainError: the loss is not finite.
    """
    state = job.state
    values = validation(job)
    value, told_by = values["loss"], job.objective.best_by
    if not math.isfinite(value):
        message = f"step {state.step}: the validation loss is {value}; the checkpoints up to here are kept."
        raise_on_all(job.accelerator, LinchainError(f"{message} A lower training.learning_rate may help."))
    metric = None if told_by == "loss" else values[told_by]
    better = state.is_better(value, metric)
    if better:
        state.best_loss, state.best_metric, state.best_step, state.stale = value, metric, state.step, 0
        if job.recipe.training.keep == "best":
            job.best = states.snapshot(job.parameters)
    else:
        state.stale += 1
    _record(job, {f"eval_{name}": number for name, number in values.items()})
    display.validation(state.step, values, better)


@torch.no_grad()
def validation(job: Job, rows: np.ndarray | None = None) -> dict[str, float]:
    """The mean loss over the validation rows, or over some of them, and what else the objective measures,
    shared over the processes."""
    data = job.data.validation
    rows = np.arange(len(data)) if rows is None else rows

    def read() -> Any:
        with folded(job.model):
            return job.objective.read(
                job.model, data, job.micro_batches(rows, data), job.base.pad_id, job.device
            )

    return job.objective.judge(job.accelerator, within_budget(job, read), data, rows)


def save(job: Job) -> None:
    """Writes a checkpoint: the first process does, the others wait until it is there.

    What was logged so far is made durable first, so no checkpoint is ahead of rows.jsonl and metrics.jsonl.
    """

    def write() -> None:
        for path in (job.run.rows_path, job.run.metrics_path):
            if path.exists():
                storage.fsync_file(path)
        storage.fsync_directory(job.run.path)
        job.store.save(job.state.step, job.checkpoint_files())

    on_main(job.accelerator, write)


def _record(job: Job, values: dict[str, Any]) -> dict[str, Any]:
    """Adds a row to metrics.jsonl, tells the trackers, and returns the row."""
    values = {"epoch": round(job.state.step / job.steps_per_epoch, 4), **values}
    row = {"step": job.state.step, **values}
    if job.accelerator.is_main_process:
        runs.append_jsonl(job.run.metrics_path, row)
        job.accelerator.log(values, step=job.state.step)
    return row


def _record_rows(job: Job, rows: np.ndarray) -> None:
    if job.accelerator.is_main_process:
        runs.append_jsonl(job.run.rows_path, {"step": job.state.step, "rows": rows.tolist()})
