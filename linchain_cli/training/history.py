"""What is counted, recorded and shown of a run's steps, in their order."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from linchain_cli import run as runs
from linchain_cli.training.display import Display
from linchain_cli.training.job import Job
from linchain_cli.training.metrics import Interval, peak_memory_bytes
from linchain_cli.training.step import Step

# Where the host asks for a step before it knows how the last one ended, so that the device never waits.
AHEAD_ON = ("cuda",)


@dataclass
class _Begun:
    """A step that was asked for. `values` is its row of metrics.jsonl, as far as the host knows it."""

    step: Step
    number: int
    rows: np.ndarray
    tokens: int
    began: float
    values: dict[str, Any]


class StepsUnderWay:
    """Takes steps that a device may still be at, and tells of each when it is known how it ended: on a GPU
    when the next one has been asked for, else at once.

    Attributes:
        signum: the signal that asked any process to stop, 0 while none is known.
    """

    def __init__(self, job: Job, display: Display):
        self._job, self._display = job, display
        self._begun: deque[_Begun] = deque()
        self._ahead = int(job.device.type in AHEAD_ON)
        self._interval, self._last_end = Interval(), 0.0
        self.signum = 0

    def add(self, step: Step, rows: np.ndarray, rate: float, began: float) -> None:
        """Counts a step over these rows, which began at that time, as one of the run's."""
        state, data = self._job.state, self._job.data.train
        tokens = int(data.lengths[rows].sum())
        state.step += 1
        state.rows += len(rows)
        state.tokens += tokens
        state.supervised_tokens += int(data.supervised_counts[rows].sum())
        values = {
            "loss": None,
            "learning_rate": rate,
            "grad_norm": None,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
        }
        self._begun.append(_Begun(step, state.step, rows, tokens, began, values))

    def finish(self, all_of_them: bool) -> None:
        """Waits for the steps that were asked for, but for the last one where the device is to have something
        to do meanwhile, and a stop was not asked for.

        Raises:
            LinchainError: a step was not finite.
        """
        while len(self._begun) > (0 if all_of_them or self.signum else self._ahead):
            self._finish(self._begun.popleft())

    def _finish(self, begun: _Begun) -> None:
        job, interval = self._job, self._interval
        result = begun.step.result()
        self.signum = self.signum or result.signum
        now = time.perf_counter()
        seconds = now - max(begun.began, self._last_end)
        self._last_end = now
        job.state.seconds += seconds
        interval.add(seconds, begun.tokens, result.slots)
        self._display.step(begun.number, result.loss, interval.tokens / interval.seconds)
        if job.accelerator.is_main_process:
            job.run.check_there()
            runs.append_jsonl(job.run.rows_path, {"step": begun.number, "rows": begun.rows.tolist()})
        if begun.number % job.recipe.training.log_every == 0 or begun.number == job.total_steps:
            values = begun.values | {"loss": result.loss, "grad_norm": result.grad_norm}
            values |= interval.row() | {"peak_memory_bytes": peak_memory_bytes(job.device)}
            self._display.row(record(job, begun.number, values))
            self._interval = Interval()


def record(job: Job, step: int, values: dict[str, Any]) -> dict[str, Any]:
    """Adds a row to metrics.jsonl, tells the trackers, and returns the row."""
    values = {"epoch": round(step / job.steps_per_epoch, 4), **values}
    row = {"step": step, **values}
    if job.accelerator.is_main_process:
        job.run.check_there()
        runs.append_jsonl(job.run.metrics_path, row)
        job.accelerator.log(values, step=step)
    return row
