"""Plots of runs, drawn without a display."""

from __future__ import annotations

import io
from pathlib import Path

from linchain_cli import storage
from linchain_cli.run import RunDirectory, read_jsonl

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
        axes.plot(*zip(*training), color=TRAINING, linewidth=1.2, label="training (one step's rows)")
    if validation:
        axes.plot(*zip(*validation), color=VALIDATION, marker="o", markersize=4, linewidth=1.2, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token", title=run.path.name)
    if max(loss for _, loss in training + validation) > 20 * min(loss for _, loss in training + validation) > 0:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    storage.write_atomic(run.loss_plot_path, picture.getvalue())
    return run.loss_plot_path
