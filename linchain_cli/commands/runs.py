"""linchain runs"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linchain_cli import console
from linchain_cli.commands.options import Json
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.run import ComparisonDirectory, RunDirectory


@dataclass(frozen=True)
class Entry:
    """One line: a run, or a comparison, whose arms are counted. None is what is not known.

    status: as run.json has it; `killed` if the run is called running and nobody is at it, `damaged` if its
        files cannot be read, which `reason` tells
    loss: the lowest validation loss
    evaluations: average accuracy, and what else was told, by how it was measured; those on all rows first,
        of these the newest
    changed_at: when it ended, or else when it last began; UTC, ISO 8601
    """

    path: str
    status: str
    reason: str | None = None
    kind: str = "run"
    step: int | None = None
    total_steps: int | None = None
    base: str | None = None
    data: list[str] = field(default_factory=list)
    rank: int | None = None
    depth: int | None = None
    loss: float | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    changed_at: str | None = None


def run(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="The directory that holds the runs: a recipe's output_dir; or a comparison, or one run.",
        ),
    ] = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs of a directory: how they stand and what came out."""
    if not directory.is_dir():
        if directory != Path("runs"):
            raise InputError(f"{directory} is not a directory: name one that holds runs")
        console.note("there is no runs/ here yet: 'linchain train RECIPE' makes one")
    entries = entries_below(directory)
    if json:
        console.print_json([asdict(entry) for entry in entries])
    elif entries:
        print("\n".join(_lines(entries, datetime.now(UTC))))
    elif directory.is_dir():
        console.note(f"no run lies in {directory}/")


def entries_below(directory: Path) -> list[Entry]:
    """The runs and comparisons that lie directly in a directory, newest first: of a comparison its arms',
    and a run itself. What is hidden is on its way in or out."""
    from linchain_cli.run import ComparisonDirectory, RunDirectory

    found, compared = [], ComparisonDirectory(directory)
    place = compared.arms_dir if compared.exists() else directory
    for path in [place] if RunDirectory(place).exists() else sorted(place.glob("[!.]*")):
        if (one := RunDirectory(path)).exists():
            found.append(entry_of(one))
        elif (comparison := ComparisonDirectory(path)).exists():
            found.append(_comparison(comparison))
    return sorted(found, key=lambda entry: entry.changed_at or "", reverse=True)


def entry_of(one: RunDirectory) -> Entry:
    """How a run stands."""
    from linchain_cli.recipe import load_recipe
    from linchain_cli.result_files import describe, find_evaluations
    from linchain_cli.run import in_use, read_jsonl

    try:
        status, recipe = one.read_status(), load_recipe(one.recipe_path)
    except InputError as error:
        return Entry(str(one.path), "damaged", " ".join(str(error).split()))
    killed = status.status == "running" and not in_use(one.path)
    logged = read_jsonl(one.metrics_path) if status.validation_loss is None else []
    losses = [row["eval_loss"] for row in logged if "eval_loss" in row]
    evaluations, _ = find_evaluations(one.eval_dir)
    evaluations = sorted(
        (each.evaluation for each in evaluations), key=lambda each: (each.limit is None, each.measured_at)
    )
    return Entry(
        str(one.path),
        "killed" if killed else "imported" if status.imported is not None else status.status,
        status.reason,
        step=max(status.step or 0, logged[-1]["step"]) if logged else status.step,
        total_steps=status.total_steps,
        base=recipe.model.path,
        data=[] if status.imported is not None else [source.path for source in recipe.data.sources],
        rank=recipe.adapter.rank,
        depth=recipe.adapter.depth,
        loss=min(losses, default=status.validation_loss),
        evaluations=[
            {
                "how": describe(each),
                "protocol": each.protocol,
                "limit": each.limit,
                "average": each.average,
                "tasks": {name: score.accuracy for name, score in each.tasks.items()},
                "metrics": {
                    name: {metric: found.value for metric, found in score.metrics.items()}
                    for name, score in each.tasks.items()
                },
            }
            for each in reversed(evaluations)
        ],
        changed_at=status.finished_at or status.started_at or status.created_at,
    )


def _comparison(comparison: ComparisonDirectory) -> Entry:
    from linchain_cli.comparison.definition import read_definition
    from linchain_cli.run import RunDirectory, runs_below

    path = str(comparison.path)
    try:
        definition = read_definition(comparison)
        arms = [RunDirectory(each).read_status() for each in runs_below(comparison.arms_dir)]
    except InputError as error:
        return Entry(path, "damaged", " ".join(str(error).split()), kind="comparison")
    base, wanted = definition.base, sum(map(len, definition.seeds.values()))
    finished = sum(one.finished for one in arms)
    losses = [one.validation_loss for one in arms if one.validation_loss is not None]
    depths = {arm.recipe.adapter.depth for arm in definition.arms}
    return Entry(
        path,
        "finished" if finished == wanted else f"{finished} of {wanted} runs finished",
        kind="comparison",
        base=base.model.path,
        data=[source.path for source in base.data.sources],
        rank=base.adapter.rank,
        depth=depths.pop() if len(depths) == 1 else None,
        loss=min(losses, default=None),
        changed_at=max((one.finished_at or one.started_at or "" for one in arms), default="") or None,
    )


def _lines(entries: list[Entry], now: datetime) -> list[str]:
    header = ("run", "status", "base", "data", "rank", "depth", "loss", "evaluation", "age")
    rows = [header, *(_cells(entry, now) for entry in entries)]
    shown = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in shown}
    lines = ["  ".join(f"{row[i]:<{widths[i]}}" for i in shown).rstrip() for row in rows]
    return lines + [f"{entry.path}: {entry.reason}" for entry in entries if entry.status == "damaged"]


def _cells(entry: Entry, now: datetime) -> tuple[str, ...]:
    status = entry.status if entry.kind == "run" else f"comparison, {entry.status}"
    if entry.status in ("running", "killed", "stopped", "failed") and entry.total_steps:
        status += f" at {entry.step or 0:,} of {entry.total_steps:,}"
    evaluated = sorted(entry.evaluations, key=lambda each: each["average"] is None)
    shown = next(
        (each for each in evaluated if each["average"] is not None or any(each["metrics"].values())), None
    )
    return (
        entry.path,
        status,
        _end(entry.base or ""),
        _short([_end(path) for path in entry.data]),
        "" if entry.rank is None else str(entry.rank),
        "" if entry.depth is None else str(entry.depth),
        "" if entry.loss is None else f"{entry.loss:.4f}",
        _evaluation(shown) if shown else "",
        _age(entry.changed_at, now),
    )


def _evaluation(shown: Mapping[str, Any]) -> str:
    """`0.625 (2 tasks, likelihood, first 40 rows)`; without accuracies `spearman 0.812 (1 task, regression)`,
    which is of the first task."""
    tasks = f"{len(shown['tasks'])} task{'s'[: len(shown['tasks']) > 1]}"
    limit = "" if shown["limit"] is None else f", first {shown['limit']:,} rows"
    value = f"{shown['average']:.3f}" if shown["average"] is not None else _last_metric(shown["metrics"])
    return f"{value} ({tasks}, {shown['protocol']}{limit})"


def _last_metric(by_task: Mapping[str, Mapping[str, float]]) -> str:
    """Of a regression Spearman's correlation, of answers that are scored the perplexity."""
    name, value = list(next(filter(None, by_task.values())).items())[-1]
    return f"{name} {value:.3f}"


def _end(path: str) -> str:
    """A hub id as it is, of a local path its end."""
    return path if path.count("/") <= 1 and not path.startswith(("/", ".")) else Path(path).name


def _short(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


def _age(moment: str | None, now: datetime) -> str:
    """`3 min`, `5 h`, `12 d`; nothing where it is not known."""
    try:
        seconds = (now - datetime.fromisoformat(moment or "")).total_seconds()
    except (ValueError, TypeError):
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
