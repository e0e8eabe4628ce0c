"""Encoded rows, kept by everything that they depend on: opened if they are there, made once if not.

What encoding them reported lies beside them in a file of its version: versions that report otherwise share
the rows, and each has a report of its own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from linchain_cli.cache import cache_bytes, keep, remove_unused
from linchain_cli.data.encoding import EncodedText
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
from linchain_cli.storage import (
    NO_ROOM,
    json_bytes,
    remove_staging,
    write_durable,
    write_json,
)

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
    made = None
    with _cache_problems(cache_dir):
        store = _open(target)
        if store is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with locked(target, wait=None, needed=False):
                store = _open(target)  # unless another process was first
                if store is None:
                    shutil.rmtree(target, ignore_errors=True)  # what does not open is damaged
                    remove_staging(cache_dir, spare_living=True)
                    made = DataReport(fingerprint=fingerprint)
                    encoder = encoder_for(sources[0][1], tokenizer)
                    _encode_to(target, sources, encoder, settings, made, progress)
                    store = _open(target)
            remove_unused(cache_dir.parent)
        if made is not None:
            return store, made
        report = _read_report(target, sources)
        if report is None:
            report = DataReport(fingerprint=fingerprint)
            encoder = encoder_for(sources[0][1], tokenizer)
            _report_anew(store, target, sources, encoder, settings, report, progress)
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


def _open(directory: Path) -> EncodedStore | None:
    """What an earlier call encoded; None if there is nothing, or not the whole of it.

    Raises:
        OSError: it is there and may not be read, say: no reason to take it for damaged.
    """
    try:
        return EncodedStore(directory) if keep(directory / META_FILE) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _report_path(directory: Path) -> Path:
    return directory / f"report-{REPORT_VERSION}.json"


def _read_report(directory: Path, sources: Sources) -> DataReport | None:
    """What this version told when it encoded the rows, or told anew of those of another one."""
    try:
        report = DataReport.from_dict(json.loads(_report_path(directory).read_bytes()))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    report.move([(source.name, source.location) for source, _ in sources])
    return report


def _report_anew(
    store: EncodedStore,
    directory: Path,
    sources: Sources,
    encoder: Encoder,
    settings: EncodingSettings,
    report: DataReport,
    progress: Progress | None,
) -> None:
    """Encodes rows that are there once more, for what this version reports of them. Others may be reading
    them: they stay as they are."""
    counted = _Counted()
    encode_sources(sources, encoder, settings, counted, report, progress)
    if counted.rows != store.num_rows:
        raise LinchainError(
            f"{directory} has {store.num_rows:,} encoded rows, which are {counted.rows:,} to this version"
            " of linchain: remove that directory"
        )
    with contextlib.suppress(OSError):  # of a cache that can only be read
        write_json(_report_path(directory), report.to_dict())


class _Counted:
    """Stands for a StoreWriter where the rows are there already, and only their report is not."""

    rows = 0

    def append(self, groups: Iterable[Sequence[EncodedText]]) -> None:
        self.rows += sum(map(len, groups))


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
            write_durable(_report_path(staging), json_bytes(report.to_dict()))
    except OSError as error:
        # Without locks another process can have been first; its rows are the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _open(target):
            raise
