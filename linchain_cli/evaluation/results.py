"""What an evaluation found: the scores, the prediction rows, their files, and the comparison of two."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from linchain_cli import storage
from linchain_cli.data.agreement import difference
from linchain_cli.errors import InputError
from linchain_cli.evaluation.statistics import (
    Paired,
    holm,
    macro_average,
    normal_interval,
    pair,
    standard_error,
    wilson_interval,
)
from linchain_cli.evaluation.task import Task
from linchain_cli.recipe.schema import METRICS
from linchain_cli.result_files import Evaluation, Metric, TaskScore, read_evaluation, template_label
from linchain_cli.run import jsonl_bytes, now

NEAR_TIE = 1e-4
# What labelled rows are measured by, beside the accuracy.
LABEL_METRICS = {name for names in METRICS.values() for name in names} - {"accuracy"}
# In what two results that are compared may differ unnoticed.
COMPARED = ("protocol", "beams", "normalise", "dtype", "quantization")

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """`summary` is what the result file holds; `predictions` are its rows, by task and row; `path` is where
    it was written, if it was; `known` are the tasks that had been measured before.
    """

    summary: Evaluation
    predictions: list[Prediction]
    path: Path | None = None
    known: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        """The rows at `<name>.predictions.jsonl`, then the summary at `path` beside them, so that a summary's
        rows are always there.
        """
        storage.make_directory(path.parent)
        storage.write_atomic(predictions_path(path), jsonl_bytes(self.predictions))
        storage.write_json(path, self.summary.to_json())

    def of_tasks(self, names: Iterable[str]) -> Results:
        """The part that is about these tasks, with their own average, in their order."""
        scores = {name: self.summary.tasks[name] for name in names}
        rows = {name: [row for row in self.predictions if row["task"] == name] for name in scores}
        return replace(
            self,
            summary=averaged(self.summary.model_copy(update={"tasks": scores})),
            predictions=[row for own in rows.values() for row in own],
        )

    def with_tasks_of(self, other: Results) -> Results:
        """These results and the tasks of `other` that are not among them, as one."""
        new = {name: score for name, score in other.summary.tasks.items() if name not in self.summary.tasks}
        summary = self.summary.model_copy(update={"tasks": {**self.summary.tasks, **new}})
        rows = [row for row in other.predictions if row["task"] in new]
        return replace(self, summary=averaged(summary), predictions=[*self.predictions, *rows])


def read_results(path: Path) -> Results:
    """What `Results.write` left at `path`.

    Raises:
        InputError: it is no result, or its predictions are not beside it.
    """
    summary = read_evaluation(path)
    try:
        # A line ends with a line feed alone: predictions may hold U+2028 and its like.
        lines = predictions_path(path).read_bytes().split(b"\n")
        predictions = [json.loads(line) for line in lines if line]
    except OSError as error:
        raise InputError(f"{path}: cannot read this result: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{predictions_path(path)}: these predictions are damaged: {error}") from error
    rows = [row for row in predictions if isinstance(row, dict) and row.get("task") in summary.tasks]
    counts = Counter(row["task"] for row in rows)
    if any(score.n is not None and counts[name] != score.n for name, score in summary.tasks.items()):
        raise InputError(
            f"{path}: this is no result of linchain eval, or {predictions_path(path).name} beside it is not"
            " of the same evaluation"
        )
    return Results(summary, rows, path)


def predictions_path(path: Path) -> Path:
    """Where the prediction rows of the result file `path` lie."""
    return path.with_name(f"{path.stem}.predictions.jsonl")


def summarise(
    tasks: Sequence[Task],
    predictions: Sequence[Prediction],
    setting: Evaluation,
    fingerprints: Mapping[str, str] | None = None,
) -> Results:
    """Accuracies with standard errors and intervals, per task and on average.

    `predictions` may come in any order; there is one for each row of each task. `fingerprints` are those of
    the tasks.
    """
    by_task: dict[str, dict[int, Prediction]] = {task.name: {} for task in tasks}
    for prediction in predictions:
        by_task[prediction["task"]][prediction["index"]] = prediction
    rows = [by_task[task.name][row.index] for task in tasks for row in task.rows]
    scores = {
        task.name: _task_score(
            task, [by_task[task.name][row.index] for row in task.rows], (fingerprints or {}).get(task.name)
        ).model_copy(update={"template": _own_template(task, setting)})
        for task in tasks
    }
    return Results(averaged(setting.model_copy(update={"tasks": scores})), rows)


def averaged(evaluation: Evaluation) -> Evaluation:
    """The evaluation with the unweighted average of its tasks' accuracies."""
    scores = [
        score for score in evaluation.tasks.values() if score.accuracy is not None and not score.is_group
    ]
    if not scores:
        update = dict.fromkeys(("average", "average_stderr", "average_interval"))
        return evaluation.model_copy(update=update)
    average, error = macro_average([s.accuracy for s in scores], [s.stderr for s in scores])
    update = {
        "average": average,
        "average_stderr": error,
        "average_interval": normal_interval(average, error, 0.0, 1.0),
    }
    return evaluation.model_copy(update=update)


def fingerprint(setting: Evaluation, task: Task, template_sha256: str) -> str:
    """Changes with anything that could change a prediction of the task: the setting, its rows and how their
    answers are read, and the template that it brings or is given.
    """
    return storage.sha256_bytes(
        json.dumps([setting.setting_sha256, task.fingerprint, template_sha256]).encode()
    )


def _own_template(task: Task, setting: Evaluation) -> str | None:
    """What a result calls the template that the task brings; None where it is the setting's."""
    own = task.template if isinstance(task.template, str | None) else "of its own"
    return None if own == setting.template else own


def _task_score(task: Task, rows: Sequence[Prediction], fingerprint: str | None) -> TaskScore:
    common = {
        "n": len(rows),
        "source": task.source,
        "rows_sha256": task.fingerprint,
        "fingerprint": fingerprint,
        "measured_at": now(),
    }
    if task.rule.kind == "loss":
        return TaskScore(metrics=_losses(rows), **common)
    n, correct = len(rows), sum(row["correct"] for row in rows)
    scored = all("scores" in row for row in rows)
    readings = rows[0].get("readings", {})
    return TaskScore(
        accuracy=correct / n,
        stderr=standard_error(correct, n),
        interval=wilson_interval(correct, n),
        unparsable=sum(row["prediction"] is None for row in rows),
        near_ties=sum(_margin(row["scores"]) < NEAR_TIE for row in rows) if scored else None,
        majority=task.majority,
        metrics={name: _share([row["readings"][name]["correct"] for row in rows]) for name in readings},
        **common,
    )


def _share(correct: Sequence[bool]) -> Metric:
    n, right = len(correct), sum(correct)
    return Metric(value=right / n, stderr=standard_error(right, n), interval=wilson_interval(right, n))


def _losses(rows: Sequence[Prediction]) -> dict[str, Metric]:
    """The mean over all supervised tokens, with a ratio's standard error over rows, and its exponential."""
    tokens = sum(row["tokens"] for row in rows)
    loss = sum(row["loss"] * row["tokens"] for row in rows) / tokens
    error = None
    if len(rows) > 1:
        squares = sum((row["tokens"] * (row["loss"] - loss)) ** 2 for row in rows)
        error = math.sqrt(squares * len(rows) / (len(rows) - 1)) / tokens
    perplexity = math.exp(min(loss, 700.0))
    return {
        "loss": Metric(value=loss, stderr=error, is_share=False),
        "perplexity": Metric(
            value=perplexity, stderr=None if error is None else perplexity * error, is_share=False
        ),
    }


def _margin(scores: Mapping[str, float]) -> float:
    """How far the best option lies before the second."""
    best, second = sorted(scores.values(), reverse=True)[:2]
    return best - second


def setting_differences(first: Evaluation, second: Evaluation) -> list[str]:
    """In what the two were evaluated differently, one sentence each: `dtype: float32 and bfloat16`."""
    differences = [
        f"{key}: {getattr(first, key)} and {getattr(second, key)}"
        for key in COMPARED
        if getattr(first, key) != getattr(second, key)
    ]
    hashes = first.template_sha256, second.template_sha256
    if all(score.template for score in first.tasks.values()):
        pass  # both were asked through what the tasks bring
    elif first.template != second.template:
        differences.insert(0, f"template: {template_label(first)} and {template_label(second)}")
    elif None not in hashes and hashes[0] != hashes[1]:
        differences.insert(0, f"template: {first.template} {hashes[0][:8]} and {hashes[1][:8]}")
    return differences


def is_comparable(score: TaskScore) -> bool:
    """Whether two models can be compared by a task: by right and wrong answers, or by labels that were
    told."""
    return score.accuracy is not None or not LABEL_METRICS.isdisjoint(score.metrics)


def compare(first: Results, second: Results) -> dict[str, Any]:
    """The paired differences (first minus second) per task with right and wrong answers, over all their rows,
    and their macro average.

    Each task has McNemar's p, and beside it Holm's of all tasks: of eight tests one is below 0.05 by chance
    in a third of the comparisons of equal models.

    Raises:
        InputError: the two did not answer the same rows, or no task has right and wrong answers.
    """
    answers = [
        {(row["task"], row["index"]): row.get("correct") for row in results.predictions}
        for results in (first, second)
    ]
    if answers[0].keys() != answers[1].keys() or _rows_hashes(first) != _rows_hashes(second):
        raise InputError("the two results are not of the same rows, so they cannot be compared")
    tasks: dict[str, Paired] = {}
    for name, score in first.summary.tasks.items():
        if score.accuracy is None or score.is_group:
            continue
        keys = [key for key in answers[0] if key[0] == name]
        tasks[name] = pair([answers[0][key] for key in keys], [answers[1][key] for key in keys])
    metrics = _metric_differences(first, second)
    about = {
        "model": second.summary.model,
        "adapter_sha256": second.summary.adapter_sha256,
        "base_sha256": second.summary.base_sha256,
        "differences_in_settings": setting_differences(first.summary, second.summary),
        **({"metrics": metrics} if metrics else {}),
    }
    if not tasks and metrics:
        return {**about, "tasks": {}}
    if not tasks:
        raise InputError("no task of the two has right and wrong answers, so there is nothing to pair")
    average, error = macro_average([p.difference for p in tasks.values()], [p.error for p in tasks.values()])
    pooled = Paired(*(sum(getattr(p, part) for p in tasks.values()) for part in ("n", "gained", "lost")))
    adjusted = holm([paired.p_value for paired in tasks.values()])
    return {
        **about,
        "tasks": {
            name: _paired_entry(paired) | {"p_holm": p}
            for (name, paired), p in zip(tasks.items(), adjusted, strict=True)
        },
        "all_rows": _paired_entry(pooled),
        "average_difference": average,
        "average_interval": normal_interval(average, error, -1.0, 1.0),
    }


def _metric_differences(first: Results, second: Results) -> dict[str, dict[str, Any]]:
    """First minus second of what labelled rows were measured by beside the accuracy, by task and measure, on
    the same rows in every resample."""
    found: dict[str, dict[str, Any]] = {}
    for task, score in first.summary.tasks.items():
        names = [name for name in score.metrics if name in LABEL_METRICS]
        if not names:
            continue
        ours, theirs = ([row for row in one.predictions if row["task"] == task] for one in (first, second))
        scores = ours[0].get("scores", {})
        targets, mine = label_arrays(tuple(scores), ours)
        _, others = label_arrays(tuple(scores), theirs)
        for name in names:
            one = difference(name, targets, mine, others, len(scores))
            found.setdefault(task, {})[name] = {"difference": one.value, "interval": one.interval}
    return found


def label_arrays(classes: Sequence[str], rows: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """(answers, predictions) of prediction rows, each (rows,): numbers, or the classes' numbers."""
    columns = ([row[key] for row in rows] for key in ("answer", "prediction"))
    if not classes:
        return tuple(np.array(column, dtype=np.float64) for column in columns)
    numbers = {name: number for number, name in enumerate(classes)}
    return tuple(np.array([numbers[name] for name in column]) for column in columns)


def refuse_other_rows(result: Results, tasks: Sequence[Task], path: Path) -> None:
    """Raises InputError unless the result at `path` has exactly these tasks' rows, perhaps among others."""
    found, wanted = _rows_hashes(result), {task.name: task.fingerprint for task in tasks}
    if not found.keys() >= wanted.keys():
        raise InputError(
            f"{path} is of other tasks ({', '.join(found)} instead of {', '.join(wanted)}):"
            " there is nothing to compare"
        )
    counts = [
        f"{task.name}: {result.summary.tasks[task.name].n} rows there, {len(task.rows)} here"
        for task in tasks
        if found[task.name] != task.fingerprint
    ]
    if counts:
        raise InputError(
            f"{path} is of other rows ({'; '.join(counts)}): take the same --limit and test files"
        )


def _rows_hashes(results: Results) -> dict[str, str | None]:
    return {name: score.rows_sha256 for name, score in results.summary.tasks.items()}


def _paired_entry(paired: Paired) -> dict[str, Any]:
    return {
        "difference": paired.difference,
        "interval": paired.interval,
        "p": paired.p_value,
        "gained": paired.gained,
        "lost": paired.lost,
        "n": paired.n,
    }
