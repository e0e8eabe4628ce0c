"""linchain eval, of a classifier or a regression"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli import console
from linchain_cli.commands.subject import Subject, load_subject, predicts_labels
from linchain_cli.console import is_first_process
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from linchain_cli.evaluation.results import Results
    from linchain_cli.recipe import DataConfig


@dataclass(frozen=True)
class LabelSettings:
    """How models predict labelled rows."""

    names: Sequence[str]
    dtype: str | None
    limit: int | None
    data_dir: Path | None
    batch_tokens: int | None

    def evaluate(self, subject: Subject, out: Path, like: Subject | None = None) -> Results:
        """Loads the subject, has it predict the rows, and lets go of it again. Rows are read as the subject's
        recipe says, or else as that of `like`."""
        from linchain_cli.evaluation.labels import evaluate_labels, load_labelled, named_length
        from linchain_cli.model.limits import limits
        from linchain_cli.training.processes import told_when_lost

        loaded = load_subject(subject, self.dtype)
        rows_like = _data(subject) or (like and _data(like))
        tasks = load_labelled(
            self.names,
            loaded.outputs,
            loaded.tokenizer,
            like=rows_like,
            limit=self.limit,
            data_dir=self.data_dir,
            readable=limits(loaded.model),
        )
        if is_first_process():
            if rows_like is None:
                longest = tasks[0].data.config.max_length
                says = "its tokenizer says" if named_length(loaded.tokenizer) else "the model can"
                console.note(f"{subject.name}: rows of up to {longest:,} tokens are read, as {says}")
            for report in (task.data.report for task in tasks):
                for told in report.notes:
                    console.note(told)
                for told in report.warnings:
                    console.warn(told)
                if report.skipped:
                    first = next(iter(report.bad_examples + report.unsupervised_examples), "")
                    console.warn(f"{report.names}: {report.skipped:,} rows are left out, first {first}")
        with told_when_lost():
            return evaluate_labels(
                loaded.model,
                loaded.tokenizer,
                loaded.outputs,
                tasks,
                name=subject.name,
                title=subject.name,
                limit=self.limit,
                batch_tokens=self.batch_tokens,
                base_sha256=loaded.base_sha256,
                adapter_sha256=loaded.adapter_sha256,
                out=out,
            )


def _data(subject: Subject) -> DataConfig | None:
    return subject.recipe and subject.recipe.data


def label_names(tasks: str | None, subject: Subject) -> list[str]:
    """The rows that were asked for: those of the option, of the recipe, or those that the run validated on.

    Raises:
        InputError: none are known.
    """
    if tasks is not None:
        return [name.strip() for name in tasks.split(",") if name.strip()]
    recipe = subject.recipe
    if recipe is not None and recipe.evaluation.tasks:
        return recipe.evaluation.tasks
    if recipe is not None and (sources := recipe.data.validation_sources):
        return [one.path if one.split == "validation" else f"{one.path}:{one.split}" for one in sources]
    raise InputError("--tasks is missing: name labelled rows, such as --tasks dev.tsv or --tasks glue/rte")


def of_names(results: Results, names: Sequence[str], path: Path) -> Results:
    """The part of an earlier result that is of these rows.

    Raises:
        InputError: it has none of one of them.
    """
    for name in names:
        if name not in results.summary.tasks:
            known = ", ".join(results.summary.tasks)
            raise InputError(f"{path} has no {name} to compare with, it has {known}")
    return results.of_tasks(names)


def refuse_settings(protocol: str, normalise: str, template: str | None) -> None:
    """Raises InputError for options that are about written answers."""
    given = {
        "--protocol generate": protocol == "generate",
        f"--normalise {normalise}": normalise != "none",
        f"--template {template}": template is not None,
    }
    for option, wrong in given.items():
        if wrong:
            raise InputError(
                f"{option} is about written answers, and this model predicts labels: leave it out"
            )


def refuse_other_kind(first: Subject, second: Subject | None) -> None:
    """Raises InputError where one of two models predicts labels and the other one writes."""
    if second is not None and predicts_labels(first) != predicts_labels(second):
        one, other = (first, second) if predicts_labels(first) else (second, first)
        raise InputError(f"{one.name} predicts labels and {other.name} writes text: they cannot be compared")
