"""What a model is asked: tasks of ours and of lm-evaluation-harness, by the names that a recipe or a command
line has for them; evaluated in one go, each kind into a result of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from linchain_cli.chain.files import adapter_hash
from linchain_cli.console import Progress, is_first_process
from linchain_cli.data.rows import Template
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.harness import PROTOCOL, HarnessTask, evaluate_harness, load_harness, split_names
from linchain_cli.evaluation.results import Results
from linchain_cli.evaluation.store import run_result, stored_result
from linchain_cli.evaluation.task import Task, check_protocol
from linchain_cli.evaluation.tasks import SPECS, expand_tasks, load_tasks
from linchain_cli.recipe import EvaluationConfig, Recipe
from linchain_cli.run import RunDirectory

AskedTask = Task | HarnessTask


def load_asked(
    names: Sequence[str], data_dir: Path | str | None = None, limit: int | None = None
) -> list[AskedTask]:
    """The named tasks, ours first, each cut to its first `limit` rows.

    Raises:
        InputError: as `load_tasks` and `load_harness`; or no task is named.
    """
    own, theirs = split_names(names)
    found: list[AskedTask] = []
    if own or not theirs:
        found += load_tasks(own, data_dir, limit)
    if theirs:
        found += load_harness(theirs)
    return found


def recipe_tasks(recipe: Recipe) -> list[AskedTask]:
    """The tasks that a recipe's run is evaluated on. A classifier's labelled rows are none of them: they are
    read when its classes are known, and here only looked for.

    Raises:
        InputError: as `load_asked`.
    """
    section = recipe.evaluation
    if recipe.task != "causal":
        from linchain_cli.evaluation.labels import find_labelled

        find_labelled(recipe)
    if recipe.task != "causal" or not section.tasks:
        return []
    for name in own_names(section):
        if spec := SPECS.get(name):  # before its rows are asked for, which may take a while
            check_protocol(name, spec.rule, section.protocol)
    return load_asked(section.tasks, section.data_dir, section.limit)


def own_names(section: EvaluationConfig) -> list[str]:
    """The tasks of ours that a recipe names, its groups replaced by their tasks.

    Raises:
        InputError: there is no such task.
    """
    own, theirs = split_names(section.tasks)
    return expand_tasks(own) if own or not theirs else []


def own_tasks(tasks: Iterable[AskedTask]) -> list[Task]:
    """Those of ours."""
    return [task for task in tasks if isinstance(task, Task)]


def harness_tasks(tasks: Iterable[AskedTask]) -> list[HarnessTask]:
    """Those of lm-evaluation-harness."""
    return [task for task in tasks if isinstance(task, HarnessTask)]


def evaluate_asked(
    model: Any,
    tokenizer: Any,
    template: Template,
    tasks: Sequence[AskedTask],
    *,
    name: str,
    title: str,
    system: str | None = None,
    limit: int | None = None,
    base_sha256: str | None = None,
    quantization: str = "none",
    out: Path | None = None,
    share: bool = True,
    **answers: Any,
) -> list[Results]:
    """Evaluates a loaded model on tasks of both kinds; arguments and errors are those of `evaluate`, which
    `answers` are for alone, and of `evaluate_harness`.

    Args:
        title: what progress is called.

    Returns:
        The result of our tasks and that of the harness's, where there are any.
    """
    own, theirs = own_tasks(tasks), harness_tasks(tasks)
    common = {
        "name": name,
        "limit": limit,
        "base_sha256": base_sha256,
        "quantization": quantization,
        "out": out,
        "share": share,
    }
    found = []
    if own:
        with Progress(quiet=not is_first_process()) as progress:

            def show(task: str, done: int, total: int) -> None:
                progress.show(title, done, total, task)

            found.append(evaluate(model, tokenizer, template, own, **common, **answers, on_progress=show))
    if theirs:  # which draws bars itself
        found.append(evaluate_harness(model, tokenizer, template, theirs, system=system, **common))
    return found


def asked_results(section: EvaluationConfig) -> dict[str, list[str] | None]:
    """The protocols whose results answer a recipe of text, each with the names of its tasks; None where it
    names none, or only files or the harness have them."""
    own, theirs = split_names(section.tasks)
    found: dict[str, list[str] | None] = {}
    if own or not theirs:
        # The name of a task of the user's own stands in its file, which need not be there any more.
        in_files = any(name.endswith((".yaml", ".yml")) for name in own)
        found[section.protocol] = expand_tasks(own) if own and not in_files else None
    if theirs:
        found[PROTOCOL] = None
    return found


def is_measured(
    place: Path, adapter_sha256: str | None, section: EvaluationConfig, tasks: Sequence[AskedTask]
) -> bool:
    """Whether the directory `place` has results of exactly these tasks' rows: of that adapter, or of a model
    without one."""
    theirs: dict[str, str] = {}
    for task in harness_tasks(tasks):
        theirs |= task.rows(section.limit)
    wanted = {section.protocol: {task.name: task.fingerprint for task in own_tasks(tasks)}, PROTOCOL: theirs}
    return all(
        _has(place, adapter_sha256, section, protocol, rows) for protocol, rows in wanted.items() if rows
    )


def _has(
    place: Path,
    adapter_sha256: str | None,
    section: EvaluationConfig,
    protocol: str,
    rows: Mapping[str, str],
) -> bool:
    found = stored_result(place, adapter_sha256, section, rows, protocol)
    scores = found.evaluation.tasks if found else {}
    return all(name in scores and scores[name].rows_sha256 == own for name, own in rows.items())


def has_result(run: RunDirectory, recipe: Recipe, tasks: Sequence[AskedTask]) -> bool:
    """Whether the run's adapter has results of exactly these tasks' rows; a classifier's, of rows of the
    recipe's names."""
    section = recipe.evaluation
    if recipe.task != "causal":
        return run_result(run, section, section.tasks, recipe.evaluated_by) is not None
    return is_measured(run.eval_dir, adapter_hash(run.adapter_dir), section, tasks)
