"""A finished run once more: whether it is made of what run.json says, and whether the same comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from linchain_cli.chain import load_adapter
from linchain_cli.chain.files import adapter_hash, named_tensors
from linchain_cli.data.relocation import recipe_from_here
from linchain_cli.errors import InputError
from linchain_cli.model.computed import changed_values
from linchain_cli.model.hashing import short
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory, RunStatus, read_jsonl
from linchain_cli.storage import sha256_bytes, sha256_file
from linchain_cli.training.job import Job, versions

# What a row of metrics.jsonl tells of the computation; the rest is time and memory.
_COMPUTED = ("loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "eval_loss")


def recipe_again(recipe: Recipe, status: RunStatus, run: RunDirectory, base: Path, place: Path) -> Recipe:
    """The recipe of a run like `run`, with what the first one found out by itself written into it: how its
    base was stored in memory and how large its micro-batches were. Its files are named as they lie from here.

    Args:
        base: where the base is now.
        place: the directory that the run lies in.
    """
    model: dict[str, Any] = {}
    if not Path(recipe.model.path).exists() and status.base is not None and status.base.source is not None:
        model["path"] = str(base)
    if recipe.model.dtype == "auto" and status.base is not None and status.base.dtype is not None:
        model["dtype"] = status.base.dtype
    training: dict[str, Any] = {}
    if status.micro_batch_size is not None:
        training["micro_batch_size"] = status.micro_batch_size
    recipe = recipe_from_here(recipe, run)
    return recipe.model_copy(
        update={
            "name": f"{run.path.resolve().name}-reproduced",
            "output_dir": str(place),
            "model": recipe.model.model_copy(update=model),
            "training": recipe.training.model_copy(update=training),
        }
    )


def check_recipe(run: RunDirectory, recipe: Recipe, status: RunStatus) -> None:
    """Raises InputError for a run that was not trained here to its end, or whose recipe.yaml was changed."""
    if status.imported is not None:
        raise InputError(f"{run.path} was imported: how it was trained is not known")
    if not status.finished:
        raise InputError(
            f"{run.path} {status.ended}: only a finished run can be compared with another. Continue it with"
            f" 'linchain train {run.recipe_path} --resume'"
        )
    wanted, found = status.hashes.get("recipe"), sha256_bytes(recipe.to_yaml().encode())
    if wanted is None:
        raise InputError(
            f"{run.path}: run.json holds no hash of its recipe, so nobody knows if it is the same"
        )
    if wanted not in (found, sha256_file(run.recipe_path)):
        raise InputError(
            f"{run.recipe_path} is not the recipe that was trained ({wanted[:12]}…): it was changed since."
            " Put back what it was, or train it as a run of its own"
        )


def check_job(job: Job, status: RunStatus, run: RunDirectory) -> None:
    """Raises InputError where the rows, the base's weights or its config.json are others than the run had."""
    wrong = []
    if (wanted := status.hashes.get("data")) != job.data.report.fingerprint:
        wrong.append(
            f"the rows' files, or how they become tokens, are others ({wanted and wanted[:12]}… in run.json)"
        )
    base = status.hashes.get("base")
    if base not in (None, job.base.hash):
        wrong.append(f"the base's weights are others ({short(base)} in run.json)")
    for change in changed_values(status.base and status.base.config, job.base.config):
        wrong.append(f"the base's config.json was changed ({change})")
    if wrong:
        raise InputError(f"{run.path} cannot be reproduced: {'; '.join(wrong)}")


def changed_surroundings(status: RunStatus) -> dict[str, tuple[Any, Any]]:
    """What may round otherwise here, before and now, by name: versions, processor, threads.

    A thread count that the process does not have yet is set, where nothing else has set one.
    """
    now: dict[str, Any] = dict(versions())
    before: dict[str, Any] = dict(status.versions)
    device = status.machine.device or "cpu"
    wanted = "cuda" if device.startswith("cuda") else device
    before["device"], now["device"] = wanted, "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu" and status.machine.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(status.machine.threads))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        before["threads"], now["threads"] = status.machine.threads, torch.get_num_threads()
    return {key: (before[key], now.get(key)) for key in before if before[key] != now.get(key)}


@dataclass(frozen=True)
class Difference:
    """The first row of metrics.jsonl in which two runs differ."""

    step: int
    what: str
    before: Any
    now: Any


@dataclass(frozen=True)
class Reproduction:
    """What came of it.

    same: whether the adapters' tensors are bitwise the same
    first: where what was logged begins to differ; None where all logged values are the same
    rows_from: the first step that read other rows
    tensors: number of tensors that differ, of how many, and their largest distance in any value
    """

    same: bool
    logged: int
    first: Difference | None = None
    rows_from: int | None = None
    tensors: tuple[int, int, float] | None = None
    surroundings: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def compare_runs(
    run: RunDirectory, again: RunDirectory, surroundings: dict[str, tuple[Any, Any]]
) -> Reproduction:
    """Compares two finished runs' adapters, and what they logged."""
    ours, theirs = _logged(run), _logged(again)
    first = next(_differences(ours, theirs), None)
    same = adapter_hash(run.adapter_dir) == adapter_hash(again.adapter_dir)
    return Reproduction(
        same,
        len(ours),
        first,
        _other_rows(run, again),
        None if same else _distance(run, again),
        surroundings,
    )


def _logged(run: RunDirectory) -> dict[tuple[int, str], Any]:
    """What was computed, by step and name, in the order of the file."""
    return {
        (row["step"], name): row[name]
        for row in read_jsonl(run.metrics_path)
        for name in _COMPUTED
        if name in row
    }


def _differences(
    ours: dict[tuple[int, str], Any], theirs: dict[tuple[int, str], Any]
) -> Iterator[Difference]:
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if ours.get(key) != theirs.get(key):
            yield Difference(key[0], key[1], ours.get(key), theirs.get(key))


def _other_rows(run: RunDirectory, again: RunDirectory) -> int | None:
    before, now = read_jsonl(run.rows_path), read_jsonl(again.rows_path)
    for one, other in zip(before, now, strict=False):
        if one != other:
            return one.get("step")
    longer = max(before, now, key=len)[min(len(before), len(now)) :]
    return longer[0].get("step") if longer else None


def _distance(run: RunDirectory, again: RunDirectory) -> tuple[int, int, float]:
    one, other = (named_tensors(load_adapter(each.adapter_dir)) for each in (run, again))
    gaps = [
        float((one[name] - other[name]).abs().max())
        if name in one and name in other and one[name].shape == other[name].shape
        else float("inf")
        for name in {**one, **other}
        if one.get(name) is None or other.get(name) is None or not torch.equal(one[name], other[name])
    ]
    return len(gaps), len({**one, **other}), max(gaps, default=0.0)
