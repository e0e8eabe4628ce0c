"""What a comparison found: results.json, its tables as CSV, and as lines for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from linchain_cli import storage
from linchain_cli.comparison.accuracy import accuracy_table
from linchain_cli.comparison.definition import Definition, arm_recipe
from linchain_cli.comparison.measure import Measurement, measure
from linchain_cli.comparison.statistics import smallest_telling
from linchain_cli.comparison.tables import Candidate, at_best_rate, at_recipe_rate, candidates, has_halves
from linchain_cli.errors import InputError
from linchain_cli.report.wording import Row, accuracy_cells, accuracy_title, table_cells, table_titles
from linchain_cli.run import ComparisonDirectory, RunDirectory

FORMAT_VERSION = 1
SHARED = {"data": "rows", "base": "base weights"}  # hashes that all runs of a comparison have in common


def collect(directory: ComparisonDirectory, definition: Definition) -> dict[str, Any]:
    """Measures every run of a comparison and puts the tables together.

    Raises:
        InputError: runs were trained on other data or another base, so that they cannot be compared.
    """
    base, measurements = definition.base, []
    for arm in definition.arms:
        for seed in definition.seeds[arm.name]:
            run = RunDirectory(arm_recipe(arm, seed, directory).run_path)
            place = str(run.path.relative_to(directory.path))
            measurements.append(measure(run, arm.name, seed, place, base.evaluation, base.evaluated_by))
    _refuse_mixture(measurements)
    found = candidates(definition, measurements)
    rate = definition.base.training.learning_rate
    by_name = {one.arm.name: one for one in found}
    best = at_best_rate(found)
    return {
        "format": FORMAT_VERSION,
        "name": directory.path.name,
        "recipe": definition.base.model_dump(mode="json"),
        "equal_parameters": definition.equal_parameters,
        "commands": definition.commands,
        "learning_rate": rate,
        "hashes": {
            kind: value for one in measurements[:1] for kind, value in one.hashes.items() if kind in SHARED
        },
        "tables": {"recipe_rate": at_recipe_rate(found, rate), "best_rate": best},
        "accuracies": accuracy_table(directory, base, [by_name[row["arm"]] for row in best]),
        "runs": [_run_entry(one, by_name[one.arm]) for one in measurements],
        "notes": notes(definition, measurements, found),
    }


def _refuse_mixture(measurements: Sequence[Measurement]) -> None:
    for kind, word in SHARED.items():
        found = {
            one.hashes[kind]: one.directory for one in measurements if kind in one.hashes and one.finished
        }
        if len(found) > 1:
            raise InputError(
                f"the {word} changed between the runs {' and '.join(list(found.values())[:2])}, so they"
                " cannot be compared: put back what there was, or start over with --fresh"
            )


def _run_entry(one: Measurement, candidate: Candidate) -> dict[str, Any]:
    recipe = candidate.recipe
    entry = asdict(one) | {
        "label": candidate.label,
        "depth": recipe.adapter.depth,
        "rank": recipe.adapter.rank,
        "learning_rate": recipe.training.learning_rate,
        "validation_loss": one.final_loss if one.finished else None,
        "area": one.area if one.finished else None,
        "accuracy": one.accuracy,
        "training": [list(point) for point in one.training],
        "halves": list(one.halves) if one.halves else None,
        "validation": [[point.step, point.tokens, point.loss] for point in one.validation],
    }
    del entry["hashes"]
    return entry


def notes(
    definition: Definition, measurements: Sequence[Measurement], arms: Sequence[Candidate]
) -> list[str]:
    """What a reader must know to read the tables right."""
    base = definition.base
    found = [
        "Validation loss is the one after the last step. Area is that under its curve over tokens, divided"
        " by their range: the mean loss from the first validation to the last."
    ]
    seeds = sorted({one.seed for one in measurements if one.finished})
    if len(seeds) > 1:
        found.append(
            "± is the standard deviation over seeds. Differences are paired by seed; their 95 % intervals"
            " (Student's t) cover what the seed changes (initial values, row order, dropout), not the"
            " choice of validation rows, and each stands alone. The word behind it does not: lower and higher"
            " are said where chance alone would lead to such a word, for any arm of the table, in one of"
            " twenty comparisons (Holm's method, each measure and table by itself). An interval that holds 0"
            " is within the spread; one that does not, and is one of so many that it may be chance, is called"
            " that. The smallest telling difference is the one that would have got a word, at the spread that"
            f" was found; {_at_more_seeds(arms)}"
        )
    else:
        found.append("One seed: there is no spread to judge a difference by. Use --seeds 1,2,3.")
    if len({arm.name for arm in definition.arms}) == 1:
        found.append("There is one arm, and nothing to compare it with: other values given later add arms.")
    if not any(one.rate == base.training.learning_rate for one in arms):
        found.append(
            f"No arm was trained at the recipe's learning rate {base.training.learning_rate:g}; add it to"
            " the rates to see that table."
        )
    if len({one.rate for one in arms}) > 1:
        chosen = (
            "Best learning rates were chosen by the loss on one half of the validation rows; the losses shown"
            " with them are those on the other half. Area and tokens are of all rows."
            if has_halves(arms)
            else "Best learning rates were chosen by the validation loss that is shown, so these losses are a"
            " little too good."
        )
        found.append(
            f"{chosen} An arm that was trained at more rates had more luck to choose from. (edge): the best"
            " rate is the lowest or the highest one tried, so a better one may lie beyond."
        )
    if definition.equal_parameters:
        found.append(_parameter_note(arms))
    points = min((len(one.validation) for one in measurements if one.finished), default=0)
    if points and points < 5:
        found.append(
            f"Only {points} validation(s) per run: area and tokens to a loss are coarse. Lower"
            " training.eval_every."
        )
    if base.task == "causal" and base.evaluation.tasks:
        found.append(
            "Accuracies by task have 95 % intervals for other seeds and other rows (crossed random effects,"
            " Student's t with Satterthwaite's degrees of freedom; with one seed, for other rows alone). Each"
            " stands alone. Differences are paired by row and seed. The average counts all tasks alike and"
            " holds for these tasks. majority is what always giving the most frequent answer gets."
        )
    found += [
        f"{one.directory}: {one.status}{f' ({one.reason})' if one.reason else ''}"
        for one in measurements
        if not one.finished
    ]
    return found


def _at_more_seeds(arms: Sequence[Candidate]) -> str:
    """How it depends on the number of seeds: the t quantile of one of these comparisons over √seeds."""
    comparisons = max(1, len({one.group() for one in arms}) - 1)
    seeds = min((len(one.runs) for one in arms if len(one.runs) > 1), default=2)
    now, more = (smallest_telling(1.0, n, comparisons) for n in (seeds, seeds + 2))
    return (
        f"with {seeds} seeds that is {now:.1f} times the differences' standard deviation, with {seeds + 2} it"
        f" would be {more:.1f} times."
    )


def _parameter_note(arms: Sequence[Candidate]) -> str:
    counts = {one.label: run.trainable_parameters for one in arms for run in one.runs.values()}
    if not counts:
        return "Ranks are chosen so that all arms have about as many trained parameters as LoRA."
    low, high = min(counts.values()), max(counts.values())
    return (
        "Ranks are chosen so that all arms have about as many trained parameters as LoRA at the recipe's"
        f" rank: {low:,} to {high:,}, a difference of {(high - low) / low:.1%} that remains."
    )


def write(directory: ComparisonDirectory, results: Mapping[str, Any]) -> None:
    """results.json, results.csv (the tables) and runs.csv (a row per run)."""
    storage.write_json(directory.results_path, results)
    tables = [{"table": name, **_flat(row)} for name, rows in results["tables"].items() for row in rows]
    storage.write_atomic(directory.table_path, _csv(tables))
    left_out = ("training", "validation", "accuracies", "halves")
    runs = [
        {k: v for k, v in run.items() if k not in left_out} | _accuracy_columns(run)
        for run in results["runs"]
    ]
    storage.write_atomic(directory.runs_table_path, _csv(runs))


def _accuracy_columns(run: Row) -> dict[str, float]:
    return {f"accuracy.{task}": value for task, value in run["accuracies"].items()}


def _flat(row: Row, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{key}."))
        elif key == "interval":
            found[f"{prefix}low"], found[f"{prefix}high"] = value or (None, None)
        else:
            found[prefix + key] = " ".join(map(str, value)) if isinstance(value, list) else value
    return found


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def lines(results: Mapping[str, Any], width: int = 100) -> list[str]:
    """Both tables and the notes as text for a terminal of so many columns."""
    found = []
    for title, rows, rates in table_titles(results):
        found += [title, "", *_in_blocks(table_cells(rows, rates), width), ""]
    if cells := accuracy_cells(results):
        found += [accuracy_title(results), "", *_in_blocks(cells, width), ""]
    return found + [f"- {note}" for note in results["notes"]]


def _in_blocks(cells: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Aligned columns; what does not fit into `width` follows below, behind the first column again."""
    first, *others = cells[0]
    texts = [{name: name for name in cells[0]}, *cells]
    widths = {name: max(len(line[name]) for line in texts) for name in cells[0]}
    blocks: list[list[str]] = [[]]
    for name in others:
        taken = widths[first] + sum(2 + widths[other] for other in blocks[-1])
        if blocks[-1] and taken + 2 + widths[name] > width:
            blocks.append([])
        blocks[-1].append(name)
    found = []
    for block in blocks:
        found += [
            "  ".join(f"{line[name]:<{widths[name]}}" for name in (first, *block)).rstrip() for line in texts
        ] + [""]
    return found[:-1]
