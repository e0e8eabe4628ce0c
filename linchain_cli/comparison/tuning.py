"""Finds a learning rate for a recipe: a range test, then a comparison of a few rates around what it says.

All of it takes about as many optimizer steps as one run of the recipe: a fifth for the range test, and a
fifth for each of three or four rates.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from linchain_cli.chain import detach
from linchain_cli.comparison.definition import open_definition, remove
from linchain_cli.comparison.grid import RATE, Arm, Grid, arm_name, check_measurable, refuse_other_base
from linchain_cli.comparison.runner import refuse_busy, run_comparison
from linchain_cli.console import Progress, note
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.machine import limit_threads
from linchain_cli.recipe import EvaluationConfig, Recipe, TrainingConfig
from linchain_cli.records import read_record, write_record
from linchain_cli.report.plots import rate_plot
from linchain_cli.run import ComparisonDirectory, RunDirectory, locked
from linchain_cli.storage import write_atomic
from linchain_cli.training.base import Base, load_base
from linchain_cli.training.job import Job, prepare
from linchain_cli.training.memory import explained
from linchain_cli.training.processes import connect
from linchain_cli.training.range_test import RangePoint, range_test, rising_rates
from linchain_cli.training.runner import settle_micro_batch
from linchain_cli.training.schedule import warmup_steps
from linchain_cli.training.signals import StopRequest, stop_requests

PARTS = 5  # of a run: what the range test and each of the rates take
FEWEST_STEPS, MOST_STEPS = 12, 200  # of each of them
SPAN = 100.0  # the range test rises from the published rate over this to it times this
# The range test speaks for the last rate before the loss rose again, by so much of what it had fallen by and
# more than noise; and that rate is halved, as a run stays with it for long.
RISEN, BACKED_OFF = 0.1, 2.0
NOISE = 0.02  # of a loss
ALIKE = 0.01  # of what was learnt: rates that differ by less have learnt as much
FURTHEST = 10.0  # times the published rate, up or down, is where runs may begin
MOST_RATES = 4


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """tuning.json. `rate` is None until all is done; `edge` says that it is the lowest or highest one tried.

    recipe: what was tuned
    hashes: of its rows and its base
    steps: of the range test, at most, and of a run at each rate
    range_test: a `RangePoint` after each step
    rates, losses: what was tried, ascending, with the validation loss at the end; None of a run that failed
    """

    FORMAT: ClassVar[str] = "linchain tuning"
    VERSION: ClassVar[int] = 1

    recipe: dict[str, Any]
    hashes: dict[str, str]
    steps: int
    range_test: list[RangePoint]
    rates: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    rate: float | None = None
    edge: bool = False

    @property
    def tested(self) -> list[tuple[float, float]]:
        """(rate, loss) of the range test."""
        return [(point.rate, point.loss) for point in self.range_test]

    @property
    def tried(self) -> list[tuple[float, float]]:
        """(rate, loss) of the runs that did not fail."""
        return [(rate, loss) for rate, loss in zip(self.rates, self.losses, strict=True) if loss is not None]


class TuningDirectory(ComparisonDirectory):
    """A comparison of rates, with what led to them and what came out of it."""

    def __init__(self, path: Path | str):
        super().__init__(path)
        self.tuning_path = self.path / "tuning.json"
        self.curve_path = self.path / "tuning.png"
        self.recipe_path = self.path / "recipe.yaml"


def tune(recipe: Recipe, *, fresh: bool = False) -> tuple[TuningDirectory, Tuning]:
    """Finds the rate and writes it into a copy of the recipe, beside what it was found by.

    All of it lies at <output_dir>/<name>-tune. Called again, it continues: a range test that is done is kept,
    and so are the rates that have finished.

    Args:
        fresh: remove an earlier tuning of that name and start over.

    Raises:
        InputError: the recipe or what lies in its place does not allow it.
        Stopped: a signal ended it; what had been done is kept.
        LinchainError: no rate led to a finite loss.
    """
    check_measurable(recipe)
    directory = TuningDirectory(recipe.run_path.with_name(f"{recipe.name}-tune"))
    limit_threads()
    with locked(directory.path.with_name(f"{directory.path.name}-range")):
        if fresh:
            refuse_busy(directory)
            remove(directory)
        tuning = read_record(directory.tuning_path, Tuning) if directory.tuning_path.exists() else None
        if tuning is not None:
            refuse_other_base(_without_rate(recipe), Recipe.model_validate(tuning.recipe), directory.path)
            if tuning.rate is not None:
                note(f"{directory.path} is finished already; --fresh tunes anew")
                return directory, tuning
        with stop_requests("stopped before the range test: nothing was done") as stop:
            base = load_base(recipe, connect())
            job = _trial_job(recipe, base, directory)
            open_definition(directory, Grid(job.recipe, ()), False).write(directory)
            if tuning is None or tuning.hashes != _hashes(job):
                tuning = _range_test(recipe, job, stop, directory)
            detach(base.model)
            shorter = job.recipe
            del job  # its chains and their moments
        tuning = _compare_rates(shorter, base, directory, tuning)
        write_atomic(directory.recipe_path, _with(recipe, tuning.rate).to_yaml())
        rate_plot(directory.curve_path, tuning.tested, tuning.tried, tuning.rate)
        write_record(directory.tuning_path, tuning)
    return directory, tuning


def _with(recipe: Recipe, rate: float | Literal["auto"]) -> Recipe:
    training = recipe.training.model_copy(update={"learning_rate": rate})
    return recipe.model_copy(update={"training": training})


def _without_rate(recipe: Recipe) -> Recipe:
    """The same of recipes that differ in their rate alone; a number, as every task takes one."""
    return _with(recipe, TrainingConfig().learning_rate)


def _trial_job(recipe: Recipe, base: Base, directory: TuningDirectory) -> Job:
    """A run of a fifth of the recipe's steps at the published rate, ready to train."""
    run = RunDirectory(directory.path)
    whole = prepare(_with(recipe, "auto"), run, connect(), base)
    detach(base.model)
    if whole.accelerator.num_processes > 1:
        raise InputError("a rate is tuned in one process: start it without torchrun or accelerate launch")
    if whole.data.validation is None:
        raise InputError("data.validation left no row to validate on, and rates are judged by such rows")
    job = prepare(_trial_recipe(whole, directory), run, connect(), base)
    with explained(job.recipe, job.device):
        settle_micro_batch(job, note)
    return job


def _trial_recipe(whole: Job, directory: TuningDirectory) -> Recipe:
    training = whole.recipe.training
    steps = min(max(whole.total_steps // PARTS, FEWEST_STEPS), MOST_STEPS)
    warmup = min(0.5, warmup_steps(training, whole.total_steps) / whole.total_steps)
    changed = {
        "epochs": None,
        "max_steps": steps,
        "warmup_steps": round(warmup, 4) or 0,
        "log_every": max(1, steps // 20),
        "eval_every": steps,
        "save_every": max(1, steps // 2),
        "keep": "last",
        "trackers": [],
    }
    data, rows = whole.recipe.data, len(whole.data.train)
    share = share_of_rows(steps, whole.total_steps, rows, training.global_batch_size)
    fewer = [one.model_copy(update={"weight": round(one.weight * share, 4)}) for one in data.train]
    return whole.recipe.model_copy(
        update={
            "name": directory.path.name,
            "data": data.model_copy(update={"train": fewer}),
            "training": training.model_copy(update=changed),
            "evaluation": EvaluationConfig(),
        }
    )


def share_of_rows(steps: int, total: int, rows: int, batch: int) -> float:
    """The share of the training rows that a run of `steps` has, so that it goes over them as often as one of
    `total` steps goes over all: what is learnt by heart then costs a high rate as much as there.

    All where no row comes twice; at least as many as a step takes, and no smaller a share than a run's
    usual one, as fewer rows say little of the others.
    """
    if total * batch <= rows:
        return 1.0
    return min(1.0, max(steps / total, 1 / PARTS, batch / rows))


def _hashes(job: Job) -> dict[str, str]:
    return {"data": job.data.report.fingerprint, "base": job.base.hash}


def _range_test(recipe: Recipe, job: Job, stop: StopRequest, directory: TuningDirectory) -> Tuning:
    steps, published = job.total_steps, job.recipe.training.learning_rate
    rates = rising_rates(published / SPAN, min(1.0, published * SPAN), steps)
    note(f"range test: {steps} steps at rates from {rates[0]:.2g} to {rates[-1]:.2g}")
    stop.message = "stopped during the range test, which is short and begins anew with the same command"
    with explained(job.recipe, job.device), Progress() as progress:
        points = range_test(job, rates, stop, lambda done: progress.show("range test", done, steps))
    content = _without_rate(recipe).model_dump(mode="json")
    tuning = Tuning(recipe=content, hashes=_hashes(job), steps=steps, range_test=points)
    write_record(directory.tuning_path, tuning)
    return tuning


def centre(points: Sequence[RangePoint], published: float) -> float:
    """The rate that a range test speaks for; the published one where the loss neither fell nor rose.

    What counts is where the loss leaves what it had come to, not how low that was or where it fell fastest:
    a long test learns all at lower rates than a short one, and what a classifier learns in so few steps can
    drown in the noise of its rows, while a rate that is too high shows in most tests.
    """
    held = _held(points)
    if held is None:
        return published
    return min(max(held / BACKED_OFF, published / FURTHEST), published * FURTHEST)


def _held(points: Sequence[RangePoint]) -> float | None:
    """The last rate before the loss rose; the last one of all where it fell to the end, None where it did
    neither."""
    start = lowest = points[0].loss
    for before, point in itertools.pairwise(points):
        lowest = min(lowest, before.loss)
        bearable = max(RISEN * (start - lowest), NOISE * start)
        if not point.loss <= lowest + bearable:  # or is no number
            return before.rate
    return points[-1].rate if min(lowest, points[-1].loss) < (1 - NOISE) * start else None


def place_of(rate: float) -> int:
    """The number of a rate in the series 1e-4 (-8), 3e-4 (-7), 1e-3 (-6), …"""
    return round(2 * math.log10(rate))


def rate_at(place: int) -> float:
    """The rate of that number, with one digit."""
    return float(f"{10 ** (place / 2):.0e}")


def _compare_rates(trial: Recipe, base: Base, directory: TuningDirectory, tuning: Tuning) -> Tuning:
    """Three rates, and one more beyond the best of them where that one is an end."""
    start = tuning.range_test[0].loss
    middle = min(-1, place_of(centre(tuning.range_test, trial.training.learning_rate)))
    wanted = [middle - 1, middle, middle + 1]
    while True:
        tuning = _tried(trial, base, directory, tuning, [rate_at(place) for place in wanted])
        best = place_of(best_rate(tuning.tried, start))
        beyond = {wanted[0]: wanted[0] - 1, wanted[-1]: wanted[-1] + 1}.get(best)
        if beyond is None or beyond > 0 or len(wanted) == MOST_RATES:
            break
        wanted = sorted([*wanted, beyond])
    return replace(tuning, rate=refined_rate(tuning.tried, start), edge=best in (wanted[0], wanted[-1]))


def _tried(
    trial: Recipe, base: Base, directory: TuningDirectory, tuning: Tuning, rates: Sequence[float]
) -> Tuning:
    """A run at each of these rates, unless it was done before; one that fails has no loss."""
    recipes = [_with(trial, rate) for rate in rates]
    arms = tuple(Arm(arm_name(one, trial), one, one.adapter.alpha) for one in recipes)
    grid = Grid(trial, arms, (f"{RATE}={','.join(f'{rate:g}' for rate in rates)}",))
    failure: LinchainError | None = None
    try:
        results = run_comparison(grid, [trial.seed], base=base)
    except (InputError, Stopped):
        raise
    except LinchainError as error:  # what a rate that is too high ends with; the others are done
        failure, results = error, json.loads(directory.results_path.read_bytes())
    found = {run["learning_rate"]: run["validation_loss"] for run in results["runs"]}
    losses = [found[rate] for rate in rates]
    if failure is not None and all(loss is None for loss in losses):
        raise failure
    tuning = replace(tuning, rates=list(rates), losses=losses)
    write_record(directory.tuning_path, tuning)
    return tuning


def best_rate(tried: Sequence[tuple[float, float]], start: float) -> float:
    """The lowest rate that has learnt as much as any, of (rate, loss) with rates ascending.

    A short run reaches by a high rate what the whole one has the steps for at a lower one, and where there is
    little to learn even a rate that destroys a lot comes to the same loss in the end.

    Args:
        start: the loss before anything was learnt.
    """
    lowest = min(loss for _, loss in tried)
    return next(rate for rate, loss in tried if loss <= lowest + ALIKE * max(0.0, start - lowest))


def alike(tried: Sequence[tuple[float, float]]) -> bool:
    """Whether the losses of all rates lie so near each other that they hardly tell them apart."""
    losses = [loss for _, loss in tried]
    return len(losses) > 1 and max(losses) - min(losses) < NOISE * min(losses)


def refined_rate(tried: Sequence[tuple[float, float]], start: float) -> float:
    """Where the parabola through the best rate and its neighbours is lowest, over the rates' logarithm, with
    two digits; the best rate itself where it is an end, or no lower than its neighbours.

    Args:
        tried: (rate, loss), with rates ascending and about as far from each other.
        start: see `best_rate`.
    """
    best = best_rate(tried, start)
    at = [rate for rate, _ in tried].index(best)
    if not 0 < at < len(tried) - 1:
        return best
    (low, below), (_, lowest), (high, above) = tried[at - 1 : at + 2]
    if above < lowest or below + above == 2 * lowest:
        return best
    shift = (below - above) / (below + above - 2 * lowest) / 2  # of a distance between rates, at most half
    return float(f"{best * math.exp(shift * math.log(high / low) / 2):.2g}")
