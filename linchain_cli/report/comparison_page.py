"""The page about a comparison."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from linchain_cli import storage
from linchain_cli.chain import load_adapter
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.recipe import Recipe
from linchain_cli.report.figures import comparison_pictures
from linchain_cli.report.html import Markup, facts, figure, page, section, table, tag
from linchain_cli.report.layers import layer_numbers
from linchain_cli.report.parts import origin_section, recipe_section, samples_section
from linchain_cli.report.place import page_path
from linchain_cli.report.wording import (
    FIRST_COLUMN,
    accuracy_cells,
    accuracy_title,
    table_cells,
    table_titles,
)
from linchain_cli.run import ComparisonDirectory, RunDirectory, RunStatus


def write_comparison_report(directory: ComparisonDirectory, out: Path | None = None) -> Path:
    """Writes report.html into a comparison's directory, or `out`, and returns its path.

    Raises:
        InputError: there are no results yet, or they are damaged, or the page cannot be written there.
    """
    target = page_path(directory.path, out)
    results = read_results(directory)
    recipe = Recipe.model_validate(results["recipe"])
    finished = [run for run in results["runs"] if run["status"] == "finished"]
    first = RunDirectory(directory.path / finished[0]["directory"]) if finished else None
    status = first.read_status() if first and first.exists() else None
    parts: list[Markup] = []
    for title, rows, rates in table_titles(results):
        drawn = [figure(one) for one in comparison_pictures(results, rows)]
        shown = tag("div", drawn, class_="figures")
        parts.append(section(title, _tables(table_cells(rows, rates)), shown))
    if cells := accuracy_cells(results):
        parts.append(section("Accuracy by task", table(cells, accuracy_title(results))))
    document = page(
        f"{results['name']}: a comparison on {recipe.model.path}",
        _summary(results, finished, status),
        section("How to read it", tag("ul", [tag("li", note) for note in results["notes"]])),
        parts,
        _learned(directory, results),
        _runs(results),
        samples_section(first, recipe) if status else Markup(""),
        origin_section(
            replace(status or RunStatus(status="failed"), hashes=results["hashes"]), _commands(results)
        ),
        recipe_section(recipe),
    )
    storage.make_directory(target.parent)
    storage.write_atomic(target, document)
    return target


class _Results(BaseModel):
    """What of results.json the page reads."""

    format: Literal[1]
    name: str
    recipe: Recipe
    learning_rate: float
    hashes: dict[str, str]
    tables: dict[Literal["recipe_rate", "best_rate"], list[dict[str, Any]]]
    accuracies: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    notes: list[str]


def read_results(directory: ComparisonDirectory) -> dict[str, Any]:
    """results.json of a comparison.

    Raises:
        InputError: there is none yet, or it is damaged.
    """
    path = directory.results_path
    try:
        found = json.loads(path.read_bytes())
        _Results.model_validate(found)
    except FileNotFoundError:
        raise InputError(
            f"{directory.path} has no results yet: finish it by giving its `linchain compare` again"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise InputError(f"{path} is damaged ({reason}): give its `linchain compare` again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): give its `linchain compare` again") from error
    return found


_COST = ("seconds per step", "memory", "parameters")


def _tables(cells: Sequence[Mapping[str, str]]) -> list[Markup]:
    """What was reached and what it took apart: together they would be wider than a screen."""
    reached = [{name: text for name, text in line.items() if name not in _COST} for line in cells]
    took = [{name: text for name, text in line.items() if name in (FIRST_COLUMN, *_COST)} for line in cells]
    found = [table(reached, "Means over seeds")]
    return found + [table(took, "What a run takes")] if any(len(line) > 1 for line in took) else found


def _commands(results: Mapping[str, Any]) -> str:
    return "\n".join(
        f"linchain compare recipe.yaml {shlex.join(words)}" for words in results.get("commands", [])
    )


def _summary(
    results: Mapping[str, Any], finished: Sequence[Mapping[str, Any]], status: RunStatus | None
) -> Markup:
    rows, steps = (status.rows, status.total_steps) if status else ({}, None)
    return facts(
        [
            ("runs", f"{len(finished)} finished of {len(results['runs'])}"),
            ("seeds", ", ".join(map(str, sorted({run["seed"] for run in results["runs"]})))),
            ("steps per run", f"{steps:,}" if steps is not None else None),
            ("rows", f"{rows['kept']:,} kept, {rows['skipped']:,} skipped" if rows else None),
            ("same number of parameters", "ranks are adjusted" if results.get("equal_parameters") else None),
        ]
    )


def _learned(directory: ComparisonDirectory, results: Mapping[str, Any]) -> Markup:
    """Means over the modules of every arm's adapters."""
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for run in results["runs"]:
        if run["status"] == "finished":
            by_arm.setdefault(run["arm"], []).append(run)
    rows, problems = [], []
    for runs in by_arm.values():
        try:
            layers = [
                layer
                for run in runs
                for layer in layer_numbers(
                    load_adapter(RunDirectory(directory.path / run["directory"]).adapter_dir)
                )
            ]
        except LinchainError as error:
            problems.append(tag("p", str(error), class_="faint"))
            continue
        row = {"arm": runs[0]["label"], "learning rate": f"{runs[0]['learning_rate']:g}"}
        for name, read in (
            ("entropy rank", lambda one: one.entropy_rank),
            ("stable rank", lambda one: one.stable_rank),
            ("share of the first direction", lambda one: one.top_energy),
            ("‖ΔW‖", lambda one: one.norm),
        ):
            row[name] = f"{statistics.fmean(map(read, layers)):.3g}"
        rows.append(row)
    note = (
        "Means over all adapted modules and seeds. No depth can raise the rank of ΔW beyond r; compare arms"
        " of like loss."
    )
    return section(
        "What was learned", tag("p", note) if rows else None, table(rows, "Spectra of ΔW"), problems
    )


def _runs(results: Mapping[str, Any]) -> Markup:
    rows = [
        {
            "run": run["directory"],
            "status": run["status"],
            "validation loss": _text(run["validation_loss"], 4),
            "area": _text(run["area"], 4),
            "seconds per step": _text(run["step_seconds"], 3),
            "tokens per second": _text(run["tokens_per_second"], 1),
            "accuracy": _text(run["accuracy"], 4),
        }
        for run in results["runs"]
    ]
    hint = tag(
        "p", "`linchain report` with one of these directories shows that run, layer by layer.", class_="faint"
    )
    shown = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    return section(
        "Every run",
        table([{name: row[name] for name in shown} for row in rows], "One line per arm and seed"),
        hint,
    )


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
