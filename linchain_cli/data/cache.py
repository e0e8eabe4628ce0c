"""Encoded rows, kept by everything that they depend on: opened if they are there, made once if not. What
encoding them reported lies beside them."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.cache import cache_bytes, keep, remove_unused
from linchain_cli.data.fingerprint import encoding_fingerprint
from linchain_cli.data.labelled import Encoder, encoder_for
from linchain_cli.data.pipeline import EncodingSettings, Progress, encode_sources
from linchain_cli.data.report import REPORT_VERSION, DataReport
from linchain_cli.data.rows import Template
from linchain_cli.data.sources import Source
from linchain_cli.data.store import FORMAT_VERSION, META_FILE, EncodedStore, StoreWriter
from linchain_cli.directories import staged_directory
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.locks import locked
from linchain_cli.storage import NO_ROOM, json_bytes, remove_staging, sha256_bytes, write_durable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = Sequence[tuple[Source, Template]]

_REPORT_FILE = "report.json"

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
    # Versions that report otherwise of the same rows have entries of their own.
    target = cache_dir / sha256_bytes(f"{fingerprint} {REPORT_VERSION}".encode())[:32]
    made = None
    with _cache_problems(cache_dir):
        found = _open(target)
        if found is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(target, wait=None, needed=False):
                found = _open(target)  # unless another process was first
                if found is None:
                    shutil.rmtree(target, ignore_errors=True)  # what does not open is damaged
                    remove_staging(cache_dir, spare_living=True)
                    made = DataReport(fingerprint=fingerprint)
                    encoder = encoder_for(sources[0][1], tokenizer)
                    _encode_to(target, sources, encoder, settings, made, progress)
                    found = _open(target)
            remove_unused(cache_dir.parent)
    store, report = found
    if made is not None:
        return store, made
    report.move([(source.name, source.location) for source, _ in sources])
    report.cached = True
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


def _open(directory: Path) -> tuple[EncodedStore, DataReport] | None:
    """What an earlier call encoded and told; None if there is nothing, or not the whole of it.

    Raises:
        OSError: it is there and may not be read, say: no reason to take it for damaged.
    """
    try:
        if not keep(directory / META_FILE):
            return None
        report = DataReport.from_dict(json.loads((directory / _REPORT_FILE).read_bytes()))
        return EncodedStore(directory), report
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _cache_problems(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LinchainError(
                f"No space is left for encoded rows in {cache_dir}, which holds"
                f" {cache_bytes(cache_dir) / 1e9:.2f} GB by now: what no process reads may be removed there."
                " Free some, or set LINCHAIN_CACHE to another directory."
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
    sources: Sources,
    encoder: Encoder,
    settings: EncodingSettings,
    report: DataReport,
    progress: Progress | None,
) -> None:
    try:
        with staged_directory(target) as staging, StoreWriter(staging) as writer:
            encode_sources(sources, encoder, settings, writer, report, progress)
            writer.finish()
            write_durable(staging / _REPORT_FILE, json_bytes(report.to_dict()))
    except OSError as error:
        # Without locks another process can have been first; its rows are the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _open(target):
            raise
