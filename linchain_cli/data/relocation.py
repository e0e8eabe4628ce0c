"""A run's recipe, read in another directory than it was written for: where its files are from here."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from linchain_cli.data.glue import PREFIX
from linchain_cli.data.sources import DATASET_NAMES
from linchain_cli.recipe import Recipe
from linchain_cli.recipe.data import SourceConfig
from linchain_cli.recipe.schema import HARNESS_PREFIX
from linchain_cli.run import RunDirectory
from linchain_cli.storage import expand


def recipe_from_here(recipe: Recipe, run: RunDirectory) -> Recipe:
    """The recipe of `run` with those relative paths of rows, tasks and adapters made absolute that lead to
    nothing from the current directory, and to something from the one in which the run was started, or, where
    all was moved together, from one around the run's own. What is found nowhere stays as it is.
    """
    started_in = run.read_status().started_in
    places = [*([Path(started_in)] if started_in else []), *run.path.resolve().parents]

    def found(path: str) -> str:
        return _found(path, places)

    def task(name: str) -> str:
        prefix = HARNESS_PREFIX if name.startswith(HARNESS_PREFIX) else ""
        path = name.removeprefix(prefix)
        return prefix + (found(path) if "." in path or "/" in path else path)

    def source(one: SourceConfig) -> SourceConfig:
        return one.model_copy(update={"path": found(one.path)})

    data, evaluation, adapter = recipe.data, recipe.evaluation, recipe.adapter
    changes: dict[str, object] = {"train": [source(one) for one in data.train]}
    if isinstance(data.validation, list):
        changes["validation"] = [source(one) for one in data.validation]
    elif isinstance(data.validation, SourceConfig):
        changes["validation"] = source(data.validation)
    elif data.validation_sources:
        changes["validation"] = found(data.validation)
    tasks = [task(name) for name in evaluation.tasks]
    folder = evaluation.data_dir and found(evaluation.data_dir)
    start = adapter.init_from and found(adapter.init_from)
    return recipe.model_copy(
        update={
            "data": data.model_copy(update=changes),
            "evaluation": evaluation.model_copy(update={"tasks": tasks, "data_dir": folder}),
            "adapter": adapter.model_copy(update={"init_from": start}),
        }
    )


def _found(path: str, places: Iterable[Path]) -> str:
    """`path`, below the first of the places where there is something, unless there is here."""
    named = path in DATASET_NAMES or path.startswith(PREFIX) or "://" in path
    if named or expand(path).is_absolute() or _is_there(path):
        return path
    return next((below for place in places if _is_there(below := os.path.join(place, path))), path)


def _is_there(path: str) -> bool:
    return (
        os.path.exists(path)
        or glob.has_magic(path)
        and next(glob.iglob(path, recursive=True), None) is not None
    )
