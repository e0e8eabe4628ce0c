"""How numbers of a comparison are written, on a terminal and on a page: one wording for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linchain_cli.recipe.schema import HARNESS_PREFIX

Row = Mapping[str, Any]

FIRST_COLUMN = "arm"
RATE_COLUMN = "learning rate"


def number(found: Row | None, digits: int = 4) -> str:
    """The mean of an estimate, or nothing."""
    return f"{found['mean']:.{digits}f}" if found else ""


def spread(found: Row | None) -> str:
    """`0.1683 ± 0.0012`, without the spread where there is one seed."""
    if not found:
        return ""
    return number(found) + (f" ± {found['sd']:.4f}" if found["sd"] is not None else "")


def difference(found: Row | None) -> str:
    """`−0.0031 [−0.0050, −0.0012] lower`, or the word that stands in its place."""
    if not found:
        return ""
    if "mean" not in found:
        return found["verdict"]
    value = _signed(found["mean"])
    if found["interval"] is None:
        return f"{value} ({found['verdict']})"
    low, high = (_signed(bound) for bound in found["interval"])
    return f"{value} [{low}, {high}] {found['verdict']}"


def smallest_telling(found: Row | None) -> str:
    """`0.0040`: the difference that would have been called lower or higher."""
    value = (found or {}).get("smallest_telling")
    return "" if value is None else f"{value:.4f}"


def _signed(value: float, digits: int = 4) -> str:
    """With a minus sign, behind which no line breaks, instead of a hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−")


def reached(found: Row | None) -> str:
    """Mean tokens to a loss, with how many seeds got there unless all did."""
    if not found:
        return ""
    if not found["reached"]:
        return "not reached"
    missing = "" if found["reached"] == found["of"] else f" ({found['reached']} of {found['of']} seeds)"
    return f"{found['mean']:,.0f}{missing}"


def gigabytes(size: int | None) -> str:
    """Bytes as 10⁹ bytes."""
    return f"{size / 1e9:.2f} GB" if size else ""


def table_cells(rows: Sequence[Row], rates: bool) -> list[dict[str, str]]:
    """A comparison's table as texts by column; columns that are empty in every line are left out.

    Args:
        rates: whether every arm's learning rate is shown (the table of best rates).
    """
    references = {row["reference"] for row in rows}
    common = references.pop() if len(references) == 1 else None
    against = common or "its reference"
    lines = []
    for row in rows:
        cells = {FIRST_COLUMN: row["label"]}
        if rates:
            cells[RATE_COLUMN] = f"{row['learning_rate']:g}{' (edge)' if row.get('edge') else ''}"
        cells |= {
            "validation loss": spread(row["validation_loss"]),
            "reference": "" if common else row["reference"],
            f"difference to {against} [95 %]": _difference_of(row, "validation_loss"),
            "smallest telling difference": smallest_telling(row["difference"]["validation_loss"]),
            "area under the curve": spread(row["area"]),
            "difference of areas [95 %]": _difference_of(row, "area"),
            f"tokens to {against}'s final loss": reached(row["tokens_to_reference"]),
            "accuracy": spread(row["accuracy"]),
            "difference of accuracies [95 %]": _difference_of(row, "accuracy"),
            "smallest telling difference of accuracies": smallest_telling(row["difference"]["accuracy"]),
            "seconds per step": number(row["step_seconds"], 3),
            "memory": gigabytes(row["peak_memory_bytes"]),
            "parameters": f"{row['trainable_parameters']:,}" if row["trainable_parameters"] else "",
        }
        lines.append(cells)
    shown = [name for name in (lines[0] if lines else {}) if any(line[name] for line in lines)]
    return [{name: line[name] for name in shown} for line in lines]


def _difference_of(row: Row, measure: str) -> str:
    """The difference of a measure, where the row has that."""
    return difference(row["difference"][measure]) if row[measure] else ""


def table_titles(results: Mapping[str, Any]) -> list[tuple[str, list[Row], bool]]:
    """(title, rows, whether rates are shown) of the tables that a comparison has; best rates need several."""
    tables = results["tables"]
    found = []
    if tables["recipe_rate"]:
        found.append(
            (f"At the recipe's learning rate ({results['learning_rate']:g})", tables["recipe_rate"], False)
        )
    if tables["best_rate"] and len({run["learning_rate"] for run in results["runs"]}) > 1:
        found.append(("Each arm at its best learning rate", tables["best_rate"], True))
    return found


def accuracy_title(results: Mapping[str, Any]) -> str:
    """What stands above `accuracy_cells`."""
    section = results["recipe"]["evaluation"]
    limit = f", first {section['limit']:,} rows of each task" if section["limit"] else ""
    theirs = [name.startswith(HARNESS_PREFIX) for name in section["tasks"]]
    by = [*([] if all(theirs) else [section["protocol"]]), *(["lm_eval"] if any(theirs) else [])]
    return f"Accuracy by task, each arm at its best learning rate ({' and '.join(by)}{limit})"


def accuracy_cells(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """A comparison's accuracies by task and arm as texts by column, in per cent and points; columns that are
    empty in every line are left out."""
    lines = [
        {
            "task": row["task"],
            FIRST_COLUMN: row["label"],
            "rows": f"{row['rows']:,}",
            "seeds": str(len(row["seeds"])),
            "majority": _percent(row["majority"]),
            "base": _percent(row["base"]),
            "accuracy, % [95 %]": _with_interval(row["accuracy"], lambda value: f"{100 * value:.1f}"),
            "minus base [95 %]": _with_interval(row["minus_base"], _points),
            "reference": row["reference"] if row["minus_reference"] else "",
            "minus reference [95 %]": _with_interval(row["minus_reference"], _points),
            "without an answer": f"{row['without_answer']:,.0f}" if row["without_answer"] else "",
        }
        for row in results["accuracies"]
    ]
    return [{name: line[name] for name in line if any(one[name] for one in lines)} for line in lines]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _points(value: float) -> str:
    return _signed(100 * value, 1)


def _with_interval(found: Row | None, number: Callable[[float], str]) -> str:
    if not found:
        return ""
    bounds = found["interval"]
    return number(found["mean"]) + (f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else "")
