"""One optimizer step, which a GPU may still be at when the next one begins."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linchain_cli.chain import folded
from linchain_cli.errors import LinchainError
from linchain_cli.stopping import SIGNALS
from linchain_cli.training.job import Job
from linchain_cli.training.memory import within_budget
from linchain_cli.training.processes import raise_on_all, sum_over_processes
from linchain_cli.training.signals import StopRequest


class StepResult(NamedTuple):
    """What one optimizer step was, over all processes.

    `loss` is the mean over its supervised tokens, `grad_norm` the gradient's norm before clipping, `slots`
    the tokens computed, padding included, and `signum` the signal that asked any process to stop, 0 for none.
    """

    loss: float
    grad_norm: float
    slots: int
    signum: int


class Step:
    """An optimizer step that was asked for. On a GPU the host need not wait for it before it asks for the
    next one, so that the GPU always has something to do.

    Args:
        numbers: (1 + EXTRAS,) as `_sum_gradients` gives them.
        error: what to say if they are not finite, from the loss and the norm.
    """

    def __init__(self, job: Job, numbers: Tensor, error: Callable[[float, float], LinchainError]):
        self._job, self._error, self._arriving = job, error, _to_host(numbers)

    @cached_property
    def _numbers(self) -> list[float]:
        return self._arriving()

    @property
    def overflowed(self) -> bool:
        """Whether the gradient is not finite, though the loss is. Waits for the device."""
        norm, loss, *_ = self._numbers
        return math.isfinite(loss) and not math.isfinite(norm)

    def result(self) -> StepResult:
        """Waits for the device, the step's only meeting of the two.

        Raises:
            LinchainError: loss or gradient norm is not finite. Nothing was updated then, by this step or by
                one behind it, on any process.
        """
        norm, loss, slots, *flags = self._numbers
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise_on_all(self._job.accelerator, self._error(loss, norm))
        return StepResult(loss, norm, int(slots), _signum(flags))


def _to_host(values: Tensor) -> Callable[[], list[float]]:
    """Has values come to the host; the function waits until they are there, and for nothing that was asked of
    the device since."""
    if values.device.type == "cpu":
        return values.tolist
    here = torch.empty(values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available())
    here.copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def arrived() -> list[float]:
        there.synchronize()
        return here.tolist()

    return arrived


def optimizer_step(job: Job, rows: np.ndarray, rate: float, stop: StopRequest) -> Step:
    """Asks for one step over these training rows: forward and backward of all micro-batches, one sum, one
    update, which the device itself leaves out if loss or gradient are not finite, and each one after it.

    In float16 that is waited for: such a step is taken again with a smaller loss scale.

    Raises:
        LinchainError: no smaller scale helps. Nothing is updated then, on any process.
    """
    optimizer, state, number = job.optimizer, job.state, job.state.step + 1
    while True:
        numbers = _sum_gradients(job, rows, stop)
        optimizer.set_learning_rate(rate)
        optimizer.step_if(torch.isfinite(numbers[:2]).all())
        optimizer.zero_grad()
        step = Step(job, numbers, lambda loss, norm: _not_finite(number, rows, loss, norm))
        if job.model.dtype != torch.float16:
            return step
        if not (step.overflowed and state.halve_loss_scale()):
            step.result()
            state.count_scaled_step()
            return step
        optimizer.go_on()


def _sum_gradients(job: Job, rows: np.ndarray, stop: StopRequest) -> Tensor:
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


def _flags(signum: int) -> list[float]:
    """A signal as numbers that can be summed over processes."""
    return [float(signum == number) for number in SIGNALS]


def _signum(flags: list[float]) -> int:
    return int(next((number for number, flag in zip(SIGNALS, flags, strict=True) if flag), 0))


def _not_finite(step: int, rows: np.ndarray, loss: float, norm: float) -> LinchainError:
    return LinchainError(
        f"step {step}: the loss is {loss} and the gradient norm {norm}; nothing was updated, the checkpoints"
        f" are kept. The step's rows are {rows.tolist()}. A lower training.learning_rate or"
        " model.dtype=float32 may help."
    )


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The dropout stream of one micro-batch; no random state has to be saved for an exact resume."""
    digest = hashlib.sha256(f"dropout {seed} {step} {micro_batch} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
