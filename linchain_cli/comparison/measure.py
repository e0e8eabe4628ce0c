"""What is measured of one run of an arm, read from its run directory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from linchain_cli.comparison.halves import read_halves
from linchain_cli.evaluation.asked import asked_results
from linchain_cli.evaluation.store import run_result
from linchain_cli.recipe.schema import EvaluationConfig
from linchain_cli.run import RunDirectory, read_jsonl


@dataclass(frozen=True)
class Point:
    """One validation: after `step`, when `tokens` (unpadded) had been trained on."""

    step: int
    tokens: float
    loss: float


@dataclass(frozen=True)
class Measurement:
    """One run. `reason` says why it did not finish; `accuracies` are those of its tasks, by name; `halves`
    are the last adapter's losses on either half of the validation rows.
    """

    arm: str
    seed: int
    directory: str
    status: str
    reason: str | None = None
    training: tuple[tuple[int, float], ...] = ()
    validation: tuple[Point, ...] = ()
    trainable_parameters: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    accuracies: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    halves: tuple[float, float] | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished" and bool(self.validation)

    @property
    def final_loss(self) -> float:
        """The validation loss after the last step."""
        return self.validation[-1].loss

    @property
    def area(self) -> float | None:
        """The area under the validation curve over tokens, divided by their range: the mean loss on the way.

        Trapezoids from the first validation to the last; None of a single one.
        """
        tokens = [point.tokens for point in self.validation]
        if len(tokens) < 2:
            return None
        return float(np.trapezoid([point.loss for point in self.validation], tokens)) / (
            tokens[-1] - tokens[0]
        )

    @property
    def accuracy(self) -> float | None:
        """The unweighted mean over tasks."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    def tokens_to_reach(self, loss: float) -> float | None:
        """Tokens until the validation loss first was `loss` or lower, on straight lines between validations.

        None if it never was; at the first validation, that one's tokens (it may have been earlier).
        """
        before: Point | None = None
        for point in self.validation:
            if point.loss <= loss:
                if before is None:
                    return point.tokens
                share = (before.loss - loss) / (before.loss - point.loss)
                return before.tokens + share * (point.tokens - before.tokens)
            before = point
        return None


def measure(
    run: RunDirectory,
    arm: str,
    seed: int,
    directory: str,
    evaluation: EvaluationConfig,
    protocol: str | None = None,
) -> Measurement:
    """Reads a run's files, and of its results the one that `evaluation` asked for (of labels that are told,
    by the `protocol` of that name); a run that was never started has the status `missing`.

    Raises:
        InputError: run.json or metrics.jsonl is damaged.
    """
    if not run.exists():
        return Measurement(arm, seed, directory, "missing")
    status = run.read_status()
    rows = read_jsonl(run.metrics_path)
    trained = [row for row in rows if "loss" in row]
    peaks = [row["peak_memory_bytes"] for row in trained if row.get("peak_memory_bytes")]
    halves = read_halves(run)
    return Measurement(
        arm,
        seed,
        directory,
        status.status,
        status.reason,
        tuple((row["step"], row["loss"]) for row in trained),
        _validation(rows, trained),
        status.trainable_parameters,
        statistics.median(row["step_seconds"] for row in trained) if trained else None,
        status.tokens_per_second,
        # A peak that the process had reached in an earlier arm says nothing about this one.
        max(peaks) if peaks and status.own_peak_memory else None,
        _accuracies(run, evaluation, protocol or evaluation.protocol),
        status.hashes,
        halves.losses if halves else None,
    )


def _validation(rows: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> tuple[Point, ...]:
    """Validation rows count no tokens: theirs are those of their step's training row, or between two."""
    steps, tokens = [0, *(row["step"] for row in trained)], [0, *(row["tokens"] for row in trained)]
    return tuple(
        Point(row["step"], float(np.interp(row["step"], steps, tokens)), row["eval_loss"])
        for row in rows
        if "eval_loss" in row
    )


def _accuracies(run: RunDirectory, section: EvaluationConfig, protocol: str) -> dict[str, float]:
    asked = asked_results(section) if protocol == section.protocol else {protocol: section.tasks or None}
    found = {}
    for by, wanted in asked.items():
        result = run_result(run, section, wanted or (), by)
        found |= {
            name: score.accuracy
            for name, score in (result.tasks.items() if result else ())
            if score.accuracy is not None and not score.is_group and (wanted is None or name in wanted)
        }
    return found
