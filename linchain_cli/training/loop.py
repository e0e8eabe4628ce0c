"""The training loop, from the first step to the last."""

from __future__ import annotations

import contextlib
import hashlib
import math
import signal
import time

import numpy as np
import torch

from linchain_cli import run as runs
from linchain_cli.chain import folded
from linchain_cli.data.batches import collate, micro_batches, step_rows
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.training import loss, state as states
from linchain_cli.training.job import Job
from linchain_cli.training.metrics import Interval, peak_memory_bytes
from linchain_cli.training.optimizer import set_learning_rate
from linchain_cli.training.processes import sum_over_processes
from linchain_cli.training.progress import Display
from linchain_cli.training.schedule import learning_rate
from linchain_cli.training.signals import StopRequest


def train(job: Job, display: Display, stop: StopRequest) -> None:
    """Runs optimizer steps until the last one, an early stop, or a signal.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        LinchainError: the loss or the gradient stopped being finite; the checkpoints are kept.
    """
    training, state = job.recipe.training, job.state
    interval = Interval()
    while state.step < job.total_steps:
        started = time.perf_counter()
        rate = learning_rate(
            state.step, job.total_steps, training.learning_rate, training.warmup_steps, training.lr_scheduler
        )
        set_learning_rate(job.optimizer, rate)
        rows = step_rows(len(job.data.train), job.recipe.seed, training.global_batch_size, state.step)
        step_loss, norm, signum, slots = optimizer_step(job, rows, stop)

        state.step += 1
        state.tokens += (tokens := int(job.data.train.lengths[rows].sum()))
        state.supervised_tokens += int(job.data.train.supervised_counts[rows].sum())
        seconds = time.perf_counter() - started
        state.seconds += seconds
        interval.add(seconds, tokens, slots)
        display.step(state.step, step_loss, interval.tokens / interval.seconds)
        _record_rows(job, rows)
        last = state.step == job.total_steps
        if state.step % training.log_every == 0 or last:
            row = {
                "step": state.step,
                "epoch": round(state.step / job.steps_per_epoch, 4),
                "loss": step_loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": state.tokens,
                "supervised_tokens": state.supervised_tokens,
                **interval.row(),
                "peak_memory_bytes": peak_memory_bytes(job.device),
            }
            _record(job, row)
            display.row(row)
            interval = Interval()

        stale = False
        if len(job.data.validation or ()) and (state.step % training.eval_every == 0 or last):
            stale = validate(job, display)
        if state.step % training.save_every == 0 or last or signum or stale:
            save(job)
        if signum:
            raise Stopped(f"stopped at step {state.step} of {job.total_steps}; continue with --resume", signum)
        if stale:
            display.note(f"stopping early at step {state.step}: {state.stale} validations without a lower loss")
            return


def optimizer_step(job: Job, rows: np.ndarray, stop: StopRequest) -> tuple[float, float, int, int]:
    """One step over `rows` (global row numbers): forward and backward of all micro-batches, one sum, one update.

    Returns:
        The mean loss over the step's supervised tokens, the gradient's norm before clipping, the signal that asked
        any process to stop (0 for none), and the number of token slots computed by all of them, padding included.
    """
    training, accelerator, data = job.recipe.training, job.accelerator, job.data.train
    scale = 1.0 / float(data.supervised_counts[rows].sum())
    parts = micro_batches(
        rows, data.lengths, training.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes
    )
    total = torch.zeros((), dtype=torch.float32, device=job.device)
    slots = 0
    with folded(job.model):
        for index, part in enumerate(parts):
            if job.recipe.adapter.dropout:
                torch.manual_seed(dropout_seed(job.recipe.seed, job.state.step, index, accelerator.process_index))
            batch = collate(data, part, job.base.pad_id)
            slots += batch.input_ids.numel()
            total += loss.backward(job.model, batch.input_ids.to(job.device), batch.labels.to(job.device), scale)

    parameters = list(job.parameters.values())
    flags = (slots, stop.signum == signal.SIGTERM, stop.signum == signal.SIGINT)
    extras = torch.stack([total, *(torch.full_like(total, float(flag)) for flag in flags)])
    total, *flags = sum_over_processes(accelerator, parameters, extras)
    norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or math.inf)
    # The step's only meeting of host and device.
    step_loss, norm, slots, terminated, interrupted = torch.stack([total, norm, *flags]).tolist()
    if not (math.isfinite(step_loss) and math.isfinite(norm)):
        raise LinchainError(
            f"step {job.state.step + 1}: the loss is {step_loss} and the gradient norm {norm}; nothing was updated."
            f" Its rows are {rows.tolist()}. Checkpoints are kept; a lower training.learning_rate or"
            " model.dtype=float32 may help."
        )
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    signum = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
    return step_loss, norm, int(signum), int(slots)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The dropout stream of one micro-batch; no random state has to be saved for an exact resume."""
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@contextlib.contextmanager
def _no_dropout(job: Job):
    for layer in job.layers.values():
        layer.training = False
    try:
        yield
    finally:
        for layer in job.layers.values():
            layer.training = True


@torch.no_grad()
def validation_loss(job: Job) -> float:
    """Mean loss over all supervised tokens of the validation rows, shared over the processes."""
    data, accelerator = job.data.validation, job.accelerator
    size = job.recipe.training.micro_batch_size
    total = torch.zeros((), dtype=torch.float64, device=job.device)
    parts = micro_batches(
        np.arange(len(data)), data.lengths, size, rank=accelerator.process_index, world=accelerator.num_processes
    )
    with folded(job.model), _no_dropout(job):
        for part in parts:
            batch = collate(data, part, job.base.pad_id)
            total += loss.summed_loss(job.model, batch.input_ids.to(job.device), batch.labels.to(job.device))
    return (accelerator.reduce(total) / data.supervised_counts.sum()).item()


def validate(job: Job, display: Display) -> bool:
    """Measures and records the validation loss, keeps the best adapter; True when it is time to stop early."""
    state, training = job.state, job.recipe.training
    value = validation_loss(job)
    better = state.best_loss is None or value < state.best_loss
    if better:
        state.best_loss, state.best_step, state.stale = value, state.step, 0
        if training.keep == "best":
            job.best = states.snapshot(job.parameters)
    else:
        state.stale += 1
    _record(job, {"step": state.step, "epoch": round(state.step / job.steps_per_epoch, 4), "eval_loss": value})
    display.validation(state.step, value, better)
    return training.early_stopping is not None and state.stale >= training.early_stopping


def save(job: Job) -> None:
    """Writes a checkpoint (the first process does; the others wait until it is there)."""
    if job.accelerator.is_main_process:
        job.store.save(job.state.step, job.checkpoint_files())
    job.accelerator.wait_for_everyone()


def _record(job: Job, row: dict) -> None:
    if job.accelerator.is_main_process:
        runs.append_jsonl(job.run.metrics_path, row)


def _record_rows(job: Job, rows: np.ndarray) -> None:
    if job.accelerator.is_main_process:
        runs.append_jsonl(job.run.rows_path, {"step": job.state.step, "rows": rows.tolist()})
