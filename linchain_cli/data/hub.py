"""Data sets of the Hugging Face hub, through `datasets`, with its failures as one message each."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import datasets

_LOCAL_FILE = "or give the path of a .json, .jsonl, .csv or .parquet file"


@functools.lru_cache(maxsize=4)
def load_hub_dataset(name: str, split: str, revision: str | None) -> datasets.Dataset:
    """One split of a hub data set, downloaded once and memory-mapped.

    `name` is owner/data-set, or owner/data-set/configuration. Raises InputError when there is no such data
    set, split, revision or configuration, it is gated, or the hub cannot be reached.
    """
    import datasets

    owner, _, rest = name.partition("/")
    repository, _, configuration = rest.partition("/")
    repository = f"{owner}/{repository}" if repository else owner
    with _hub_problems(repository, split, revision), _retries_told_once():
        return datasets.load_dataset(repository, configuration or None, split=split, revision=revision)


def content_of(dataset: datasets.Dataset) -> list[str]:
    """What identifies the data: its files, or for data in memory the library's own fingerprint."""
    return [entry["filename"] for entry in dataset.cache_files] or [dataset._fingerprint]


def hub_rows(dataset: datasets.Dataset, wanted: set[str]) -> Iterator[dict[str, Any]]:
    """The rows, with the columns in `wanted` (all, if none of them is there)."""
    columns = [name for name in dataset.column_names if name in wanted] or dataset.column_names
    for batch in dataset.select_columns(columns).iter(1000):
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
    from huggingface_hub import errors

    try:
        yield
    except Exception as error:
        chain = list(_causes(error))
        text = _first_line(error)

        def caused_by(*kinds: type[BaseException]) -> bool:
            return any(isinstance(cause, kinds) for cause in chain)

        if caused_by(errors.GatedRepoError) or "gated dataset" in text:
            raise InputError(
                f"The data set '{name}' is gated. Accept its terms at "
                f"https://huggingface.co/datasets/{name}, then log in with 'hf auth login' or set HF_TOKEN "
                f"to a token of that account, {_LOCAL_FILE}."
            ) from error
        if caused_by(errors.RevisionNotFoundError):
            raise InputError(
                f"The data set '{name}' has no revision '{revision}'. Check data.revision."
            ) from error
        if caused_by(errors.RepositoryNotFoundError, errors.HFValidationError):
            raise InputError(_unknown(name)) from error
        if caused_by(errors.HfHubHTTPError):
            raise InputError(
                f"The hub refused the data set '{name}' ({text}). Try again later, {_LOCAL_FILE}."
            ) from error
        if caused_by(ConnectionError, TimeoutError, errors.HTTPError, errors.LocalEntryNotFoundError):
            raise InputError(
                f"The data set '{name}' is not on this machine, and the hub cannot be reached: check the "
                "network or the proxy, unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE if they are set, "
                f"{_LOCAL_FILE}."
            ) from error
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            raise InputError(_unknown(name)) from error
        if isinstance(error, ValueError) and text.startswith("Unknown split"):
            known = text.partition("Should be one of ")[2].strip(" .")
            hint = did_you_mean(split, known.strip("[]").replace("'", "").split(", "))
            raise InputError(
                f"The data set '{name}' has no split '{split}'. Splits: {known}.{hint}"
            ) from error
        if isinstance(error, ValueError) and text.startswith(("Config name is missing", "BuilderConfig")):
            raise InputError(f"The data set '{name}': {text} Give it as {name}/CONFIGURATION.") from error
        if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
            raise InputError(
                f"The data set '{name}' is made by a script, which is not run. Try data.revision: "
                f"refs/convert/parquet, {_LOCAL_FILE}."
            ) from error
        raise InputError(f"The data set '{name}' cannot be loaded: {type(error).__name__}: {text}") from error


def _unknown(name: str) -> str:
    return (
        f"The hub has no data set '{name}' that you may see. Check the spelling; if it is private, log in "
        f"with 'hf auth login' or set HF_TOKEN; {_LOCAL_FILE}."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
