"""All runs of a comparison, one after another, on one loaded base model; several processes may share them."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from linchain_cli.chain import attach, detach, load_adapter
from linchain_cli.comparison.definition import (
    Definition,
    arm_recipe,
    open_definition,
    read_definition,
    remove,
)
from linchain_cli.comparison.evaluating import evaluate_base, evaluate_run
from linchain_cli.comparison.grid import Arm, Grid
from linchain_cli.comparison.halves import half_losses, halves_path, read_halves
from linchain_cli.comparison.parameters import with_equal_parameters
from linchain_cli.comparison.results import collect, write
from linchain_cli.console import note
from linchain_cli.data.asking import straddle_mostly
from linchain_cli.data.dataset import PreparedData, prepare_data
from linchain_cli.data.store import EncodedRows
from linchain_cli.errors import InputError, InUse, LinchainError, Stopped
from linchain_cli.evaluation.asked import AskedTask, has_result, is_measured, own_tasks, recipe_tasks
from linchain_cli.evaluation.labels import LabelledTask, recipe_labelled
from linchain_cli.evaluation.questions import check_questions
from linchain_cli.machine import collect_memory
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.computed import changed_values
from linchain_cli.model.config import empty_model
from linchain_cli.model.files import locate
from linchain_cli.model.limits import limits
from linchain_cli.recipe import Recipe
from linchain_cli.records import write_record
from linchain_cli.report.plots import comparison_plot, loss_plot
from linchain_cli.run import ComparisonDirectory, RunDirectory, RunStatus, in_use, locked, runs_below
from linchain_cli.training.base import Base, load_base, recipe_outputs
from linchain_cli.training.chains import put_in_chains
from linchain_cli.training.job import Job, settled
from linchain_cli.training.metrics import reset_peak_memory
from linchain_cli.training.objective import Objective, objective_of
from linchain_cli.training.rate import with_rate
from linchain_cli.training.runner import run_training
from linchain_cli.training.schedule import total_steps, validations
from linchain_cli.training.signals import stop_requests

_WAIT = 60.0  # seconds for another process to write the definition or the results


def run_comparison(
    grid: Grid,
    seeds: Sequence[int],
    *,
    equal_parameters: bool = False,
    fresh: bool = False,
    base: Base | None = None,
) -> dict[str, Any]:
    """Trains every arm with every seed, unless that was done before, and writes what came out.

    The comparison lies at the base recipe's <output_dir>/<name>. Called again, it continues: finished runs
    are kept, a stopped one is resumed, new arms and seeds are added. Called while another process is at it,
    it takes the runs that nobody is at, and leaves the others to them. The seeds turn slowest, so that all
    arms have one seed before any has two.

    Args:
        seeds: each takes the place of the recipe's seed: initial values, row order and dropout.
        equal_parameters: see `with_equal_parameters`.
        fresh: remove a comparison that exists, with its arms, and start over.
        base: the base recipe's model, if it is loaded already, without chains.

    Returns:
        The content of results.json.

    Raises:
        InputError: the recipe or what lies in its place does not allow it.
        Stopped: a signal ended a run after a checkpoint; what is finished is written.
        LinchainError: runs failed (a loss that is not finite, say); the others are done and written.
    """
    directory = ComparisonDirectory(grid.base.run_path)
    grid = with_rates(grid)
    arms = _adjusted(grid) if equal_parameters else list(grid.arms)
    tasks = recipe_tasks(grid.base)
    if base is None:
        _refuse_misfits(arms)
    with locked(directory.path, _WAIT):
        if fresh:
            refuse_busy(directory)
            remove(directory)
        definition = open_definition(directory, grid, equal_parameters)
        wanted = definition.add(arms, seeds, _command(grid, seeds, equal_parameters))
        definition.write(directory)
    try:
        runner = _Runner(directory, definition, tasks, base)
        with stop_requests("stopped: what is done is kept, and the same command continues"):
            failures = runner.run([(arm, seed) for seed in seeds for arm in wanted])
    except (Stopped, KeyboardInterrupt):
        _write(directory)
        raise
    results = _write(directory, drawn=not runner.others_go_on)
    if failures:
        raise LinchainError(f"{len(failures)} of {len(results['runs'])} runs failed:\n" + "\n".join(failures))
    return results


def refuse_busy(directory: ComparisonDirectory) -> None:
    """Raises InUse while a run of the comparison is being trained."""
    for lock in sorted(directory.arms_dir.glob(".*.lock")):
        run = lock.with_name(lock.name[1 : -len(".lock")])
        if in_use(run):
            raise InUse(
                f"{run} is being trained by another linchain process; wait for it or stop it before --fresh"
            )


def _command(grid: Grid, seeds: Sequence[int], equal_parameters: bool) -> list[str]:
    flags = ["--seeds", ",".join(map(str, seeds)), *(["--equal-parameters"] if equal_parameters else [])]
    return [*grid.words, *flags]


def with_rates(grid: Grid) -> Grid:
    """The grid with numbers where a learning rate is `auto`: each arm's own, at its alpha and links."""
    recipes = [grid.base, *(arm.recipe for arm in grid.arms)]
    if all(recipe.training.learning_rate != "auto" for recipe in recipes):
        return grid
    directory = locate(grid.base.model.path, grid.base.model.revision, weights=False)
    model = empty_model(directory, recipe_outputs(grid.base))
    arms = tuple(replace(arm, recipe=with_rate(arm.recipe, model)[0]) for arm in grid.arms)
    return replace(grid, base=with_rate(grid.base, model)[0], arms=arms)


def _adjusted(grid: Grid) -> list[Arm]:
    if len({arm.recipe.adapter.rank for arm in grid.arms}) > 1:
        raise InputError("--equal-parameters chooses the ranks itself: do not vary adapter.rank with it")
    model = grid.base.model
    directory = locate(model.path, model.revision, weights=False)
    recipes = with_equal_parameters([arm.recipe for arm in grid.arms], grid.base, directory)
    return [replace(arm, recipe=recipe) for arm, recipe in zip(grid.arms, recipes, strict=True)]


def _refuse_misfits(arms: Sequence[Arm]) -> None:
    """Raises InputError for an arm whose chains do not fit the base, before the others are trained."""
    base = arms[0].recipe
    directory = locate(base.model.path, base.model.revision, weights=False)
    model = empty_model(directory, Outputs.unknown(base.task))
    for arm in arms:
        try:
            put_in_chains(model, arm.recipe)
        except InputError as error:
            raise InputError(f"{arm.name}: {error}") from error
        detach(model)


def _write(directory: ComparisonDirectory, drawn: bool = True) -> dict[str, Any]:
    """Writes what there is now, also of arms that another process added in the meantime. The picture takes
    longer than all else: whoever leaves runs to others leaves it to the last of them, too."""
    with locked(directory.path, _WAIT):
        results = collect(directory, read_definition(directory))
        write(directory, results)
        if drawn:
            comparison_plot(directory, results)
    return results


class _Runner:
    """Trains and evaluates runs; holds the base model from one to the next, while they want the same."""

    def __init__(
        self,
        directory: ComparisonDirectory,
        definition: Definition,
        tasks: Sequence[AskedTask | LabelledTask],
        base: Base | None = None,
    ):
        self.directory, self.definition, self.tasks = directory, definition, tasks
        self.accelerator = Accelerator()
        self._base = base
        self._validation: EncodedRows | None = None
        self._objective: Objective | None = None
        self._straddles: bool | None = None
        self.others_go_on = False  # after `run`: what is left is done by another process
        self._base_section: dict[str, Any] | None = None
        if base is not None:
            self._base_section = definition.base.model.model_dump()
            self._check(base)

    def run(self, wanted: Sequence[tuple[Arm, int]]) -> list[str]:
        """Brings every wanted run to its end; returns what is to be said of those that failed."""
        if self.accelerator.num_processes > 1:
            raise InputError(
                "a comparison runs in one process: start it without torchrun or accelerate launch"
            )
        failures: list[str] = []
        left, base_left = list(enumerate(wanted, 1)), True
        while left or base_left:
            before = len(left), base_left
            left = [one for one in left if not self._attempt(*one, len(wanted), failures)]
            base_left = base_left and not self._attempt_base(failures)
            if (len(left), base_left) == before:
                names = [arm_recipe(*one, self.directory).name for _, one in left]
                names += ["the base's evaluation"] if base_left else []
                note(f"left to other processes that are at them: {', '.join(names)}")
                self.others_go_on = True
                break
        return failures

    def _attempt(self, number: int, one: tuple[Arm, int], count: int, failures: list[str]) -> bool:
        """Brings a run to its end, or its failure into `failures`; False if another process is at it."""
        arm, seed = one
        recipe = arm_recipe(arm, seed, self.directory)
        try:
            self._bring_to_end(recipe, arm, f"run {number} of {count}: {recipe.name}")
        except InUse:
            return False
        except Stopped as stop:
            raise Stopped(
                f"stopped during {recipe.name}, whose state is saved: the same command continues",
                stop.exit_code - 128,
            ) from stop
        except InputError:
            raise
        except LinchainError as error:
            if error.stop_signal:
                message = f"stopped; {recipe.name} had failed before: {error}"
                raise Stopped(message, error.stop_signal) from error
            if not self.directory.exists():  # it was removed: no other run would have a place either
                raise
            failures.append(f"{recipe.name}: {error}")
            note(failures[-1])
        return True

    def _bring_to_end(self, recipe: Recipe, arm: Arm, title: str) -> None:
        run = RunDirectory(recipe.run_path)
        if in_use(run.path):  # before the base model is loaded for it
            raise InUse(str(run.path))
        finished = run.exists() and run.read_status().finished
        if not finished:
            self._train(recipe, arm, run, title)
            shutil.rmtree(run.checkpoints_dir, ignore_errors=True)  # a finished run has no use for them
        if read_halves(run) is None:
            with run.lock():
                self._measure_halves(recipe, run, run.read_status())
        asked = self.definition.base
        if asked.evaluation.tasks and not has_result(run, asked, self.tasks):
            with run.lock():
                note(f"{title}: evaluating")
                self._evaluate(recipe, run)

    def _train(self, recipe: Recipe, arm: Arm, run: RunDirectory, title: str) -> None:
        """Tells the title once the run is this process's: others may begin with the same one."""

        def ours(job: Job) -> None:
            note(title)

        base = self._loaded(recipe)
        unfinished = run.exists()
        collect_memory()  # what the arm before has left is not this one's
        own_peak = reset_peak_memory(self.accelerator.device)
        labels = {"comparison": self.directory.path.name, "arm": arm.name, "own_peak_memory": own_peak}
        try:
            run_training(recipe, resume=unfinished, base=base, ready=ours, labels=labels, brief=True)
        except InUse:
            raise
        except InputError as error:
            if not unfinished and run.exists() and run.read_status().finished:
                return  # another process brought it to its end while this one loaded the base
            if unfinished:
                raise InputError(
                    f"{error}\nOr remove {run.path}: that run then starts over, the others stay."
                ) from None
            raise
        finally:
            detach(base.model)
            if run.exists() and not in_use(run.path):
                with contextlib.suppress(OSError):  # a full disk fails the run, if at all, by what counts
                    loss_plot(run)

    def _measure_halves(self, recipe: Recipe, run: RunDirectory, status: RunStatus) -> None:
        base, rows = self._loaded(recipe), self._validation
        if rows is None or len(rows) < 2:
            return
        attach(base.model, load_adapter(run.adapter_dir))
        try:
            size, tokens = status.micro_batch_size or 1, status.micro_batch_tokens
            found = half_losses(base.model, rows, size, base.pad_id, self._objective, tokens)
            write_record(halves_path(run), found)
        finally:
            detach(base.model)

    def _loaded(self, recipe: Recipe) -> Base:
        """The base model of a recipe, without chains."""
        section = recipe.model.model_dump()
        if self._base is None or section != self._base_section:
            self._base = None
            collect_memory()  # the old one must go before the new one comes
            known = [RunDirectory(path) for path in runs_below(self.directory.arms_dir)]
            self._base = load_base(recipe, self.accelerator, known[0] if known else None)
            self._base_section = section
            self._note_sparse_validation(self._check(self._base))
        return self._base

    def _check(self, base: Base) -> PreparedData:
        """Refuses to add to runs that had other rows or another base."""
        recipe = self.definition.base
        classes = base.outputs and base.outputs.classes
        readable = limits(base.model)
        data = prepare_data(recipe.data, base.tokenizer, readable, task=recipe.task, classes=classes)
        self._validation, self._objective = data.validation, objective_of(settled(recipe, data), data)
        self._straddles = straddle_mostly(data.report.counts())
        now = {"data": data.report.fingerprint, "base": base.hash}
        for path in sorted(self.directory.arms_dir.iterdir()) if self.directory.arms_dir.is_dir() else ():
            run = RunDirectory(path)
            status = run.read_status() if run.exists() else RunStatus(status="running")
            before, known = status.hashes, status.base
            changed = [name for name in now if before.get(name, now[name]) != now[name]]
            config = changed_values(known and known.config, base.config)
            changed += [f"the base's config.json ({change})" for change in config]
            if changed:
                raise InputError(
                    f"{' and '.join(changed)} changed since {path.name} was trained, so new runs could not"
                    " be compared with it: put back what there was, give this comparison another name"
                    " (name=NEW), or use --fresh"
                )
        if base.outputs is not None:
            self.tasks = recipe_labelled(recipe, base.outputs, base.tokenizer, readable)
            return data
        protocol = recipe.evaluation.protocol
        check_questions(base.tokenizer, data.template, own_tasks(self.tasks), protocol, readable)
        return data

    def _note_sparse_validation(self, data: PreparedData) -> None:
        training = self.definition.base.training
        steps = total_steps(training, len(data.train))
        times, every = validations(training, steps, len(data.train)), max(1, steps // 10)
        more = math.ceil(steps / every)
        if times < min(5, more):
            note(
                f"only {times} validation(s) in {steps} steps: the loss curves will be coarse;"
                f" training.eval_every={every} would give {more}"
            )

    def _evaluate(self, recipe: Recipe, run: RunDirectory) -> None:
        base = self._loaded(recipe)
        attach(base.model, load_adapter(run.adapter_dir))
        try:
            evaluate_run(self.definition.base, run, base, self.tasks)
        finally:
            detach(base.model)

    def _attempt_base(self, failures: list[str]) -> bool:
        """Evaluates the base without an adapter, which tells what training has brought, unless that was done;
        False if another process is at it."""
        recipe, place = self.definition.base, self.directory.base_dir
        if recipe.task != "causal" or not self.tasks:
            return True
        try:
            with locked(place):
                if not is_measured(place, None, recipe.evaluation, self.tasks):
                    note(f"evaluating the base without an adapter: {recipe.model.path}")
                    base = self._loaded(recipe)
                    evaluate_base(recipe, base, self.tasks, place, self._straddles)
        except InUse:
            return False
        except (InputError, Stopped):
            raise
        except LinchainError as error:
            failures.append(f"the base: {error}")
            note(failures[-1])
        return True
