"""loss.png of runs and comparisons, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linchain_cli import storage
from linchain_cli.report.figures import comparison_figure, loss_figure, png, rate_figure
from linchain_cli.run import ComparisonDirectory, RunDirectory, read_jsonl


def loss_plot(run: RunDirectory) -> None:
    """Draws training and validation loss over steps into loss.png; nothing where nothing was logged yet."""
    rows = read_jsonl(run.metrics_path)
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not training and not validation:
        return
    figure = loss_figure(training, validation, run.read_status().loss_per)
    figure.suptitle(run.path.name, fontsize="medium", parse_math=False)
    storage.write_atomic(run.loss_plot_path, png(figure))


def comparison_plot(directory: ComparisonDirectory, results: Mapping[str, Any]) -> None:
    """Draws the arms' losses at the recipe's learning rate (or else at their best ones) into a comparison's
    loss.png.

    `results` is what results.json holds; nothing where no run has finished.
    """
    if rows := results["tables"]["recipe_rate"] or results["tables"]["best_rate"]:
        storage.write_atomic(directory.plot_path, png(comparison_figure(results, rows)))


def rate_plot(
    path: Path,
    tested: Sequence[tuple[float, float]],
    tried: Sequence[tuple[float, float]],
    chosen: float,
) -> None:
    """Draws what `rate_figure` shows of a search for a learning rate."""
    storage.write_atomic(path, png(rate_figure(tested, tried, chosen)))
