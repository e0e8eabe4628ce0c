"""The training loop, from the first step to the last."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from accelerate.utils import gather_object

from linchain_cli import storage
from linchain_cli.chain import folded
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.machine import release_memory
from linchain_cli.training import state as states
from linchain_cli.training.display import Display
from linchain_cli.training.history import StepsUnderWay, record
from linchain_cli.training.job import Job
from linchain_cli.training.memory import within_budget
from linchain_cli.training.processes import on_main, raise_on_all, told_when_lost
from linchain_cli.training.reading import Reading, joined
from linchain_cli.training.schedule import due, learning_rate
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import optimizer_step
from linchain_cli.training.threads import LoadedCpus

# Between two returns of freed memory. Taking a gigabyte again costs the next step a quarter of a second.
_RELEASE_SECONDS = 30.0


def train(job: Job, display: Display, stop: StopRequest, cpus: LoadedCpus) -> None:
    """Runs optimizer steps until the last one, an early stop, or a signal.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        LinchainError: the loss or the gradient stopped being finite; the checkpoints are kept.
    """
    training, state = job.recipe.training, job.state
    steps, released = StepsUnderWay(job, display), time.perf_counter()
    stop.deferred = True
    while state.step < job.total_steps and not stops_early(job):
        began, rows = time.perf_counter(), job.next_rows()
        rate = learning_rate(training, state.step, job.total_steps)
        cpus.adjust(rows)
        steps.add(optimizer_step(job, rows, rate, stop), rows, rate, began)

        last = state.step == job.total_steps
        validates = last or due(state.step, training.eval_every, job.steps_per_epoch)
        validates = validates and job.data.validation is not None
        saves = last or due(state.step, training.save_every, job.steps_per_epoch)
        steps.finish(all_of_them=validates or saves)
        if validates:
            validate(job, display)
        if saves or steps.signum or stops_early(job):
            save(job)
        if job.device.type == "cpu" and time.perf_counter() - released > _RELEASE_SECONDS:
            release_memory()
            released = time.perf_counter()
        if steps.signum:
            message = f"stopped at step {state.step} of {job.total_steps}; continue with --resume"
            raise_on_all(job.accelerator, Stopped(message, steps.signum))
    if stops_early(job):
        display.note(f"stopped early at step {state.step}: {state.stale} validations without a better one")


def stops_early(job: Job) -> bool:
    """Whether validation has not got better for as many times as the recipe tolerates."""
    patience = job.recipe.training.early_stopping
    return patience is not None and job.state.stale >= patience


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
    record(job, state.step, {f"eval_{name}": number for name, number in values.items()})
    display.validation(state.step, values, better)


@torch.no_grad()
def validation(job: Job, rows: np.ndarray | None = None) -> dict[str, float]:
    """The mean loss over the validation rows, or over some of them, and what else the objective measures; of
    rows from several sources each one's, `loss/NAME`. Shared over the processes."""
    data, objective = job.data.validation, job.objective
    sources = job.data.validation_sources if rows is None else {}
    rows = np.arange(len(data)) if rows is None else rows

    def read() -> list[Reading]:
        with folded(job.model):
            return [
                objective.read(job.model, data, job.micro_batches(part, data), job.base.pad_id, job.device)
                for part in sources.values() or [rows]
            ]

    found = within_budget(job, read)
    values = objective.judge(job.accelerator, joined(found), data, rows)
    for (name, part), each in zip(sources.items(), found, strict=False):
        values[f"loss/{name}"] = objective.mean_loss(job.accelerator, each, data, part)
    return values


def save(job: Job) -> None:
    """Writes a checkpoint: the first process does, the others wait until it is there.

    What was logged so far is made durable first, so no checkpoint is ahead of rows.jsonl and metrics.jsonl.
    """
    with told_when_lost():
        budgets = gather_object([job.state.micro_batch_tokens])

    def write() -> None:
        job.run.check_there()
        for path in (job.run.rows_path, job.run.metrics_path):
            if path.exists():
                storage.fsync_file(path)
        storage.fsync_directory(job.run.path)
        job.store.save(job.state.step, job.checkpoint_files(budgets))

    on_main(job.accelerator, write)
