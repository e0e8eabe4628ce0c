"""What an evaluation found: the summary, the prediction rows, their files, and the comparison of two."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linchain_cli import storage
from linchain_cli.errors import InputError
from linchain_cli.evaluation.statistics import (
    Paired,
    macro_average,
    normal_interval,
    pair,
    standard_error,
    wilson_interval,
)
from linchain_cli.evaluation.task import Task

NEAR_TIE = 1e-4
SETTINGS = ("protocol", "beams", "template", "dtype", "quantization")

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """`summary` is what the result file holds; `predictions` are its rows, by task and row."""

    summary: dict[str, Any]
    predictions: list[Prediction]

    def write(self, path: Path) -> None:
        """The summary at `path`, the rows at `<name>.predictions.jsonl` beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in self.predictions)
        storage.write_atomic(predictions_path(path), "".join(lines))
        storage.write_json(path, self.summary)


def read_results(path: Path) -> Results:
    """What `Results.write` left at `path`.

    Raises:
        InputError: it is no result, or its predictions are not beside it.
    """
    try:
        summary = json.loads(path.read_bytes())
        lines = predictions_path(path).read_text(encoding="utf-8").splitlines()
        predictions = [json.loads(line) for line in lines]
    except OSError as error:
        raise InputError(f"{path}: cannot read this result: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: this is no result of linchain eval, or a damaged one: {error}") from error
    counts = Counter(row.get("task") if isinstance(row, dict) else None for row in predictions)
    tasks = summary.get("tasks") if isinstance(summary, dict) else None
    if not isinstance(tasks, dict) or counts != {name: entry.get("n") for name, entry in tasks.items()}:
        raise InputError(
            f"{path}: this is no result of linchain eval, or {predictions_path(path).name} beside it is not"
            " of the same evaluation"
        )
    return Results(summary, predictions)


def predictions_path(path: Path) -> Path:
    """Where the prediction rows of the result file `path` lie."""
    return path.with_name(f"{path.stem}.predictions.jsonl")


def summarise(
    tasks: Sequence[Task], predictions: Sequence[Prediction], settings: Mapping[str, Any]
) -> Results:
    """Accuracies with standard errors and intervals, per task and on average.

    `predictions` may come in any order; there is one for each row of each task.
    """
    by_task: dict[str, dict[int, Prediction]] = {task.name: {} for task in tasks}
    for prediction in predictions:
        by_task[prediction["task"]][prediction["index"]] = prediction
    rows = [by_task[task.name][row.index] for task in tasks for row in task.rows]
    entries = {
        task.name: _task_entry(task, [by_task[task.name][row.index] for row in task.rows]) for task in tasks
    }
    accuracies = [entry["accuracy"] for entry in entries.values()]
    average, error = macro_average(accuracies, [entry["stderr"] for entry in entries.values()])
    summary = {
        **settings,
        "tasks": entries,
        "average": average,
        "average_stderr": error,
        "average_interval": normal_interval(average, error),
    }
    return Results(summary, rows)


def _task_entry(task: Task, rows: Sequence[Prediction]) -> dict[str, Any]:
    n, correct = len(rows), sum(row["correct"] for row in rows)
    entry = {
        "accuracy": correct / n,
        "stderr": standard_error(correct, n),
        "interval": wilson_interval(correct, n),
        "n": n,
        "unparsable": sum(row["prediction"] is None for row in rows),
        "majority": task.majority,
        "source": task.source,
        "rows_sha256": task.fingerprint,
    }
    if all("scores" in row for row in rows):
        entry["near_ties"] = sum(_margin(row["scores"]) < NEAR_TIE for row in rows)
    return entry


def _margin(scores: Mapping[str, float]) -> float:
    """How far the best option lies before the second."""
    best, second = sorted(scores.values(), reverse=True)[:2]
    return best - second


def setting_differences(first: Results, second: Results) -> list[str]:
    """In what the two were evaluated differently, one sentence each: `dtype: float32 and bfloat16`."""
    return [
        f"{key}: {first.summary.get(key)} and {second.summary.get(key)}"
        for key in SETTINGS
        if first.summary.get(key) != second.summary.get(key)
    ]


def compare(first: Results, second: Results) -> dict[str, Any]:
    """The paired differences (first minus second) per task, over all rows, and their macro average.

    Raises:
        InputError: the two did not answer the same rows.
    """
    answers = [
        {(row["task"], row["index"]): row["correct"] for row in results.predictions}
        for results in (first, second)
    ]
    if answers[0].keys() != answers[1].keys() or _rows_hashes(first) != _rows_hashes(second):
        raise InputError("the two results are not of the same rows, so they cannot be compared")
    tasks: dict[str, Paired] = {}
    for name in first.summary["tasks"]:
        keys = [key for key in answers[0] if key[0] == name]
        tasks[name] = pair([answers[0][key] for key in keys], [answers[1][key] for key in keys])
    average, error = macro_average([p.difference for p in tasks.values()], [p.error for p in tasks.values()])
    pooled = Paired(*(sum(getattr(p, part) for p in tasks.values()) for part in ("n", "gained", "lost")))
    return {
        "model": second.summary["model"],
        "differences_in_settings": setting_differences(first, second),
        "tasks": {name: _paired_entry(paired) for name, paired in tasks.items()},
        "all_rows": _paired_entry(pooled),
        "average_difference": average,
        "average_interval": normal_interval(average, error),
    }


def refuse_other_rows(result: Results, tasks: Sequence[Task], path: Path) -> None:
    """Raises InputError unless the result at `path` is of exactly the rows of these tasks."""
    found, wanted = _rows_hashes(result), {task.name: task.fingerprint for task in tasks}
    if found == wanted:
        return
    if found.keys() != wanted.keys():
        raise InputError(
            f"{path} is of other tasks ({', '.join(found)} instead of {', '.join(wanted)}):"
            " there is nothing to compare"
        )
    counts = [
        f"{task.name}: {result.summary['tasks'][task.name]['n']} rows there, {len(task.rows)} here"
        for task in tasks
        if found[task.name] != task.fingerprint
    ]
    raise InputError(f"{path} is of other rows ({'; '.join(counts)}): take the same --limit and test files")


def _rows_hashes(results: Results) -> dict[str, str]:
    return {name: entry.get("rows_sha256") for name, entry in results.summary["tasks"].items()}


def _paired_entry(paired: Paired) -> dict[str, Any]:
    return {
        "difference": paired.difference,
        "interval": paired.interval,
        "p": paired.p_value,
        "gained": paired.gained,
        "lost": paired.lost,
        "n": paired.n,
    }
