"""How long a run is, and the learning rate as a pure function of the step: nothing to save, nothing that
several processes could step twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from linchain_cli.data.batches import steps_per_epoch

if TYPE_CHECKING:
    from linchain_cli.recipe import TrainingConfig


def total_steps(training: TrainingConfig, rows: int) -> int:
    """Optimizer steps of a whole run over `rows` training rows; a part of an epoch is rounded up."""
    if training.max_steps is not None:
        return training.max_steps
    return _share(training.epochs, steps_per_epoch(rows, training.global_batch_size))


def warmup_steps(training: TrainingConfig, total: int) -> int:
    """Steps of warm-up in a run of `total` steps; a share of them is rounded up."""
    wanted = training.warmup_steps
    return wanted if isinstance(wanted, int) else _share(wanted, total)


def due(step: int, every: int | str, per_epoch: int) -> bool:
    """Whether what comes `every` so many steps, `epoch` or `epoch/4`, comes behind optimizer step `step`
    (1-based); an epoch has `per_epoch` steps."""
    return times_due(step, every, per_epoch) > times_due(step - 1, every, per_epoch)


def times_due(steps: int, every: int | str, per_epoch: int) -> int:
    """How often it has come after so many steps, at most once behind each."""
    if isinstance(every, int):
        return steps // every
    times = int(every.partition("/")[2] or 1)
    return steps * min(times, per_epoch) // per_epoch


def validations(training: TrainingConfig, total: int, rows: int) -> int:
    """How often a run of `total` steps over `rows` training rows is validated, the last step included."""
    per_epoch = steps_per_epoch(rows, training.global_batch_size)
    return times_due(total - 1, training.eval_every, per_epoch) + 1


def _share(factor: float, steps: int) -> int:
    """factor · steps rounded up, the factor as it is written: as binary numbers 0.1 · 30 is above 3."""
    return math.ceil(Fraction(str(factor)) * steps)


def unreachable(training: TrainingConfig, rows: int, validates: bool) -> Iterator[str]:
    """What the recipe asks for in numbers and a run over `rows` training rows is too short for."""
    total = total_steps(training, rows)
    warmup = warmup_steps(training, total)
    if warmup > total:
        highest = learning_rate(training, total - 1, total)
        yield (
            f"training.warmup_steps: the run has {total} steps, and warm-up takes {warmup}: the learning rate"
            f" ends at {highest:.3g} and never reaches {training.learning_rate:.3g}. A number below 1 is a"
            " share of the run (0.05)."
        )
    if training.global_batch_size > rows:
        yield (
            f"training.global_batch_size: {training.global_batch_size} rows are wanted for each step, and"
            f" there are {rows} to train on: every step takes them all"
        )
    times = validations(training, total, rows) if validates else 0
    patience = training.early_stopping
    if patience is not None and patience >= times - 1:  # the first one always counts as lower
        yield (
            f"training.early_stopping: {patience} validations without a lower loss cannot come before the"
            f" last of the run's {times} (training.eval_every is {training.eval_every}, its steps"
            f" {total})"
        )


def learning_rate(training: TrainingConfig, step: int, total: int) -> float:
    """The rate of optimizer step `step` (0-based) of `total`.

    It rises linearly and reaches its peak at the last warm-up step, then decays along a line or a half cosine
    (`linear`, `cosine`) and would be at its floor, `min_lr_ratio` of the peak, one step after the last; or it
    stays (`constant`).
    """
    peak, warmup = training.learning_rate, warmup_steps(training, total)
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.lr_scheduler == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    left = 1 - progress
    if training.lr_scheduler == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (training.min_lr_ratio + (1 - training.min_lr_ratio) * left)
