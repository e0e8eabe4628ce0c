"""Accuracies of a comparison's arms by task, with intervals over seeds and rows, beside the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from linchain_cli.chain.files import adapter_hash
from linchain_cli.comparison.statistics import t_quantile
from linchain_cli.comparison.tables import Candidate, reference_of
from linchain_cli.evaluation.asked import asked_results
from linchain_cli.evaluation.results import read_results
from linchain_cli.evaluation.statistics import crossed
from linchain_cli.evaluation.store import stored_result
from linchain_cli.recipe import Recipe
from linchain_cli.result_files import TaskScore
from linchain_cli.run import ComparisonDirectory, RunDirectory

AVERAGE = "average"


@dataclass(frozen=True)
class _Answered:
    """A model's scores, and by task where its answers were right, (rows,) of 0.0 and 1.0."""

    scores: Mapping[str, TaskScore]
    right: Mapping[str, np.ndarray]

    def score(self, task: str) -> TaskScore:
        return self.scores[task]


def accuracy_table(
    directory: ComparisonDirectory, recipe: Recipe, chosen: Sequence[Candidate]
) -> list[dict[str, Any]]:
    """A line per task and arm, then one per arm for the unweighted average of the tasks; none where the
    comparison's `recipe` names no tasks with right and wrong answers, or nothing is evaluated yet.

    Each has the accuracy and its differences to the base without an adapter and to the arm's reference,
    paired by row and seed, with 95 % intervals that cover other seeds and other rows (see `crossed`). None
    stands for what there is no evaluation of on the same rows.
    """
    if recipe.task != "causal" or not recipe.evaluation.tasks:
        return []
    arms = [(one, by_seed) for one in chosen if (by_seed := _by_seed(directory, recipe, one))]
    base = _answered(directory.base_dir, None, recipe)
    names = list(dict.fromkeys(name for _, by_seed in arms for one in by_seed.values() for name in one.right))
    lines = []
    for name in [*names, *([AVERAGE] if len(names) > 1 else [])]:
        tasks = names if name == AVERAGE else [name]
        whole = {
            one.arm.name: (one, by_seed)
            for one, by_seed in arms
            if all(task in answered.right for task in tasks for answered in by_seed.values())
        }
        for one, by_seed in whole.values():
            reference = reference_of(one, [other for other, _ in whole.values()])
            others = whole[reference.arm.name][1] if reference is not one else {}
            scores = [answered.score(task) for task in tasks for answered in by_seed.values()]
            unread = [score.unparsable for score in scores]
            lines.append(
                {
                    "task": name,
                    "rows": sum(score.n for score in scores) // len(by_seed),
                    "arm": one.arm.name,
                    "label": one.label,
                    "learning_rate": one.rate,
                    "seeds": sorted(by_seed),
                    "accuracy": _estimate(by_seed, {}, tasks),
                    "base": _mean(base, tasks),
                    "minus_base": base and _estimate(by_seed, dict.fromkeys(by_seed, base), tasks),
                    "reference": reference.label,
                    "minus_reference": _estimate(by_seed, others, tasks) if others else None,
                    "majority": scores[0].majority if name != AVERAGE else None,
                    "without_answer": None if None in unread else sum(unread) / len(by_seed),
                }
            )
    return lines


def _by_seed(directory: ComparisonDirectory, recipe: Recipe, one: Candidate) -> dict[int, _Answered]:
    """The evaluations of an arm's runs, by seed."""
    found = {}
    for seed, measured in sorted(one.runs.items()):
        run = RunDirectory(directory.path / measured.directory)
        found[seed] = _answered(run.eval_dir, adapter_hash(run.adapter_dir), recipe)
    return {seed: answered for seed, answered in found.items() if answered is not None}


def _answered(place: Path, adapter_sha256: str | None, recipe: Recipe) -> _Answered | None:
    scores, right = {}, {}
    for protocol, wanted in asked_results(recipe.evaluation).items():
        found = stored_result(place, adapter_sha256, recipe.evaluation, wanted or (), protocol)
        if found is None:
            continue
        results = read_results(found.path)
        for name, score in results.summary.tasks.items():
            correct = [row.get("correct") for row in results.predictions if row["task"] == name]
            whole = score.accuracy is not None and not score.is_group and None not in correct
            if whole and (wanted is None or name in wanted):
                scores[name], right[name] = score, np.array(correct, dtype=float)
    return _Answered(scores, right) if right else None


def _estimate(
    by_seed: Mapping[int, _Answered], others: Mapping[int, _Answered], tasks: Sequence[str]
) -> dict[str, Any] | None:
    """Mean and interval of the accuracies, less those of `others` of the same seed where there are others. Of
    rows that all scored the same there is no interval: they do not say how others would vary."""
    first = next(iter(by_seed.values()))
    seeds = [seed for seed, one in by_seed.items() if _same_rows(first, one, tasks)]
    if others:
        seeds = [seed for seed in seeds if _same_rows(first, others.get(seed), tasks)]
    if not seeds:
        return None

    def table(task: str) -> np.ndarray:
        own = np.stack([by_seed[seed].right[task] for seed in seeds])
        return own - np.stack([others[seed].right[task] for seed in seeds]) if others else own

    tables = [table(task) for task in tasks]
    found = crossed(tables)
    bounds = None
    if found.error:
        half = t_quantile(max(1.0, found.df)) * found.error
        lowest = -1.0 if others else 0.0
        bounds = [max(lowest, found.mean - half), min(1.0, found.mean + half)]
    return {"mean": found.mean, "interval": bounds, "n": len(seeds)}


def _same_rows(one: _Answered, other: _Answered | None, tasks: Sequence[str]) -> bool:
    return other is not None and all(
        task in other.right and one.score(task).rows_sha256 == other.score(task).rows_sha256 for task in tasks
    )


def _mean(answered: _Answered | None, tasks: Sequence[str]) -> float | None:
    if answered is None or not all(task in answered.right for task in tasks):
        return None
    return fmean(answered.right[task].mean() for task in tasks)
