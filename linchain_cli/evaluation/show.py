"""Results for people: tables in the terminal and a bar chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from linchain_cli import storage
from linchain_cli.console import table_console
from linchain_cli.evaluation.published import PUBLISHED, published_beside
from linchain_cli.evaluation.results import Results
from linchain_cli.result_files import Evaluation, Metric, describe, heading


def print_results(results: Results, console: Console | None = None) -> None:
    """One row per task: accuracy, 95 % interval, what always giving the most frequent answer would get."""
    console = console or table_console()
    summary = results.summary
    scores = summary.tasks.values()
    table = _table()
    answered = any(score.accuracy is not None for score in scores)
    ours = ("accuracy", "±\nstderr", "95 %\ninterval", "majority") if answered else ()
    for column in ("task", "rows", *ours):
        _add_column(table, column)
    others = list(dict.fromkeys(name for score in scores for name in score.metrics))
    counted = {"unparsable": "no answer", "near_ties": "near ties"}
    counted = {key: word for key, word in counted.items() if any(getattr(score, key) for score in scores)}
    for column in (*map(heading, others), *counted.values()):
        _add_column(table, column)
    for name, score in summary.tasks.items():
        numbers = [percent(score.accuracy), percent(score.stderr), span(score.interval)]
        metrics = [metric_text(score.metrics.get(other)) for other in others]
        counts = [str(getattr(score, key) or 0) for key in counted]
        numbers = [*numbers, percent(score.majority)] if answered else []
        asked = f"{name}\n(template {score.template})" if score.template else name
        table.add_row(Text(asked), count(score.n), *numbers, *metrics, *counts)
    if len(summary.tasks) > 1 and summary.average is not None:
        table.add_section()
        average = [percent(summary.average), percent(summary.average_stderr), span(summary.average_interval)]
        table.add_row("average", "", *average)
    _print(console, title(summary), table)


def _table() -> Table:
    """A table without frames, so that a classifier's eight columns fit into 80 characters."""
    return Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


def _print(console: Console, heading: str | None, table: Table) -> None:
    """A table below its heading, which is one line of the output however wide the table is."""
    if heading is not None:
        console.print(Text(heading, style="italic"), soft_wrap=True)
    console.print(table)


def _add_column(table: Table, name: str) -> None:
    """A column of numbers, which stay whole; names fold where they are too long."""
    if name in ("task", "measure"):
        table.add_column(name, overflow="fold")
    else:
        table.add_column(name, justify="right", no_wrap=True)


def metric_text(metric: Metric | None) -> str:
    """A number beside the accuracy: a share in per cent, a loss or correlation as it is; beneath it its
    interval, where it is no share."""
    if metric is None:
        return "–"
    if metric.is_share:
        return percent(metric.value)
    text = f"{metric.value:.4g}"
    return f"{text}\n{span(metric.interval, lambda value: f'{value:.2f}')}" if metric.interval else text


def count(value: int | None) -> str:
    """A number of rows, or a dash."""
    return "–" if value is None else str(value)


def print_comparison(first: Results, comparison: dict[str, Any], console: Console | None = None) -> None:
    """Paired differences on the same rows, after a warning if the two were not evaluated in the same way."""
    console = console or table_console()
    for difference in comparison["differences_in_settings"]:
        console.print(Text.assemble(("not evaluated alike", "bold yellow"), f" — {difference}"))
    table = _table()
    several = len(comparison["tasks"]) > 1
    for column in ("task", "rows", "difference", "95 % interval", "gained", "lost", "McNemar\np"):
        _add_column(table, column)
    if several:
        _add_column(table, f"Holm's p\nof {len(comparison['tasks'])}")
    for name, entry in comparison["tasks"].items():
        table.add_row(Text(name), *_paired_cells(entry), *([f"{entry['p_holm']:.2g}"] if several else []))
    if several:
        table.add_section()
        table.add_row("all rows", *_paired_cells(comparison["all_rows"]))
        difference, interval = comparison["average_difference"], comparison["average_interval"]
        table.add_row("average", "", points(difference), span(interval, points))
    if comparison["tasks"]:
        _print(console, f"{first.summary.model} minus {comparison['model']}, same rows", table)
    print_metric_differences(comparison, console)


def print_metric_differences(comparison: dict[str, Any], console: Console) -> None:
    """Differences of what is measured beside the accuracy, if anything is, with their bootstrap intervals."""
    if not comparison.get("metrics"):
        return
    table = _table()
    for column in ("task", "measure", "difference", "95 % interval"):
        _add_column(table, column)
    for task, measures in comparison["metrics"].items():
        for name, found in measures.items():
            value, interval = f"{found['difference']:+.3f}", span(found["interval"], lambda v: f"{v:+.3f}")
            table.add_row(Text(task), name, value, interval)
    heading = f"the same minus {comparison['model']}, other measures" if comparison["tasks"] else None
    _print(console, heading, table)


def _paired_cells(entry: dict[str, Any]) -> list[str]:
    counts = [str(entry["gained"]), str(entry["lost"])]
    return [
        str(entry["n"]),
        points(entry["difference"]),
        span(entry["interval"], points),
        *counts,
        f"{entry['p']:.2g}",
    ]


def print_published(results: Results, console: Console | None = None) -> None:
    """Published rows over the same tasks, in a table of their own."""
    console = console or table_console()
    rows = published_beside(list(results.summary.tasks))
    if not rows:
        groups = {len(row.tasks): ", ".join(row.tasks) for row in PUBLISHED}
        console.print(f"No published rows for these tasks; there are some for {'; '.join(groups.values())}.")
        return
    table = Table(
        title="Published by others: other runs, prompts and decoding; no comparison", title_justify="left"
    )
    for column in ("model", "method", "average", "protocol", "source"):
        table.add_column(column)
    for row in rows:
        table.add_row(row.model, row.method, percent(row.average), row.protocol, row.source)
    console.print(table)


def title(summary: Evaluation) -> str:
    """What was evaluated and how, in one line."""
    return f"{summary.model} · {describe(summary)}"


def percent(value: float | None) -> str:
    """`61.3 %`, or a dash for nothing."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def span(interval: Sequence[float] | None, number: Callable[[float], str] | None = None) -> str:
    """`58.1 … 64.4`; a dash for none."""
    if interval is None:
        return "–"
    number = number or (lambda value: f"{100 * value:.1f}")
    return f"{number(interval[0])} … {number(interval[1])}"


CHART_SOFTWARE = "linchain eval"


def write_chart(results: Sequence[Results], path: Path) -> bool:
    """A PNG: a group of bars per task, a bar per result, 95 % intervals, the majority class as a line.

    Returns whether it was written: not over a picture of someone else's, and not without an accuracy.
    """
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [name for name, score in results[0].summary.tasks.items() if score.interval is not None]
    if not tasks or (path.exists() and CHART_SOFTWARE.encode() not in path.read_bytes()):
        return False
    figure = Figure(figsize=(max(5.0, 1.1 * len(tasks) * len(results) ** 0.5 + 2), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(results)
    for number, result in enumerate(results):
        scores = [result.summary.tasks[task] for task in tasks]
        heights = [100 * score.accuracy for score in scores]
        below = [100 * (score.accuracy - score.interval[0]) for score in scores]
        above = [100 * (score.interval[1] - score.accuracy) for score in scores]
        places = [task - 0.4 + (number + 0.5) * width for task in range(len(tasks))]
        axes.bar(places, heights, width, yerr=[below, above], capsize=3, label=title(result.summary))
    majority = {place: results[0].summary.tasks[task].majority for place, task in enumerate(tasks)}
    known = [place for place, share in majority.items() if share is not None]
    if known:
        levels = [100 * majority[place] for place in known]
        ends = [place - 0.45 for place in known], [place + 0.45 for place in known]
        axes.hlines(levels, *ends, colors="black", linestyles="dashed", label="majority class")
    slanted = {"rotation": 30, "ha": "right"} if len(tasks) > 3 else {}
    axes.set_xticks(range(len(tasks)), tasks, **slanted)
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.set_ylim(0, 100)
    figure.legend(fontsize="small", loc="outside lower center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": CHART_SOFTWARE})
    storage.write_atomic(path, buffer.getvalue())
    return True
