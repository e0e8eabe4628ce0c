"""The page about one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linchain_cli import result_files, storage
from linchain_cli.chain import adapter_kind
from linchain_cli.chain.files import adapter_hash
from linchain_cli.recipe import Recipe, load_recipe
from linchain_cli.report.figures import loss_curves
from linchain_cli.report.html import Markup, facts, figure, page, section, table, tag
from linchain_cli.report.parts import layers_section, origin_section, recipe_section, samples_section
from linchain_cli.report.place import page_path
from linchain_cli.report.wording import gigabytes
from linchain_cli.result_files import find_evaluations
from linchain_cli.run import RunDirectory, RunStatus, read_jsonl


def write_run_report(run: RunDirectory, base: str | None = None, out: Path | None = None) -> Path:
    """Writes report.html into a run's directory, or `out`, and returns its path; the run need not have
    finished.

    `base` is where its base model is, if not where the run found it.

    Raises:
        InputError: what the run's directory holds is damaged, or the page cannot be written there.
    """
    target = page_path(run.path, out)
    status = run.read_status()
    recipe = load_recipe(run.recipe_path)
    rows = read_jsonl(run.metrics_path)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "eval_loss" in row]
    title = f"{recipe.name}: {_what(recipe)}"
    document = page(
        title,
        _summary(status, recipe, training, validation),
        section("Loss", tag("div", figure(_losses(training, validation, status.loss_per)), class_="figures")),
        _evaluations(run),
        _speed(status, training),
        layers_section(run, status, recipe, base),
        samples_section(run, recipe, base),
        origin_section(status, "linchain train recipe.yaml"),
        recipe_section(recipe),
    )
    storage.make_directory(target.parent)
    storage.write_atomic(target, document)
    return target


def _what(recipe: Recipe) -> str:
    adapter = recipe.adapter
    return f"{adapter_kind(adapter.depth)} of rank {adapter.rank} on {recipe.model.path}"


def _losses(
    training: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]], per: str
) -> Markup:
    return loss_curves(
        [(row["step"], row["loss"]) for row in training],
        [(row["step"], row["eval_loss"]) for row in validation],
        per,
    )


def _summary(status: RunStatus, recipe: Recipe, training: Sequence, validation: Sequence) -> Markup:
    adapter, rows, steps = status.adapter, status.rows, status.step
    if steps is None and training:
        steps = training[-1]["step"]
    best = min(validation, key=lambda row: row["eval_loss"], default=None)
    state = status.status + (f": {status.reason}" if status.reason else "")
    of = f" of {status.total_steps:,}" if status.total_steps is not None else ""
    return facts(
        [
            ("status", state),
            ("finished", status.finished_at),
            ("steps", None if steps is None else f"{steps:,}{of}"),
            ("lowest validation loss", best and f"{best['eval_loss']:.4f} after step {best['step']:,}"),
            (
                "last validation loss",
                validation[-1]["eval_loss"] and f"{validation[-1]['eval_loss']:.4f}" if validation else None,
            ),
            ("last validation", validation and _measures(validation[-1])),
            ("adapter/ holds", adapter and f"the {adapter.kept} values, of step {_count(adapter.step)}"),
            ("trained parameters", _count(status.trainable_parameters)),
            ("adapted modules", _count(status.adapted_modules)),
            (
                "rows",
                rows
                and f"{rows['kept']:,} kept, {rows['skipped']:,} skipped, {rows['truncated']:,} truncated",
            ),
            ("tokens trained on", _count(status.tokens)),
            (
                "of these supervised" if status.classes is None else "labels trained on",
                _count(status.supervised_tokens),
            ),
            ("seed", recipe.seed if status.imported is None else None),
        ]
    )


def _measures(row: Mapping[str, Any]) -> str | None:
    """What a validation measured beside the loss: how well labels were told, the loss of each source."""
    names = [name for name in row if name.startswith("eval_") and name != "eval_loss"]
    return ", ".join(f"{name.removeprefix('eval_')} {row[name]:.4f}" for name in names) or None


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f}"


def _evaluations(run: RunDirectory) -> Markup:
    found, problems = find_evaluations(run.eval_dir)
    rows = [_line(line) for line in result_files.table(found, adapter_hash(run.adapter_dir))]
    averages = [
        tag(
            "p",
            f"Average of {len(one.evaluation.tasks)} tasks ({result_files.describe(one.evaluation)}): ",
            f"{one.evaluation.average:.1%}, 95 % interval {_interval(one.evaluation.average_interval)}",
        )
        for one in found
        if one.evaluation.average is not None and len(one.evaluation.tasks) > 1
    ]
    notes = [tag("p", f"Not shown: {problem}") for problem in problems]
    return section("Evaluation", table(rows, "Accuracy by task and setting"), averages, notes)


def _line(line: result_files.Line) -> dict[str, Any]:
    score = line.score
    others = (
        f"{result_files.heading(name)} {metric.value:{'.1%' if metric.is_share else '.4g'}}"
        for name, metric in score.metrics.items()
    )
    earlier = " · of an earlier adapter" if line.earlier else ""
    return {
        "task": line.task,
        "accuracy": "" if score.accuracy is None else f"{score.accuracy:.1%}",
        "95 % interval": _interval(score.interval),
        "beside it": ", ".join(others),
        "rows": "" if score.n is None else f"{score.n:,}",
        "unparsable": score.unparsable or "",
        "most frequent answer": "" if score.majority is None else f"{score.majority:.1%}",
        "how": line.setting + earlier,
        "file": line.path.name,
    }


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}" if bounds else ""


def _speed(status: RunStatus, training: Sequence[Mapping[str, Any]]) -> Markup:
    if not training:
        return Markup("")
    seconds = [row["step_seconds"] for row in training]
    timings = status.timings
    peak = max((row.get("peak_memory_bytes") or 0 for row in training), default=0)
    speed = status.tokens_per_second
    padding = [row["padding_share"] for row in training if "padding_share" in row]
    return section(
        "Speed and memory",
        facts(
            [
                ("tokens per second, unpadded", f"{speed:,.1f}" if speed else None),
                (
                    "seconds per step",
                    f"{statistics.median(seconds):.3f} (median; {min(seconds):.3f} to {max(seconds):.3f})",
                ),
                ("seconds in steps", _seconds(timings.train_seconds)),
                ("seconds before the first step", _seconds(timings.prepare_seconds)),
                ("padding among computed tokens", f"{statistics.fmean(padding):.1%}" if padding else None),
                ("peak memory", gigabytes(peak) or None),
            ]
        ),
    )
