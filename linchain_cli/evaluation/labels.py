"""Evaluating classifiers and regressions: labelled rows told by a model, counted, and with intervals."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from linchain_cli.console import Progress, is_first_process
from linchain_cli.data.agreement import Agreement, with_interval
from linchain_cli.data.batches import micro_batches
from linchain_cli.data.dataset import PreparedData, prepare_data
from linchain_cli.data.fingerprint import tokenizer_sha256
from linchain_cli.data.formats import FormattedRows
from linchain_cli.data.glue import TASKS, GlueTask
from linchain_cli.data.labelled import Labelled, UnknownLabel, column_names, labelled_source
from linchain_cli.data.labelled_batches import collate_labelled
from linchain_cli.data.rows import RowError, UnusableRow
from linchain_cli.data.sources import resolve_source
from linchain_cli.errors import InputError, some
from linchain_cli.evaluation.evaluate import evaluating, setting_of
from linchain_cli.evaluation.jobs import Halving
from linchain_cli.evaluation.measuring import Measuring, gather
from linchain_cli.evaluation.results import Prediction, Results, averaged, fingerprint, label_arrays
from linchain_cli.evaluation.statistics import standard_error, wilson_interval
from linchain_cli.model.classifier import Outputs, padding, predictions, row_logits
from linchain_cli.recipe import DataConfig, Recipe, SourceConfig
from linchain_cli.recipe.schema import HARNESS_PREFIX, METRICS
from linchain_cli.result_files import Metric, TaskScore
from linchain_cli.run import now

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linchain_cli.model.limits import Limits

BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}


@dataclass(frozen=True)
class LabelledTask:
    """Labelled rows under the name that they were asked for by. `fingerprint` is of their texts and labels:
    two results can be compared only where it is equal."""

    name: str
    data: PreparedData
    fingerprint: str

    @property
    def source(self) -> str:
        return self.data.report.sources[0].location


def load_labelled(
    names: Sequence[str],
    outputs: Outputs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    like: DataConfig | None = None,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    readable: Limits | None = None,
) -> list[LabelledTask]:
    """The rows that `names` are: what data.train may name, of data sets the split `validation`.

    Args:
        like: the data section of the model's recipe: how long rows may be, and of files that are not a task
            of GLUE the columns (where they have these) and the labels' words. Without it the tokenizer says
            how long.
        readable: what the model can read.

    Raises:
        InputError: rows that cannot be found or used, or whose labels are none of the classes.
    """
    found = []
    for name in dict.fromkeys(names):
        source = _source(name, like, limit, data_dir)
        if glue := resolve_source(source, data_dir).glue:
            source = source.model_copy(update={"labels": _glue_labels(name, TASKS[glue], outputs)})
        section = DataConfig(
            train=[source],
            validation=0,
            max_length=like.max_length if like else named_length(tokenizer, readable) or "auto",
            on_bad_row=like.on_bad_row if like else "error",
        )
        try:
            data = prepare_data(
                section,
                tokenizer,
                readable,
                task=outputs.task,
                classes=outputs.classes,
                data_dir=data_dir,
            )
        except UnusableRow as error:
            remedy = "Mend the row, or leave it out"
            if isinstance(error.reason, UnknownLabel):
                remedy = "The model predicts no others: name rows that are labelled with these"
            raise InputError(f"{error.place}: {error.reason}. {remedy}.") from None
        found.append(LabelledTask(name, data, _fingerprint(section, data, data_dir)))
    return found


def named_length(tokenizer: PreTrainedTokenizerBase, readable: Limits | None = None) -> int | None:
    """The tokens to which a tokenizer itself cuts rows, as far as the model reads them; None where it names
    no number."""
    named = tokenizer.model_max_length
    if not 2 <= named <= 10**9:  # a tokenizer that names none has a huge one
        return None
    return min(named, readable.positions) if readable and readable.table else named


def _glue_labels(name: str, task: GlueTask, outputs: Outputs) -> dict[str, str] | None:
    """What the model calls a task's labels: in another case, or by their numbers, as transformers names
    classes that nobody has named (LABEL_0). None where it calls them by their names.

    Raises:
        InputError: it tells something else.
    """
    known = {each.casefold(): each for each in outputs.classes}
    called = [known.get(each.casefold()) for each in task.classes]
    if outputs.classes == tuple(f"LABEL_{number}" for number in range(len(task.classes))):
        called = list(outputs.classes)
    if None in called or bool(called) != bool(outputs.classes):
        theirs, ours = (some(each, 5) or "numbers" for each in (task.classes, outputs.classes))
        raise InputError(f"{name} is labelled with {theirs}, and the model predicts {ours}: name other rows")
    if called == list(task.classes):
        return None
    return {str(number): each for number, each in enumerate(called)} | dict(
        zip(task.classes, called, strict=True)
    )


_WITH_SPLIT = re.compile(r"(.+?):((?:[^/:\[]|\[[^]]*\])+)")


def _source(
    name: str, like: DataConfig | None, limit: int | None, data_dir: str | Path | None = None
) -> SourceConfig:
    """The source of that name; a colon and a split, or a slice of one, may stand behind it:
    `glue/mnli:validation_mismatched`, `glue/rte:train[:100]`. It has the columns and labels of `like`; where
    it lacks these columns, those that are found."""
    if name.startswith(HARNESS_PREFIX):
        raise InputError(
            f"{name} asks a model that writes, and this one predicts labels: name labelled rows, such as"
            " dev.tsv or glue/rte"
        )
    found = _WITH_SPLIT.fullmatch(name)
    path, split = found.groups() if found else (name, "validation")
    plain = SourceConfig(path=path, split=split, max_rows=limit)
    if like is None or path.startswith("glue/"):
        return plain
    first = like.sources[0]
    labelled = plain.model_copy(update={"labels": first.labels or None})
    columns = first.columns
    if columns and set(columns.values()) <= set(column_names(resolve_source(plain, data_dir))):
        return labelled.model_copy(update={"columns": columns})
    return labelled


def _texts(section: DataConfig, data: PreparedData, data_dir: str | Path | None) -> Iterator[Labelled]:
    (wanted,) = section.sources
    source, _ = labelled_source(wanted, data.template.name, data_dir)
    for row in FormattedRows(source, data.template.layouts):
        try:
            if not isinstance(row, RowError):
                yield from data.template.render(row)
        except RowError:
            continue  # counted when it was encoded


def _fingerprint(section: DataConfig, data: PreparedData, data_dir: str | Path | None) -> str:
    digest = hashlib.sha256(json.dumps(data.template.classes).encode())
    for row in _texts(section, data, data_dir):
        digest.update(json.dumps([row.text, row.text_pair, row.target]).encode())
    return digest.hexdigest()


def find_labelled(recipe: Recipe) -> None:
    """Raises InputError if rows that a recipe is evaluated on are not there; a look before training."""
    data_dir = recipe.evaluation.data_dir
    for name in recipe.evaluation.tasks:
        source = _source(name, recipe.data, None, data_dir)
        if glue := resolve_source(source, data_dir).glue:
            kind = "classification" if TASKS[glue].classes else "regression"
            if kind != recipe.task:
                raise InputError(f"evaluation.tasks: {name} is a {kind}, and the run's task a {recipe.task}")
        labelled_source(source, recipe.task, data_dir)


def recipe_labelled(
    recipe: Recipe, outputs: Outputs, tokenizer: PreTrainedTokenizerBase, readable: Limits
) -> list[LabelledTask]:
    """The rows that a recipe is evaluated on; see `load_labelled`."""
    section = recipe.evaluation
    return load_labelled(
        section.tasks,
        outputs,
        tokenizer,
        like=recipe.data,
        limit=section.limit,
        data_dir=section.data_dir,
        readable=readable,
    )


def evaluate_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    outputs: Outputs,
    tasks: Sequence[LabelledTask],
    *,
    name: str,
    title: str = "",
    limit: int | None = None,
    batch_tokens: int | None = None,
    base_sha256: str | None = None,
    adapter_sha256: str | None = None,
    out: Path | None = None,
) -> Results:
    """Has a loaded classifier tell the rows of `tasks`; see evaluate.evaluate, whose results these are, and
    asked.evaluate_asked for `title`.

    Under torch.distributed the processes share the batches, each returns all results, and the first one
    writes.

    Raises:
        InputError: nothing can be written at `out`. LinchainError: the processes do not hold the same model
        and rows.
    """
    of_base = base_sha256, tokenizer_sha256(tokenizer), "none"
    setting = setting_of(model, tasks[0].data.template, name, outputs.task, limit, *of_base).model_copy(
        update={"template": None, "template_sha256": None, "adapter_sha256": adapter_sha256}
    )
    fingerprints = {task.name: fingerprint(setting, task, task.data.report.fingerprint) for task in tasks}
    measuring = Measuring(setting, fingerprints, out)
    missing = [task for task in tasks if not measuring.knows(task.name)]
    if not missing:
        return measuring.results()
    total = sum(len(task.data.train) for task in tasks)
    done = total - sum(len(task.data.train) for task in missing)
    batch_tokens = batch_tokens or BATCH_TOKENS["cpu" if model.device.type == "cpu" else "cuda"]
    pad_id, found, halving = padding(model, tokenizer), [], Halving()

    def told(task: LabelledTask, part: np.ndarray) -> list[Prediction]:
        batch = collate_labelled(task.data.train, part, pad_id).to(model.device)
        return _predicted(task, outputs, part, row_logits(model, batch))

    with Progress(quiet=not is_first_process()) as progress, evaluating(model):
        for task in missing:
            for part in _parts(task.data.train.lengths, batch_tokens, measuring.rank, measuring.world):
                found += halving.run(partial(told, task), part)
                done += len(part)
                progress.show(title, done, total, task.name)
    found = gather(found, measuring.world)
    by_task = {task.name: [row for row in found if row["task"] == task.name] for task in missing}
    by_task = {each: sorted(rows, key=lambda row: row["index"]) for each, rows in by_task.items()}
    scores = {
        task.name: _score(task, outputs, by_task[task.name], fingerprints[task.name]) for task in missing
    }
    summary = averaged(setting.model_copy(update={"tasks": scores}))
    return measuring.results(Results(summary, [row for rows in by_task.values() for row in rows]))


def _parts(lengths: np.ndarray, batch_tokens: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """This process's batches: rows of like length, as many as fit into so many tokens, padding included."""
    for part in micro_batches(np.arange(len(lengths)), lengths, None, rank, world, tokens=batch_tokens):
        if len(part):
            yield part


def _predicted(
    task: LabelledTask, outputs: Outputs, part: np.ndarray, logits: torch.Tensor
) -> list[Prediction]:
    targets = task.data.train.targets[part].tolist()
    told = predictions(logits).tolist()
    rows = []
    for index, target, value, scores in zip(part.tolist(), targets, told, logits.tolist(), strict=True):
        row: Prediction = {"index": index, "task": task.name}
        if outputs.classes:
            names = outputs.classes[int(value)], outputs.classes[int(target)]
            row |= {"prediction": names[0], "answer": names[1], "correct": names[0] == names[1]}
            row["scores"] = dict(zip(outputs.classes, scores, strict=True))
        else:
            row |= {"prediction": value, "answer": target}
        rows.append(row)
    return rows


def _score(task: LabelledTask, outputs: Outputs, rows: Sequence[Prediction], fingerprint: str) -> TaskScore:
    n, classes = len(rows), len(outputs.classes)
    targets, told = label_arrays(outputs.classes, rows)
    own = {}
    if classes:
        correct = int((targets == told).sum())
        own = {
            "accuracy": correct / n,
            "stderr": standard_error(correct, n),
            "interval": wilson_interval(correct, n),
            "majority": max(Counter(targets.tolist()).values()) / n,
        }
    others = [name for name in METRICS[outputs.task] if name != "accuracy"]
    return TaskScore(
        **own,
        n=n,
        metrics={name: _metric(name, with_interval(name, targets, told, classes)) for name in others},
        source=task.source,
        rows_sha256=task.fingerprint,
        fingerprint=fingerprint,
        measured_at=now(),
    )


def _metric(name: str, found: Agreement) -> Metric:
    return Metric(value=found.value, stderr=found.stderr, interval=found.interval, is_share=name == "f1")
