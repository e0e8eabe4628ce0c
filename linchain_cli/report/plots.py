"""Plots of runs, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linchain_cli import storage
from linchain_cli.run import ComparisonDirectory, RunDirectory, read_jsonl

TRAINING, VALIDATION = "#4c72b0", "#c44e52"


def loss_plot(run: RunDirectory) -> Path | None:
    """Draws training and validation loss over steps into loss.png; None when nothing was logged yet."""
    rows = read_jsonl(run.metrics_path)
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not training and not validation:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if training:
        axes.plot(
            *zip(*training, strict=True), color=TRAINING, linewidth=1.2, label="training (one step's rows)"
        )
    if validation:
        axes.plot(
            *zip(*validation, strict=True),
            color=VALIDATION,
            marker="o",
            markersize=4,
            linewidth=1.2,
            label="validation",
        )
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", title=run.path.name)
    if (
        max(loss for _, loss in training + validation)
        > 20 * min(loss for _, loss in training + validation)
        > 0
    ):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    storage.write_atomic(run.loss_plot_path, picture.getvalue())
    return run.loss_plot_path


def comparison_plot(directory: ComparisonDirectory, results: Mapping[str, Any]) -> Path | None:
    """Draws the arms' losses at the recipe's learning rate (or else at their best ones) into a comparison's
    loss.png.

    `results` is what results.json holds; None when no run has finished.
    """
    rows = results["tables"]["recipe_rate"] or results["tables"]["best_rate"]
    if not rows:
        return None
    from linchain_cli.report.figures import comparison_figure, png

    storage.write_atomic(directory.plot_path, png(comparison_figure(results, rows)))
    return directory.plot_path
