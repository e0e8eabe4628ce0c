"""A range test of the learning rate: one short run whose rate rises from step to step, and the loss of some
held-out rows on the way (Smith, arXiv 1506.01186).

The loss falls as soon as steps are long enough to get somewhere, and rises again where they are too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.training.job import Job
from linchain_cli.training.loop import validation
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import optimizer_step

# Held-out rows that are read for every step, at most: they cost a third of what training rows cost. In a long
# test they are read at so many points, where they are as many more.
WATCHED_ROWS = 32
POINTS = 20
# Ends the test: the loss is so many times the lowest one, as far as nothing was learnt before.
_LOST = 2.0


@dataclass(frozen=True)
class RangePoint:
    """The test after a step at `rate`: the loss of the watched rows, and of the training rows of the steps
    since the point before, each before its step."""

    rate: float
    training_loss: float
    loss: float


def rising_rates(lowest: float, highest: float, steps: int) -> list[float]:
    """As many rates as steps, each the same multiple of the one before."""
    return np.geomspace(lowest, highest, steps).tolist()


def watched_rows(job: Job, steps: int) -> np.ndarray:
    """Indices of validation rows, spread over all of them, for a test that looks at them every `steps`."""
    held_out, most = len(job.data.validation), min(WATCHED_ROWS, job.recipe.training.global_batch_size)
    rows = min(most * steps, held_out)
    return np.unique(np.linspace(0, held_out - 1, rows).round().astype(np.int64))


def range_test(
    job: Job, rates: Sequence[float], stop: StopRequest, show: Callable[[int], None]
) -> list[RangePoint]:
    """Takes one step at each of the rates, until the loss has left what was learnt, or all are taken, and
    looks at the watched rows `POINTS` times on the way.

    The job's chains and optimizer are worn out by it; nothing is written.

    Args:
        show: is told how many steps are done.

    Raises:
        Stopped: a signal asked for it.
        LinchainError: not even the first step was finite.
    """
    every = math.ceil(len(rates) / POINTS)
    watched, points, losses = watched_rows(job, every), [], []
    lowest = start = validation(job, watched)["loss"]
    stop.deferred = True
    for number, rate in enumerate(rates, 1):
        try:
            step = optimizer_step(job, job.next_rows(), rate, stop).result()
        except LinchainError:
            if not points:
                raise
            break  # the rate before was too high already
        job.state.step += 1
        losses.append(step.loss)
        show(number)
        if step.signum:
            raise Stopped(stop.message, step.signum)
        if number % every and number < len(rates):
            continue
        points.append(RangePoint(rate, float(np.mean(losses)), validation(job, watched)["loss"]))
        losses = []
        lowest = min(lowest, points[-1].loss)
        if not math.isfinite(points[-1].loss) or points[-1].loss > max(start, _LOST * lowest):
            break
    return points
