"""Training one run of the plan, and what it tells of held-out rows or of the development set."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from linchain_cli.chain import detach, folded
from linchain_cli.chain.init import random_stream
from linchain_cli.data.batches import micro_batches, step_rows
from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.store import EncodedRows
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.model.classifier import padding
from linchain_cli.model.quiet import quiet
from linchain_cli.recipe import Recipe, SourceConfig
from linchain_cli.run import RunDirectory
from linchain_cli.training.base import Base, load_base
from linchain_cli.training.job import Job, prepare
from linchain_cli.training.labels import LabelObjective
from linchain_cli.training.processes import connect
from linchain_cli.training.schedule import learning_rate
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.step import optimizer_step

from . import boolq
from .plan import BATCH, MAIN, TASKS, Plan, Run

_READ_AT_ONCE = 128  # rows of a batch that is only told
_TRAINED_AT_ONCE = 8  # the most of one that a CPU learns from: with more a small encoder is slower


def recipe_of(
    model: str, targets: Sequence[str], dtype: str, out: Path, plan: Plan, run: Run, micro_batch: int
) -> Recipe:
    """The recipe of a run, by dotted key; `micro_batch` are the most rows of one."""
    batch = plan.batch_of(run)
    values: dict[str, Any] = {
        "task": "classification",
        "name": run.name,
        "output_dir": str(out / "runs"),
        "seed": run.seed,
        "model.path": model,
        "model.dtype": dtype,
        "adapter.rank": 8,
        "adapter.alpha": 32,
        "adapter.target_modules": list(targets),
        "data.train": [sources_of(run.cell.task, out)[0].model_dump(exclude_none=True)],
        "data.validation": 0,
        "training.keep": "last",
        "data.max_length": TASKS[run.cell.task].max_length,
        "training.max_steps": plan.steps(run),
        "training.epochs": None,
        "training.global_batch_size": batch,
        "training.micro_batch_size": min(batch, micro_batch),
        "training.learning_rate": run.rate,
        "training.warmup_steps": 0.06,
        **run.cell.settings.changes,
    }
    return Recipe.from_flat(values)


def sources_of(task: str, out: Path) -> tuple[SourceConfig, SourceConfig]:
    """Where a task's training rows are, and those that are reported."""
    if task == "boolq":
        return boolq.sources(out, TASKS[task].told)
    return SourceConfig(path=f"glue/{task}"), SourceConfig(path=f"glue/{task}", split="validation")


@dataclass(frozen=True)
class Loaded:
    """A task's base and rows."""

    base: Base
    train: EncodedRows
    dev: EncodedRows
    held_out: int

    def rows_of(self, run: Run) -> tuple[EncodedRows, EncodedRows]:
        """What a run is trained on, and what it tells. Which rows are held out is the same in all runs, which
        few ones are trained on is the seed's; fewer are among more."""
        order = np.random.RandomState(0).permutation(len(self.train))
        held_out, kept = np.sort(order[: self.held_out]), np.sort(order[self.held_out :])
        told = self._only(held_out) if run.choosing else self.dev
        if run.cell.rows:
            drawn = np.random.RandomState(run.seed).permutation(kept)[: run.cell.rows]
            return self._only(drawn), told
        return (self._only(kept) if run.choosing else self.train), told

    def _only(self, rows: np.ndarray) -> EncodedRows:
        return EncodedRows(self.train.store, only=rows.astype(np.int32))


class Learner:
    """Trains runs one after another, each task's base loaded once; on the GPU, if there is one."""

    def __init__(
        self,
        model: str,
        targets: Sequence[str],
        dtype: str,
        out: Path,
        plan: Plan,
        micro_batch: int | None = None,
    ):
        self._plan, self._dtype, self._out = plan, dtype, out
        self._recipe_of = partial(recipe_of, model, targets, dtype, out, plan)
        self._accelerator = connect()
        cpu = self._accelerator.device.type == "cpu"
        self._micro_batch = micro_batch or (_TRAINED_AT_ONCE if cpu else BATCH)
        self._loaded: dict[str, Loaded] = {}
        if self._accelerator.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # products of float32 in TF32

    def do(self, run: Run) -> dict[str, Any]:
        """The line that results.jsonl gets of a run."""
        recipe = self._recipe_of(run, self._micro_batch)
        loaded = self._load(run.cell.task, recipe)
        rows, told = loaded.rows_of(run)
        device = self._accelerator.device.type
        row = run.as_row() | {"steps": self._plan.steps(run), "train_rows": len(rows), "device": device}
        row["dtype"] = "float32" if run.cell.settings.full else self._dtype
        learn = self._full if run.cell.settings.full else self._chains
        try:
            row |= learn(run, recipe, loaded.base, rows, told)
        except InputError:
            raise
        except LinchainError as error:  # a rate that is too high
            row["failed"] = str(error)
        what = row.get("failed") or {name: round(value, 4) for name, value in row["scores"].items()}
        print(f"{run.name}: {what} ({row.get('train_seconds')} s)", file=sys.stderr, flush=True)
        return row

    def _load(self, task: str, recipe: Recipe) -> Loaded:
        if task not in self._loaded:
            base = load_base(recipe, self._accelerator)
            dev = recipe.data.model_copy(update={"train": [sources_of(task, self._out)[1]]})
            told = {"task": recipe.task, "classes": base.outputs.classes}
            train, dev = (prepare_data(data, base.tokenizer, **told).train for data in (recipe.data, dev))
            self._loaded[task] = Loaded(base, train, dev, min(self._plan.held_out_of(task), len(train) // 4))
        return self._loaded[task]

    def _chains(
        self, run: Run, recipe: Recipe, base: Base, rows: EncodedRows, told: EncodedRows
    ) -> dict[str, Any]:
        try:
            job = prepare(recipe, RunDirectory(recipe.run_path), self._accelerator, base)
            job.data = replace(job.data, train=rows)
            if run.cell.settings.factor is not None:
                set_factors(job, run.cell.settings.factor)
            job.state.micro_batch_size = recipe.training.micro_batch_size
            began, stop = time.perf_counter(), StopRequest()
            for step, chosen, rate in steps_of(recipe, len(rows)):
                optimizer_step(job, chosen, rate, stop).result()
                job.state.step = step + 1
            seconds = time.perf_counter() - began
            with torch.no_grad(), folded(job.model):
                found = self._told(job.objective, job.model, base, told)
            trained = sum(parameter.numel() for parameter in job.parameters.values())
            return outcome(run, found, told, trained, seconds)
        finally:
            detach(base.model)

    def _full(
        self, run: Run, recipe: Recipe, base: Base, rows: EncodedRows, told: EncodedRows
    ) -> dict[str, Any]:
        """Full fine-tuning, with transformers' model and torch's AdamW."""
        torch.manual_seed(recipe.seed)
        device, training, classes = self._accelerator.device, recipe.training, base.outputs.number
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                base.directory, dtype=torch.float32, num_labels=classes
            ).to(device)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        objective, pad_id = LabelObjective(classes, MAIN[run.cell.task]), padding(model, base.tokenizer)
        began = time.perf_counter()
        for _, chosen, rate in steps_of(recipe, len(rows)):
            for part in micro_batches(chosen, rows.lengths, training.micro_batch_size):
                objective.add_gradients(model, objective.collate(rows, part, pad_id), 1 / len(chosen), device)
            norm = nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
            norm.item()  # as linchain's step does: the clock counts what has been computed
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - began
        model.eval()
        with torch.no_grad():
            found = self._told(objective, model, base, told)
        trained = sum(parameter.numel() for parameter in model.parameters())
        return outcome(run, found, told, trained, seconds)

    def _told(
        self, objective: Any, model: nn.Module, base: Base, rows: EncodedRows
    ) -> tuple[dict[str, float], np.ndarray]:
        """The scores over all rows, and the class that each is told to be."""
        numbers = np.arange(len(rows))
        parts = micro_batches(numbers, rows.lengths, _READ_AT_ONCE)
        read = objective.read(model, rows, parts, padding(model, base.tokenizer), self._accelerator.device)
        scores = objective.judge(self._accelerator, read, rows, numbers)
        classes = np.zeros(len(rows), dtype=np.int64)
        for part, values in read.told:
            classes[part] = values
        return scores, classes


def steps_of(recipe: Recipe, rows: int) -> Iterator[tuple[int, np.ndarray, float]]:
    """Of every step its number, rows and rate."""
    training, steps = recipe.training, recipe.training.max_steps
    for step in range(steps):
        chosen = step_rows(rows, recipe.seed, training.global_batch_size, step)
        yield step, chosen, learning_rate(training, step, steps)


@torch.no_grad()
def set_factors(job: Job, size: float) -> None:
    """Has every factor of every chain begin as a semi-orthogonal matrix times `size`."""
    for path, layer in job.layers.items():
        for name in ("A", "links", "B"):
            tensor = getattr(layer, name)
            stream = random_stream(job.recipe.seed, path, f"{name} orthogonal")
            for matrix in tensor if tensor.dim() == 3 else [tensor]:
                drawn = nn.init.orthogonal_(torch.empty(matrix.shape), generator=stream)
                matrix.copy_(size * drawn)


def outcome(
    run: Run,
    found: tuple[dict[str, float], np.ndarray],
    rows: EncodedRows,
    trained: int,
    seconds: float,
) -> dict[str, Any]:
    """What a run's line tells beside its name; of the development set each row's class, and the one told.

    Raises:
        LinchainError: the loss is not finite.
    """
    scores, classes = found
    if not math.isfinite(scores["loss"]):
        raise LinchainError(f"the loss over the told rows is {scores['loss']}")
    row: dict[str, Any] = {"scores": scores, "trained": trained, "train_seconds": round(seconds, 1)}
    if not run.choosing:
        row["told"], row["targets"] = (
            "".join(str(int(number)) for number in numbers) for numbers in (classes, rows.targets)
        )
    return row
