"""Encoded rows, kept by everything that they depend on: opened if they are there, made once if not."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.data.fingerprint import encoding_fingerprint
from linchain_cli.data.labelled import Encoder, encoder_for
from linchain_cli.data.pipeline import EncodingSettings, Progress, encode_sources
from linchain_cli.data.report import DataReport
from linchain_cli.data.rows import Template
from linchain_cli.data.sources import Source
from linchain_cli.data.store import FORMAT_VERSION, EncodedStore, StoreWriter
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.locks import locked
from linchain_cli.storage import NO_ROOM, remove_staging, staged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = Sequence[tuple[Source, Template]]

# The last one of a home that is nowhere.
_WRONG_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)


def open_or_encode(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncodingSettings,
    cache_dir: Path,
    progress: Progress | None = None,
) -> tuple[EncodedStore, DataReport]:
    """The training rows of the sources, each through its template, and what there is to tell of them."""
    fingerprint = encoding_fingerprint(sources, tokenizer, _parts(settings), cache_dir)
    target = cache_dir / fingerprint[:32]
    with _cache_problems(cache_dir):
        if found := _open(target, sources):
            return found
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(target, wait=None, needed=False):
            found = _open(target, sources)  # unless another process was first
            if not found:
                shutil.rmtree(target, ignore_errors=True)  # what does not open is damaged
                remove_staging(cache_dir, spare_living=True)
                encoder = encoder_for(sources[0][1], tokenizer)
                _encode_to(target, fingerprint, sources, encoder, settings, progress)
    store, report = found or _open(target, sources)
    report.cached = bool(found)
    return store, report


def _parts(settings: EncodingSettings) -> dict[str, object]:
    """The settings that a fingerprint holds. Those that came later are in it where they are not at their
    default, so that rows encoded before are found."""
    parts = {"format": FORMAT_VERSION, **asdict(settings)}
    if settings.on_long_row == "cut":
        del parts["on_long_row"]
    if settings.skip_bad or settings.train_on_inputs:
        # Null in an optional column is not bad; an answer that is cut off is not learned from.
        parts["counted"] = 2
    return parts


def _open(directory: Path, sources: Sources) -> tuple[EncodedStore, DataReport] | None:
    """What an earlier call encoded; None if there is nothing, or not the whole of it.

    Raises:
        OSError: it is there and may not be read, say: no reason to take it for damaged.
    """
    try:
        store = EncodedStore(directory)
        report = DataReport.from_dict(store.report)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    report.cached = True
    report.move([(source.name, source.location) for source, _ in sources])
    return store, report


@contextlib.contextmanager
def _cache_problems(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LinchainError(
                f"No space is left for encoded rows in {cache_dir}. Free some, or set LINCHAIN_CACHE to "
                "another directory."
            ) from error
        if error.errno in _WRONG_PLACE and _lies_in(error.filename, cache_dir):
            raise InputError(
                f"Encoded rows cannot be kept in {cache_dir} ({error.strerror}). Set LINCHAIN_CACHE to a "
                "directory that can be written."
            ) from error
        raise


def _lies_in(filename: str | None, directory: Path) -> bool:
    path = Path(filename or "")
    return path == directory or path in directory.parents or directory in path.parents


def _encode_to(
    target: Path,
    fingerprint: str,
    sources: Sources,
    encoder: Encoder,
    settings: EncodingSettings,
    progress: Progress | None,
) -> None:
    try:
        with staged_directory(target) as staging, StoreWriter(staging) as writer:
            report = DataReport(fingerprint=fingerprint)
            encode_sources(sources, encoder, settings, writer, report, progress)
            writer.finish(report.to_dict())
    except OSError as error:
        # Without locks another process can have been first; its rows are the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _open(target, sources):
            raise
