"""linchain train"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.options import Json, Overrides, RecipePath
from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.evaluation.asked import AskedTask
    from linchain_cli.evaluation.labels import LabelledTask
    from linchain_cli.evaluation.results import Results
    from linchain_cli.recipe import EvaluationConfig, Recipe
    from linchain_cli.run import RunDirectory
    from linchain_cli.training.job import Job


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a stopped run from its newest checkpoint.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", "--overwrite", help="Replace an existing run directory.")
    ] = False,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Number of processes; left out, one per visible GPU.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Fine-tune a model as a recipe says."""
    if resume and fresh:
        raise InputError("--resume continues the run and --fresh replaces it: give one of them.")
    from linchain_cli.recipe import load_recipe
    from linchain_cli.run import RunDirectory

    loaded = load_recipe(recipe, overrides or ())
    directory = RunDirectory(loaded.run_path)
    if resume:
        _refuse_moved(recipe, overrides or (), directory)
    if not (resume and directory.exists()):
        directory.check_free(replace=fresh)
    from linchain_cli.evaluation.asked import recipe_tasks

    # A misspelt task should be told before hours of training, not after.
    tasks = recipe_tasks(loaded)
    from linchain_cli.training.launch import end_with_launcher, launched, run_processes, wanted_processes

    if not launched() and (processes := wanted_processes(nproc)) > 1:
        raise typer.Exit(run_processes(sys.argv[1:], processes, directory.end_as_failed))
    end_with_launcher()
    _train(loaded, directory, tasks, resume, fresh, json)


def _refuse_moved(recipe: Path, overrides: Sequence[str], directory: RunDirectory) -> None:
    """Raises InputError for the recipe.yaml of a run that was moved or copied, or is named from another
    directory: the run to continue is not where it says, and another one would be begun or continued."""
    from linchain_cli.run import RunDirectory

    place = RunDirectory(recipe.parent)
    if recipe.name != place.recipe_path.name or not place.exists():
        return
    elsewhere = place.path.resolve() != directory.path.resolve()
    if elsewhere and not any(word.startswith(("name=", "output_dir=")) for word in overrides):
        outer = place.path.parent if place.path.name not in ("", "..") else place.path.resolve().parent
        raise InputError(
            f"{recipe} is of a run that lies at {place.path} now, but names {directory.path} as its place."
            f" To continue it where it is: output_dir={shlex.quote(str(outer))}"
            f" name={shlex.quote(place.path.resolve().name)}"
        )


def _train(
    recipe: Recipe,
    directory: RunDirectory,
    tasks: Sequence[AskedTask | LabelledTask],
    resume: bool,
    fresh: bool,
    json: bool,
) -> None:
    from linchain_cli.training.processes import disconnect
    from linchain_cli.training.runner import finished_job, run_training

    def check(job: Job) -> None:
        nonlocal tasks
        tasks = _checked_tasks(job, tasks)

    try:
        job = run_training(recipe, resume=resume, fresh=fresh, ready=check)
    except InputError:
        raise
    except BaseException:
        _plot(directory)
        raise
    if job is not None:
        _plot(directory)
    elif recipe.evaluation.tasks and not _is_evaluated(directory, recipe, tasks):
        job = finished_job(directory)
        check(job)
    if job is not None:
        if tasks:
            _evaluate(job, recipe, tasks, quiet=json)
        if is_first_process() and not json:
            print(f"finished: {directory.path} (adapter in {directory.adapter_dir})")
    if json and is_first_process():
        from linchain_cli.commands.runs import entry_of

        console.print_json({**asdict(entry_of(directory)), "adapter": str(directory.adapter_dir)})
    disconnect()


def _checked_tasks(job: Job, tasks: Sequence[AskedTask | LabelledTask]) -> Sequence[AskedTask | LabelledTask]:
    """Tells what is wrong with the evaluation while nothing is spent. Labelled rows are read here, where the
    classes are known."""
    from linchain_cli.evaluation.asked import own_tasks
    from linchain_cli.evaluation.labels import recipe_labelled
    from linchain_cli.evaluation.questions import check_questions
    from linchain_cli.model.limits import limits

    readable, tokenizer = limits(job.model), job.base.tokenizer
    if job.base.outputs is not None:
        return recipe_labelled(job.recipe, job.base.outputs, tokenizer, readable)
    protocol = job.recipe.evaluation.protocol
    for warning in check_questions(tokenizer, job.data.template, own_tasks(tasks), protocol, readable):
        if is_first_process():
            console.warn(f"evaluation.tasks: {warning}")
    return tasks


def _is_evaluated(directory: RunDirectory, recipe: Recipe, tasks: Sequence[AskedTask | LabelledTask]) -> bool:
    """Whether the run's adapter has been evaluated as the recipe says; the first process looks."""
    from linchain_cli.evaluation.asked import has_result
    from linchain_cli.training.processes import connect, from_main

    accelerator = connect()
    return from_main(accelerator, lambda: has_result(directory, recipe, tasks))


def _plot(directory: RunDirectory) -> None:
    """Draws what was logged. A disk that is full fails the run, if at all, elsewhere."""
    from linchain_cli.report.plots import loss_plot

    if is_first_process() and directory.exists():
        with contextlib.suppress(OSError):
            loss_plot(directory)


def _evaluate(job: Job, recipe: Recipe, tasks: Sequence[AskedTask | LabelledTask], quiet: bool) -> None:
    from linchain_cli.evaluation.show import print_results
    from linchain_cli.training.processes import told_when_lost
    from linchain_cli.training.signals import stop_requests

    left = f"{job.run.path} is finished, its evaluation is not: --resume continues it"
    with told_when_lost(), stop_requests(left):
        results = (_labels if recipe.task != "causal" else _answers)(job, recipe.evaluation, tasks)
    if is_first_process() and not quiet:
        for one in results:
            print_results(one)


def _answers(job: Job, section: EvaluationConfig, tasks: Sequence[AskedTask]) -> list[Results]:
    from linchain_cli.data.asking import straddle_mostly
    from linchain_cli.evaluation.asked import evaluate_asked

    return evaluate_asked(
        job.model,
        job.base.tokenizer,
        job.data.template,
        tasks,
        name=str(job.run.path),
        title="evaluating",
        system=job.recipe.data.chat.system,
        protocol=section.protocol,
        limit=section.limit,
        straddles=straddle_mostly(job.data.report.counts()),
        base_sha256=job.base.hash,
        quantization=job.recipe.model.quantization,
        out=job.run.eval_dir,
        share=not job.base.sharded,
    )


def _labels(job: Job, section: EvaluationConfig, tasks: Sequence[LabelledTask]) -> list[Results]:
    from linchain_cli.chain.files import TENSORS_FILE, adapter_files
    from linchain_cli.evaluation.labels import evaluate_labels
    from linchain_cli.storage import sha256_bytes

    found = evaluate_labels(
        job.model,
        job.base.tokenizer,
        job.base.outputs,
        tasks,
        name=str(job.run.path),
        title="evaluating",
        limit=section.limit,
        base_sha256=job.base.hash,
        adapter_sha256=sha256_bytes(adapter_files(job.adapter())[TENSORS_FILE]),
        out=job.run.eval_dir,
    )
    return [found]
