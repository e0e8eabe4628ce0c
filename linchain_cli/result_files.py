"""Evaluation results as files: their one format, its one reader, and which of them is meant.

A file holds what one model scored in one setting, on any number of tasks; every prediction lies beside it in
`<name>.predictions.jsonl`. In a directory of results the first setting of a protocol has the name
`<protocol>.json`, every other one a name of its own. A path keeps its setting for good.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from linchain_cli.errors import InputError
from linchain_cli.storage import sha256_bytes

FORMAT_VERSION = 2
# What tells two results of one protocol apart. The model's name does not: a run may be called by several.
SETTING = (
    "protocol",
    "beams",
    "normalise",
    "template",
    "template_sha256",
    "dtype",
    "quantization",
    "limit",
    "base_sha256",
    "config_sha256",
    "tokenizer_sha256",
    "adapter_sha256",
    "versions",
)

Interval = tuple[float, float]

# What tables call a task's numbers beside its accuracy, where they have other names in the file.
_HEADINGS = {"none": "by sum", "bytes": "per byte", "tokens": "per token"}


class _Stored(BaseModel):
    # What a later version adds is kept when this one adds a task to its file.
    model_config = ConfigDict(extra="allow", frozen=True)


class Metric(_Stored):
    """Another number of a task, beside its accuracy."""

    value: float
    stderr: float | None = None
    interval: Interval | None = None
    # False for losses and perplexities.
    is_share: bool = True


class TaskScore(_Stored):
    """One task's numbers, or a group's, whose tasks stand beside it and which has no rows of its own. Without
    `accuracy` only `metrics` were measured.

    `rows_sha256` is of the rows and how their answers are read; `fingerprint` of that and the whole setting.
    `template` is the task's own, where it brings one and is not asked through the setting's.
    """

    accuracy: float | None = None
    stderr: float | None = None
    interval: Interval | None = None
    n: int | None = None
    unparsable: int = 0
    near_ties: int | None = None
    majority: float | None = None
    metrics: dict[str, Metric] = {}
    source: str | None = None
    template: str | None = None
    rows_sha256: str | None = None
    fingerprint: str | None = None
    measured_at: str | None = None
    is_group: bool = False

    def to_json(self) -> dict[str, Any]:
        """The task's entry in the file: fields that say nothing are left out, but for a standard error, which
        is null where one row has none.
        """
        metrics = {name: _telling(metric) for name, metric in self.metrics.items()}
        entry = _telling(self) | ({"metrics": metrics} if metrics else {})
        if not self.is_group:
            del entry["is_group"]
        return entry if self.accuracy is None else {"accuracy": self.accuracy, "stderr": self.stderr, **entry}


class Evaluation(_Stored):
    """A result file: the setting, the tasks measured in it, and their unweighted average."""

    format_version: int = FORMAT_VERSION
    model: str = "unknown"
    protocol: str = "unknown"
    beams: int | None = None
    normalise: str | None = None
    template: str | None = None
    template_sha256: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    limit: int | None = None
    base_sha256: str | None = None
    config_sha256: str | None = None
    tokenizer_sha256: str | None = None
    adapter_sha256: str | None = None
    versions: dict[str, str] = {}
    tasks: dict[str, TaskScore]
    average: float | None = None
    average_stderr: float | None = None
    average_interval: Interval | None = None
    against: list[dict[str, Any]] = []

    @property
    def setting(self) -> dict[str, Any]:
        """What a prediction of a given row depends on."""
        return {key: getattr(self, key) for key in SETTING}

    @property
    def setting_sha256(self) -> str:
        return sha256_bytes(json.dumps(self.setting, sort_keys=True).encode())

    @property
    def measured_at(self) -> str:
        """When its newest task was measured."""
        return max((score.measured_at or "" for score in self.tasks.values()), default="")

    def to_json(self) -> dict[str, Any]:
        """What the file holds: fields that say nothing are left out."""
        return _telling(self) | {"tasks": {name: score.to_json() for name, score in self.tasks.items()}}


def _telling(stored: _Stored) -> dict[str, Any]:
    fields = stored.model_dump(mode="json").items()
    return {key: value for key, value in fields if value not in (None, [], {})}


@dataclass(frozen=True)
class Found:
    """A result and where it lies."""

    path: Path
    evaluation: Evaluation


def read_evaluation(path: Path) -> Evaluation:
    """The result file at `path`.

    Raises:
        InputError: it cannot be read, is no result, or is of a later version.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read this result: {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: this is no result of linchain eval, or a damaged one: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise InputError(f"{path}: this is no result of linchain eval: it has no tasks")
    version = content.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {version}, this linchain reads versions up to {FORMAT_VERSION}:"
            " install the version that wrote it, or a later one"
        )
    try:
        return Evaluation.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: this result is damaged: {place}: {first['msg']}") from None


def find_evaluations(directory: Path) -> tuple[list[Found], list[str]]:
    """The results in a directory by name, and what is to be said of files that cannot be read as one."""
    found, problems = [], []
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            found.append(Found(path, read_evaluation(path)))
        except InputError as error:
            problems.append(str(error))
    return found, problems


def first_of(
    found: Sequence[Found],
    protocol: str,
    *,
    limit: int | None,
    adapter_sha256: str | None,
    tasks: Iterable[str] = (),
) -> Found | None:
    """Of several results of one protocol that of the first `limit` rows and of this adapter which has all
    these tasks, and was measured first: what came later was somebody's own trial.
    """
    wanted = protocol, limit, adapter_sha256
    fitting = [
        one
        for one in found
        if (one.evaluation.protocol, one.evaluation.limit, one.evaluation.adapter_sha256) == wanted
        and one.evaluation.tasks.keys() >= set(tasks)
    ]
    return min(fitting, key=lambda one: one.evaluation.measured_at, default=None)


def heading(metric: str) -> str:
    """What tables call a number that stands beside the accuracy."""
    return _HEADINGS.get(metric, metric)


def template_label(evaluation: Evaluation) -> str | None:
    """The template's name; one of the user's own with the beginning of its hash, since all have one name."""
    name, digest = evaluation.template, evaluation.template_sha256
    return f"{name} {digest[:8]}" if name == "custom" and digest else name


def describe(evaluation: Evaluation, score: TaskScore | None = None) -> str:
    """How it, or one task of it, was evaluated: `generate (4 beams) · template alpaca · bfloat16 · first 40
    rows`."""
    how = evaluation.protocol
    if evaluation.beams is not None:
        how += f" ({evaluation.beams} beam{'s' if evaluation.beams > 1 else ''})"
    if evaluation.normalise not in (None, "none"):
        how += f" per {evaluation.normalise.removesuffix('s')}"
    parts = [how]
    if template := (score and score.template) or template_label(evaluation):
        parts.append(f"template {template}")
    if evaluation.dtype:
        parts.append(evaluation.dtype)
    if evaluation.quantization not in (None, "none"):
        parts.append(f"{evaluation.quantization} base")
    if evaluation.limit is not None:
        parts.append(f"first {evaluation.limit:,} rows")
    return " · ".join(parts)


@dataclass(frozen=True)
class Line:
    """One line of a model's table: a task in one setting. `earlier` says that it is of another adapter than
    the present one."""

    task: str
    setting: str
    score: TaskScore
    path: Path
    earlier: bool


def table(found: Sequence[Found], adapter_sha256: str | None = None) -> list[Line]:
    """All results of one model, by task and setting: those of its present adapter first."""
    lines = [
        Line(
            task,
            describe(one.evaluation, score),
            score,
            one.path,
            adapter_sha256 not in (None, one.evaluation.adapter_sha256),
        )
        for one in found
        for task, score in one.evaluation.tasks.items()
    ]
    return sorted(lines, key=lambda line: (line.earlier, line.setting, line.path))
