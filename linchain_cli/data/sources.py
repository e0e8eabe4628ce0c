"""Where rows come from: a registered name, files, a saved or a hub data set.

A `Source` says what it is and where it lies; nothing is read yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linchain_cli.data.files import ENDINGS, DataFile, FoundFiles, find_files
from linchain_cli.data.glue import HUB_ID, TASKS, GlueSource, find_glue
from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.model.files import looks_local
from linchain_cli.recipe import SourceConfig
from linchain_cli.storage import broken_link, expand

DATA_DIR_VARIABLE = "LINCHAIN_DATA_DIR"
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+){1,2}")
_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` writes


@dataclass(frozen=True)
class Source:
    """One data source, found but not read. `columns` are names of ours to theirs, `labels` words for the
    answers in its rows; `split` None is the only one or `train`."""

    name: str  # as the recipe writes it
    kind: Literal["files", "saved", "hub", "generated"]
    location: str
    split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None
    data_files: Any = None
    max_rows: int | None = None
    files: FoundFiles | None = None
    glue: str | None = None  # which of GLUE's tasks it is

    @property
    def single_file(self) -> DataFile | None:
        """The file, where the source is one file and the whole of it."""
        found = [file for files in self.files.splits.values() for file in files] if self.files else []
        return found[0] if len(found) == 1 and self.max_rows is None and not _is_slice(self.split) else None


def _is_slice(split: str | None) -> bool:
    return split is not None and not re.fullmatch(r"[\w.-]+", split)


@dataclass(frozen=True)
class _Registered:
    """A data set known by name: a local file of that name, else a hub id; generated without a file."""

    file: str | None = None
    hub: str | None = None
    origin: str = ""


_REGISTERED = {
    "commonsense170k": _Registered("commonsense_170k.json", "zwhe99/commonsense_170k"),
    "math10k": _Registered("math_10k.json", None, "ft-training_set/ of the LLM-Adapters repository"),
    "everyday": _Registered(),
}
DATASET_NAMES = tuple(_REGISTERED)


def resolve_source(source: SourceConfig, data_dir: str | Path | None = None) -> Source:
    """Finds a source; registered files in `data_dir`, $LINCHAIN_DATA_DIR and the current directory.

    Raises InputError for a file that is missing or of an unknown kind, and for what is neither a file, a
    registered name nor a hub id.
    """
    settings = {
        "split": source.split,
        "revision": source.revision,
        "columns": dict(source.columns or {}),
        "labels": dict(source.labels or {}),
        "max_rows": source.max_rows,
    }
    of_the_hub = {"config": source.config, "data_files": source.data_files}
    name = source.path
    if name in _REGISTERED:
        return _registered(name, settings, data_dir)
    if found := find_glue(name, _data_folders(data_dir)):
        return _of_glue(found, name, settings)
    directory = expand(name)
    if any((directory / mark).is_file() for mark in _SAVED):
        return Source(name, "saved", str(directory), **settings)
    if directory.is_dir() and any(of_the_hub.values()):
        return Source(name, "hub", str(directory), **settings, **of_the_hub)
    if found := find_files(name):
        if given := [key for key, value in of_the_hub.items() if value]:
            raise InputError(
                f"data: {given[0]} is for data sets of the hub and directories; {name} is neither."
            )
        return Source(name, "files", found.location, **settings, files=found)
    if _HUB_ID.fullmatch(name):
        if looks_local("/".join(name.split("/")[:2])):
            hint = did_you_mean(directory.name, _beside(directory))
            raise InputError(
                f"data: there is no file or directory {name}{broken_link(directory)}, and it looks like a"
                f" path, so the hub was not asked.{hint}"
            )
        return Source(name, "hub", name, **settings, **of_the_hub)
    raise InputError(
        f"data: '{name}' is no file, hub id (owner/data-set) or registered data "
        f"set.{did_you_mean(name, DATASET_NAMES)} Registered: {', '.join(DATASET_NAMES)}. Files: {ENDINGS}."
    )


def stand_in(source: Source) -> str | None:
    """The file in which $LINCHAIN_DATA_DIR may hold a data set of the hub; None where no other is known."""
    if source.glue:
        task = TASKS[source.glue]
        split, file = task.validation
        return f"{task.directory}/{file if source.split == split else 'train.tsv'}"
    known = _REGISTERED.get(source.name)
    return known.file if known else None


def _of_glue(found: GlueSource, name: str, settings: dict[str, Any]) -> Source:
    """One of GLUE's tasks, of the hub or in files."""
    on_hub, _ = found.task.validation
    if found.files is None:
        split = on_hub if settings["split"] == "validation" else settings["split"]
        settings = settings | {"split": split}
        return Source(name, "hub", HUB_ID, **settings, config=found.name, glue=found.name)
    split = "validation" if settings["split"] == on_hub else settings["split"]
    settings = settings | {"split": split}
    return Source(name, "files", found.files.location, **settings, files=found.files, glue=found.name)


def _beside(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []


def _registered(name: str, settings: dict[str, Any], data_dir: str | Path | None) -> Source:
    known = _REGISTERED[name]
    if known.file is None:
        return Source(name, "generated", name, **settings)
    for folder in _data_folders(data_dir):
        path = str(folder / known.file)
        if os.path.isfile(path):
            return Source(name, "files", path, **settings, files=find_files(path))
    if known.hub:
        return Source(name, "hub", known.hub, **settings)
    raise InputError(
        f"data: '{name}' needs the file {known.file} (from {known.origin}) in the current directory or "
        f"in ${DATA_DIR_VARIABLE}; or give its path."
    )


def _data_folders(data_dir: str | Path | None) -> list[Path]:
    """Where registered files may lie; LLM-Adapters has them in ft-training_set/, beside its tests."""
    roots = [expand(root) for root in (data_dir, os.environ.get(DATA_DIR_VARIABLE)) if root]
    return [
        folder
        for root in roots
        for folder in (root, root / "ft-training_set", root.parent / "ft-training_set")
    ] + [Path(".")]
