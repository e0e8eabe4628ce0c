"""A range test of the learning rate: one short run whose rate rises from step to step, and the loss of a few
held-out rows after each (Smith, arXiv 1506.01186).

The loss falls as soon as steps are long enough to get somewhere, and rises again where they are too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from linchain_cli.data.batches import step_rows
from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.training.job import Job
from linchain_cli.training.loop import optimizer_step, validation
from linchain_cli.training.signals import StopRequest

# Held-out rows that are read after every step, at most: they cost a third of what training rows cost.
WATCHED_ROWS = 32
# Ends the test: the loss is so many times the lowest one, as far as nothing was learnt before.
_LOST = 2.0


@dataclass(frozen=True)
class RangePoint:
    """One step at `rate`: the loss of its training rows before it, and of the watched rows after it."""

    rate: float
    training_loss: float
    loss: float


def rising_rates(lowest: float, highest: float, steps: int) -> list[float]:
    """As many rates as steps, each the same multiple of the one before."""
    return np.geomspace(lowest, highest, steps).tolist()


def watched_rows(job: Job) -> np.ndarray:
    """Indices of validation rows, spread over all of them."""
    held_out, most = len(job.data.validation), min(WATCHED_ROWS, job.recipe.training.global_batch_size)
    return np.unique(np.linspace(0, held_out - 1, min(most, held_out)).round().astype(np.int64))


def range_test(
    job: Job, rates: Sequence[float], stop: StopRequest, show: Callable[[int], None]
) -> list[RangePoint]:
    """Takes one step at each of the rates, until the loss has left what was learnt, or all are taken.

    The job's chains and optimizer are worn out by it; nothing is written.

    Args:
        show: is told how many steps are done.

    Raises:
        Stopped: a signal asked for it.
        LinchainError: not even the first step was finite.
    """
    watched, points = watched_rows(job), []
    lowest = start = validation(job, watched)["loss"]
    stop.deferred = True
    for number, rate in enumerate(rates, 1):
        rows = step_rows(
            len(job.data.train), job.recipe.seed, job.recipe.training.global_batch_size, job.state.step
        )
        try:
            step = optimizer_step(job, rows, rate, stop)
        except LinchainError:
            if not points:
                raise
            break  # the rate before was too high already
        job.state.step += 1
        points.append(RangePoint(rate, step.loss, validation(job, watched)["loss"]))
        show(number)
        if step.signum:
            raise Stopped(stop.message, step.signum)
        lowest = min(lowest, points[-1].loss)
        if not math.isfinite(points[-1].loss) or points[-1].loss > max(start, _LOST * lowest):
            break
    return points
