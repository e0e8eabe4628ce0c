"""What is told about the rows of a run before it starts: counts, lengths, padding, steps and tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from linchain_cli.data.batches import step_rows, steps_per_epoch

# Rises with every change of what encoding rows reports of them, which are then encoded anew.
REPORT_VERSION = 2
_BINS = 12  # of the histogram of lengths


@dataclass
class SourceReport:
    """One source's rows: `kept + skipped == total`. Skipped ones were bad, without a supervised token, or too
    long. `rows` are the training rows that the kept ones became; `unread` the columns that nothing read, and
    `unshown` those of them that tell what was said before an instruction."""

    name: str
    location: str = ""
    template: str = ""
    total: int = 0
    kept: int = 0
    bad: int = 0
    unsupervised: int = 0
    long: int = 0
    rows: int = 0
    unread: list[str] = field(default_factory=list)
    unshown: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return self.bad + self.unsupervised + self.long


@dataclass
class DataReport:
    """The rows of one encoding. What is counted without its source is of the training rows that were kept."""

    fingerprint: str = ""
    template: str = ""  # what the model is asked through afterwards
    cached: bool = False
    sources: list[SourceReport] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0  # rows
    straddling_rows: int = 0
    straddling_tokens: int = 0
    answers_cut_away: int = 0  # of conversations, of which earlier answers are left
    control_rows: int = 0  # rows of the sources with a control token in their text, the first in the examples
    remarks: dict[str, int] = field(default_factory=dict)  # a template's, with how many rows they are about
    bad_examples: list[str] = field(default_factory=list)
    unsupervised_examples: list[str] = field(default_factory=list)
    control_examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def names(self) -> str:
        return ", ".join(source.name for source in self.sources)

    @property
    def total(self) -> int:
        return sum(source.total for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def skipped(self) -> int:
        return sum(source.skipped for source in self.sources)

    @property
    def unsupervised(self) -> int:
        return sum(source.unsupervised for source in self.sources)

    @property
    def long(self) -> int:
        return sum(source.long for source in self.sources)

    @property
    def rows(self) -> int:
        """Training rows, before any is held out."""
        return sum(source.rows for source in self.sources)

    def counts(self) -> dict[str, Any]:
        """As JSON, for run.json: of all sources together, and of each."""
        everything = asdict(self)
        left_out = ("fingerprint", "cached", "sources", "notes")
        together = {
            name: getattr(self, name) for name in ("total", "kept", "skipped", "unsupervised", "long", "rows")
        }
        each = [
            {**source, "skipped": report.skipped}
            for source, report in zip(everything["sources"], self.sources, strict=True)
        ]
        return {**together, **{k: v for k, v in everything.items() if k not in left_out}, "sources": each}

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON, which `from_dict` reads back."""
        return asdict(self)

    def move(self, names: Sequence[tuple[str, str]]) -> None:
        """Gives the sources a new (name, location): the same content may lie elsewhere by now."""
        moved = {source.location: place for source, (_, place) in zip(self.sources, names, strict=True)}
        longest_first = sorted(moved, key=len, reverse=True)  # rows.jsonl is not rows.json

        def now(example: str) -> str:
            was = next((place for place in longest_first if example.startswith(place)), "")
            return moved.get(was, "") + example.removeprefix(was)

        for examples in (self.bad_examples, self.unsupervised_examples, self.control_examples):
            examples[:] = map(now, examples)
        for source, (name, location) in zip(self.sources, names, strict=True):
            source.name, source.location = name, location

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        return cls(**{**values, "sources": [SourceReport(**source) for source in values["sources"]]})


@dataclass(frozen=True)
class EpochPlan:
    """One pass over the training rows. `padding` is its share of all positions that are computed."""

    rows: int
    steps: int
    tokens: int
    supervised_tokens: int
    computed: int  # positions, padding included
    padding: float
    padding_unsorted: float  # the same micro-batches cut without sorting a step's rows
    longest_micro_batch: int  # tokens of the largest micro-batch, padding included


def epoch_plan(
    lengths: np.ndarray,
    supervised: np.ndarray,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
) -> EpochPlan:
    """What the first epoch's batches look like in one process, by the same order of rows that training takes.

    `lengths` and `supervised` are each row's tokens and supervised tokens: (rows,) int32.
    """
    order = step_rows(len(lengths), seed, len(lengths), 0)  # an epoch as one step: its whole order
    steps = steps_per_epoch(len(lengths), global_batch)
    tokens = int(lengths.sum(dtype=np.int64))
    computed, largest = _computed(lengths[order], global_batch, micro_batch, by_length=True)
    unsorted, _ = _computed(lengths[order], global_batch, micro_batch, by_length=False)
    return EpochPlan(
        rows=len(lengths),
        steps=steps,
        tokens=tokens,
        supervised_tokens=int(supervised.sum(dtype=np.int64)),
        computed=computed,
        padding=1 - tokens / computed,
        padding_unsorted=1 - tokens / unsorted,
        longest_micro_batch=largest,
    )


def _computed(lengths: np.ndarray, global_batch: int, micro_batch: int, by_length: bool) -> tuple[int, int]:
    """Positions with padding of (an epoch, its largest micro-batch); `lengths` are in epoch order."""
    full = len(lengths) // global_batch * global_batch
    total = largest = 0
    for steps in (lengths[:full].reshape(-1, global_batch), lengths[full:].reshape(1, -1)):
        if not steps.size:
            continue
        if by_length:
            steps = -np.sort(-steps, axis=1)
        for part in np.array_split(steps, math.ceil(steps.shape[1] / micro_batch), axis=1):
            sizes = part.max(axis=1).astype(np.int64) * part.shape[1]
            total += int(sizes.sum())
            largest = max(largest, int(sizes.max()))
    return total, largest


def length_histogram(lengths: np.ndarray, max_length: int) -> list[tuple[int, int, int]]:
    """(from, to, rows) for ranges of like width that cover 1 to `max_length`, both ends included."""
    edges = np.unique(np.linspace(0, max_length, _BINS + 1).round().astype(int))
    counts, _ = np.histogram(lengths, bins=edges + 0.5)
    return [
        (int(low) + 1, int(high), int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
