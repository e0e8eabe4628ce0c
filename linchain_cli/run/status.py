"""run.json: what is known of a run beside its recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

Status = Literal["running", "stopped", "failed", "finished"]


def now() -> str:
    """The present moment in UTC, ISO 8601 to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, kw_only=True)
class RunBase:
    """The base model, and where it was: enough to find the same one again from another directory.

    path: as the recipe writes it
    revision: as the recipe writes it; commit: what that was on the hub (None for a local model)
    source: absolute path of a local checkpoint directory or .gguf file (None for a hub id)
    directory: absolute path of the checkpoint directory that was read
    dtype: of the weights in memory
    config: what its config.json says of what it computes; None of a run that did not record it
    """

    path: str
    revision: str | None = None
    commit: str | None = None
    source: str | None = None
    directory: str | None = None
    dtype: str | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the run was computed on."""

    device: str | None = None
    processor: str | None = None
    threads: int | None = None
    processes: int | None = None
    sharded: bool = False


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds before the first step, and in steps."""

    prepare_seconds: float | None = None
    train_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class KeptAdapter:
    """What adapter/ holds: the values of after `step`, kept because they were the best or the last."""

    step: int | None
    kept: Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The content of run.json. None is what is not known: of a run that has just begun, or was imported.

    status, reason: how it stands, and why if it did not finish
    created_at, started_at, finished_at: UTC, ISO 8601
    started_in: absolute path of the directory that its recipe's relative paths are of
    hashes: of `recipe`, `data`, `base` and `tokenizer`
    classes: the names of a classification's classes, in the order of the head's outputs
    coverage: of the blocks' weights, how many have a chain and which kinds have none
    rows: counts of kept, skipped and truncated rows, of all sources and of each
    learning_rate, auto_rate: the peak, and what `auto` made it of, where the recipe left it to be found
    plan: the forecast, with what was measured beside it
    validation_loss: the lowest
    comparison, arm: of which comparison the run is an arm, and which
    own_peak_memory: whether the peak in metrics.jsonl is this run's, and not an earlier one's of its process
    imported: where an adapter of another tool came from, and what was done to it
    reproduces: of which run, beside it, this one is a repetition
    """

    FORMAT: ClassVar[str] = "linchain run"
    VERSION: ClassVar[int] = 2

    name: str = ""
    status: Status
    reason: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    started_in: str | None = None
    resumed_from: int | None = None
    step: int | None = None
    total_steps: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str | None] = field(default_factory=dict)
    base: RunBase | None = None
    learning_rate: float | None = None
    auto_rate: str | None = None
    seed: int | None = None
    split_seed: int | None = None
    machine: Machine = Machine()
    timings: Timings = Timings()
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    trainable_parameters: int | None = None
    classes: list[str] | None = None
    adapted_modules: int | None = None
    coverage: dict[str, Any] | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    tokens: int | None = None
    supervised_tokens: int | None = None
    tokens_per_second: float | None = None
    validation_loss: float | None = None
    adapter: KeptAdapter | None = None
    comparison: str | None = None
    arm: str | None = None
    own_peak_memory: bool = True
    imported: dict[str, Any] | None = None
    reproduces: str | None = None

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def loss_per(self) -> str:
        """What its loss is a mean over."""
        return "supervised token" if self.classes is None else "row"

    @property
    def ended(self) -> str:
        """How a run that is not at work now came to its end, in words that follow "that"."""
        words = {"running": "was killed", "stopped": "was stopped", "finished": "is finished"}
        return words.get(self.status, self.status)

    def base_of(self, path: str, revision: str | None) -> RunBase:
        """The base that the run's recipe names, with all that is known of its place."""
        if self.base and self.base.path == path and self.base.revision in (None, revision):
            return self.base
        return RunBase(path=path, revision=revision)
