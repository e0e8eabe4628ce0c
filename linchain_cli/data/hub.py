"""Data sets through `datasets`: those of the Hugging Face hub, with its failures as one message each, and
those that it saved."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from linchain_cli.errors import InputError, did_you_mean, first_line
from linchain_cli.model.hub import DATA_SET, hub_problems, unknown_on_hub

if TYPE_CHECKING:
    import datasets


@functools.lru_cache(maxsize=4)
def load_hub_dataset(
    name: str, split: str, revision: str | None, config: str | None = None, data_files: str | None = None
) -> datasets.Dataset:
    """One split of a hub data set, downloaded once and memory-mapped; or a directory, as `datasets` sees it.

    `name` is owner/data-set, owner/data-set/configuration or a directory. `data_files` is JSON: a pattern of
    file names, a list of them, or an object from split to either. Raises InputError when there is no such
    data set, split, revision or configuration, it is gated, or the hub cannot be reached.
    """
    import datasets

    repository = name
    if not os.path.isdir(name):
        owner, _, rest = name.partition("/")
        repository, _, named = rest.partition("/")
        repository, config = f"{owner}/{repository}" if repository else owner, config or named or None
    options = {"data_files": json.loads(data_files)} if data_files else {}
    with _hub_problems(repository, split, revision), _retries_told_once():
        return datasets.load_dataset(repository, config, split=split, revision=revision, **options)


@functools.lru_cache(maxsize=4)
def load_saved(directory: str) -> dict[str, datasets.Dataset]:
    """What `save_to_disk` wrote, by split; a data set without splits is `train`.

    Raises InputError when it cannot be read.
    """
    import datasets

    try:
        found = datasets.load_from_disk(directory)
    except Exception as error:  # pyarrow's, and those of damaged or foreign JSON
        raise InputError(
            f"data: {directory} cannot be read as a data set that `save_to_disk` wrote: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        return dict(found)
    return {"train": found}


def content_of(dataset: datasets.Dataset) -> list[str]:
    """What identifies the data: its files, or for data in memory the library's own fingerprint."""
    return [entry["filename"] for entry in dataset.cache_files] or [dataset._fingerprint]


def hub_rows(dataset: datasets.Dataset, wanted: set[str]) -> Iterator[dict[str, Any]]:
    """The rows, with the columns in `wanted` (all, if none of them is there). A data set may be saved with a
    format, of tensors say, and with columns that this leaves out: they are read as they are stored."""
    columns = [name for name in dataset.column_names if name in wanted] or dataset.column_names
    for batch in dataset.with_format(None).select_columns(columns).iter(1000):
        for values in zip(*(batch[name] for name in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


class _ToldOnce(logging.Filter):
    """Of all remarks about a hub that does not answer, lets one through, in other words."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "Retrying in" not in text and "thrown while requesting" not in text:
            return True
        record.msg, record.args = "The hub does not answer; it is asked again for half a minute.", ()
        first, self.told = not self.told, True
        return first


@contextlib.contextmanager
def _retries_told_once() -> Iterator[None]:
    logger, once = logging.getLogger("huggingface_hub.utils._http"), _ToldOnce()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)


@contextlib.contextmanager
def _hub_problems(name: str, split: str, revision: str | None) -> Iterator[None]:
    """Turns what datasets and huggingface_hub raise into an InputError that says what to do."""
    import datasets

    try:
        with hub_problems(DATA_SET, name, revision):
            yield
    except InputError:
        raise
    except Exception as error:
        text, otherwise = first_line(error), DATA_SET.otherwise
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            raise InputError(unknown_on_hub(DATA_SET, name)) from error
        if isinstance(error, ValueError) and text.startswith("Unknown split"):
            known = text.partition("Should be one of ")[2].strip(" .")
            hint = did_you_mean(split, known.strip("[]").replace("'", "").split(", "))
            raise InputError(
                f"The data set '{name}' has no split '{split}'. Splits: {known}.{hint}"
            ) from error
        if isinstance(error, ValueError) and text.startswith(("Config name is missing", "BuilderConfig")):
            raise InputError(
                f"The data set '{name}': {text} Give it as {name}/CONFIGURATION, or as `config` beside "
                "its path."
            ) from error
        if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
            raise InputError(
                f"The data set '{name}' is made by a script, which is not run. Try data.revision: "
                f"refs/convert/parquet, {otherwise}."
            ) from error
        raise InputError(f"The data set '{name}' cannot be loaded: {type(error).__name__}: {text}") from error
