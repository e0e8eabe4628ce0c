"""What the runs that are done come to, in lines of Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from linchain_cli.data.agreement import resampled

from .plan import ARMS, MAIN, REFERENCE, Cell, Plan

Done = Mapping[str, Mapping[str, Any]]
_PERCENT = (2.5, 97.5)


def tables(plan: Plan, done: Done) -> list[str]:
    lines: list[str] = []
    for study in plan.studies:
        for task in plan.tasks:
            lines += (_few if study == "few" else _all)(plan, task, done)
    return lines


def _final(plan: Plan, cell: Cell, done: Done) -> tuple[float | None, list[Mapping[str, Any]]]:
    """A cell's rate and its reported runs that ended well, by seed."""
    rate = plan.best_rate(cell, done)
    if rate is None:
        return None, []
    rows = [done.get(run.name) for run in plan.final_runs(cell, rate)]
    return rate, [row for row in rows if row is not None and "failed" not in row]


def _rate(plan: Plan, cell: Cell, rate: float) -> str:
    """Marked where it was chosen, and a rate beyond those tried might be better."""
    edges = (min(cell.settings.rates), max(cell.settings.rates))
    return f"{rate:g}" + ("*" if plan.rate is None and rate in edges else "")


def _values(cell: Cell, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [100 * row["scores"][MAIN[cell.task]] for row in rows]


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _interval(low: float, high: float) -> str:
    return f"{low:+.1f} to {high:+.1f}"


def _all(plan: Plan, task: str, done: Done) -> list[str]:
    """The arms on all rows: mean and spread over seeds, and the bootstrap's interval of the difference from
    the first arm, over the development set's rows, the same for both."""
    lines = [
        "",
        f"| {task}: {MAIN[task]} on dev | best rate | mean ± sd | 95 % | per seed"
        f" | less {REFERENCE['all']}, 95 % | trained | seconds per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    _, reference = _final(plan, Cell("all", task, 0, REFERENCE["all"]), done)
    for cell in plan.cells():
        if (cell.study, cell.task) != ("all", task):
            continue
        rate, rows = _final(plan, cell, done)
        if rate is None or not rows:
            continue
        values, drawn = _values(cell, rows), _drawn(cell, rows, reference)
        low, high = np.percentile(drawn[0], _PERCENT)
        other = "" if drawn[1] is None else _interval(*np.percentile(drawn[0] - drawn[1], _PERCENT))
        seconds = statistics.fmean(row["train_seconds"] for row in rows)
        own = ", ".join(f"{value:.1f}" for value in values)
        lines.append(
            f"| {cell.arm} | {_rate(plan, cell, rate)} | {_spread(values)} | {low:.1f} to {high:.1f} | {own}"
            f" | {other if cell.arm != REFERENCE['all'] else ''} | {rows[0]['trained']:,} | {seconds:.1f} |"
        )
    return lines if len(lines) > 3 else []


def _drawn(
    cell: Cell, rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean over seeds, times 100, in draws of the told rows, for these runs and the reference's."""
    columns = [np.array([int(digit) for digit in row["told"]]) for row in [*rows, *reference]]
    targets = np.array([int(digit) for digit in rows[0]["targets"]])
    drawn = [100 * each for each in resampled(MAIN[cell.task], [targets, *columns], 2)]
    own, theirs = drawn[: len(rows)], drawn[len(rows) :]
    return np.mean(own, axis=0), np.mean(theirs, axis=0) if theirs else None


def _few(plan: Plan, task: str, done: Done) -> list[str]:
    """The arms on few rows: mean, spread and rate, and below that the difference from depth 0 on the same
    rows, seed by seed, with Student's interval."""
    sizes = list(plan.few_rows)
    head = [f"| {task}: {MAIN[task]} on dev | " + " | ".join(f"{rows:,} rows" for rows in sizes) + " |"]
    head.append("|---" * (len(sizes) + 1) + "|")
    values, differences = list(head), [head[0].replace(" on dev", f", less {REFERENCE['few']}"), head[1]]
    seeds: set[int] = set()
    for arm in (arm for arm in ARMS["few"] if not plan.arms or arm in plan.arms):
        cells = [Cell("few", task, rows, arm) for rows in sizes]
        shown, less = [], []
        for cell in cells:
            rate, rows = _final(plan, cell, done)
            told = rate and rows
            shown.append(f"{_spread(_values(cell, rows))} ({_rate(plan, cell, rate)})" if told else "")
            seeds |= {len(rows)}
            _, theirs = _final(plan, Cell("few", task, cell.rows, REFERENCE["few"]), done)
            less.append(_paired(cell, rows, theirs))
        values.append(f"| {arm} | " + " | ".join(shown) + " |")
        if arm != REFERENCE["few"]:
            differences.append(f"| {arm} | " + " | ".join(less) + " |")
    if seeds <= {0}:
        return []
    count = f"{min(seeds)} to {max(seeds)}" if len(seeds) > 1 else f"{max(seeds)}"
    return ["", *values, "", *differences, "", f"{task}: {count} seeds each."]


def _paired(cell: Cell, rows: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    ours, other = (
        {row["seed"]: value for row, value in zip(found, _values(cell, found), strict=True)}
        for found in (rows, theirs)
    )
    gaps = [ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())]
    if len(gaps) < 2:
        return ""
    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5
    width = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    return f"{mean:+.1f} ({_interval(mean - width, mean + width)})"
