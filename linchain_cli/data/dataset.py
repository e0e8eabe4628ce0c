"""From a recipe's data section to encoded rows, cached by everything that they depend on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from linchain_cli.data.encoding import EncodedText, TextEncoder
from linchain_cli.data.fingerprint import encoding_fingerprint
from linchain_cli.data.formats import Rows, check_text
from linchain_cli.data.report import DataReport, SourceReport
from linchain_cli.data.rows import Rendered, RowError, Template
from linchain_cli.data.sources import Source, SourceRequest, resolve_source
from linchain_cli.data.store import FORMAT_VERSION, EncodedRows, EncodedStore, StoreWriter
from linchain_cli.data.templates import template_of
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.model.gguf import cache_root
from linchain_cli.storage import staged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.recipe import DataConfig

_CHUNK_ROWS = 2048
_CHUNK_CHARACTERS = 4_000_000
_EXAMPLES = 5
_AUTO_VALIDATION = 120

Progress = Callable[[int], None]


@dataclass
class PreparedData:
    """What a run trains on. `validation_report` is about validation rows with a source of their own."""

    train: EncodedRows
    validation: EncodedRows | None
    template: Template
    report: DataReport
    validation_report: DataReport | None = None


@dataclass(frozen=True)
class EncodingSettings:
    """What of a recipe changes the encoded rows, beside sources, tokenizer and template."""

    max_length: int
    train_on_inputs: bool
    skip_bad: bool


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> PreparedData:
    """Reads, renders and encodes the rows of a recipe, or opens what an earlier call encoded.

    Args:
        config: the recipe's data section.
        tokenizer: a fast tokenizer; its template, EOS and leading tokens are part of the rows.
        cache_dir: where encodings are kept, else `encoded` in the tool's cache ($LINCHAIN_CACHE).
        data_dir: a directory that may hold registered data sets as files.
        progress: called with the number of rows read so far.

    Raises:
        InputError: a source is missing, a row is bad (or none is good), rows have no supervised token,
            or more rows are to be held out than there are.
    """
    template = template_of(config, tokenizer)
    cache_dir = Path(cache_dir) if cache_dir else cache_root() / "encoded"
    settings = EncodingSettings(config.max_length, config.train_on_inputs, config.on_bad_row == "skip")

    def encoded(sources: Sequence[Any]) -> tuple[EncodedStore, DataReport]:
        found = [resolve_source(source, data_dir) for source in sources]
        store, report = _open_or_encode(found, tokenizer, template, settings, cache_dir, progress)
        _check_supervised(report, config.max_unsupervised_share, config.max_length)
        return store, report

    store, report = encoded(config.sources)
    if config.validation == "auto" or isinstance(config.validation, int):
        train, validation = hold_out(store, config.validation, config.split_seed)
        prepared = PreparedData(train, validation, template, report)
    else:
        validation_store, validation_report = encoded(
            [SourceRequest(config.validation, split="validation", columns=config.columns)]
        )
        prepared = PreparedData(
            EncodedRows(store), EncodedRows(validation_store), template, report, validation_report
        )
    report.warnings += _warnings(prepared, tokenizer)
    return prepared


def hold_out(
    store: EncodedStore, rows: int | Literal["auto"], seed: int
) -> tuple[EncodedRows, EncodedRows | None]:
    """(training rows, validation rows): `rows` of the store, chosen by `seed`, are in the second alone.

    `auto` holds out 120, but at most a tenth of the rows.
    """
    if rows == "auto":
        rows = min(_AUTO_VALIDATION, max(1, store.num_rows // 10))
    if rows == 0:
        return EncodedRows(store), None
    if rows >= store.num_rows:
        raise InputError(
            f"data.validation: {rows} rows cannot be held out of {store.num_rows}. Choose fewer, or 0 for no "
            "validation."
        )
    # RandomState's streams are frozen: the same rows in every NumPy version.
    order = np.random.RandomState(seed).permutation(np.arange(store.num_rows, dtype=np.int32))
    held_out = np.sort(order[:rows])
    return EncodedRows(store, without=held_out), EncodedRows(store, only=held_out)


def _check_supervised(report: DataReport, tolerated: float, max_length: int) -> None:
    """Stops a run in which more rows have nothing to learn than the recipe tolerates."""
    usable = report.kept + report.unsupervised
    share = report.unsupervised / usable
    if share > tolerated or not report.kept:
        examples = "".join(f"\n  {example}" for example in report.unsupervised_examples)
        raise InputError(
            f"{report.unsupervised:,} of {usable:,} rows ({share:.1%}) have no supervised token: their "
            f"prompts fill data.max_length ({max_length}), so that the answer is cut off. Raise "
            "data.max_length, or accept a share with data.max_unsupervised_share (now "
            f"{tolerated:g}).{examples}"
        )


def _warnings(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    if tokenizer.eos_token_id is None:
        found.append(
            "the tokenizer has no end-of-sequence token: the model does not learn where an answer ends"
        )
    if prepared.validation is not None:
        twice = prepared.validation.repeated_in(prepared.train)
        if twice:
            found.append(
                f"{twice:,} of {len(prepared.validation):,} validation rows also occur among the training "
                "rows"
            )
    return found


def _open_or_encode(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    settings: EncodingSettings,
    cache_dir: Path,
    progress: Progress | None,
) -> tuple[EncodedStore, DataReport]:
    fingerprint = encoding_fingerprint(
        sources, tokenizer, template, {"format": FORMAT_VERSION, **asdict(settings)}, cache_dir
    )
    target = cache_dir / fingerprint[:32]
    if found := _open(target, sources):
        return found
    with _cache_problems(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(cache_dir / f".{target.name}.lock"):
            found = _open(target, sources)  # unless another process was first
            if not found:
                shutil.rmtree(target, ignore_errors=True)  # what does not open is damaged
                _encode_to(target, fingerprint, sources, TextEncoder(tokenizer), template, settings, progress)
    store, report = found or _open(target, sources)
    report.cached = bool(found)
    return store, report


def _open(directory: Path, sources: Sequence[Source]) -> tuple[EncodedStore, DataReport] | None:
    """What an earlier call encoded; None if there is nothing, or not the whole of it."""
    try:
        store = EncodedStore(directory)
        report = DataReport.from_dict(store.report)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    report.cached = True
    report.move([(source.name, source.location) for source in sources])
    return store, report


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Waits for a process that encodes the same rows. Where files cannot be locked, both do, to one end."""
    with open(lock, "w") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_problems(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise LinchainError(
                f"No space is left for encoded rows in {cache_dir}. Free some, or set LINCHAIN_CACHE to "
                "another directory."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR) and _lies_in(
            error.filename, cache_dir
        ):
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
    sources: Sequence[Source],
    encoder: TextEncoder,
    template: Template,
    settings: EncodingSettings,
    progress: Progress | None,
) -> None:
    try:
        with staged_directory(target) as staging, StoreWriter(staging) as writer:
            report = DataReport(fingerprint=fingerprint)
            for rows in _encoded_chunks(
                _rendered(sources, template, settings, report), encoder, template, settings
            ):
                writer.append([row.encoded for row in rows if _count(row, report)])
                if progress:
                    progress(report.total)
            for source in report.sources:
                source.kept = source.total - source.skipped
            writer.finish(report.to_dict())
    except OSError as error:
        # Without locks another process can have been first; its rows are the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _open(target, sources):
            raise


@dataclass
class _Row:
    source: SourceReport
    place: str
    rendered: Rendered
    encoded: EncodedText | None = None


def _rendered(
    sources: Sequence[Source], template: Template, settings: EncodingSettings, report: DataReport
) -> Iterator[_Row]:
    """The usable rows of all sources as text; bad ones are counted in `report`, or end it with InputError."""
    for source in sources:
        counts = SourceReport(source.name, source.location)
        report.sources.append(counts)
        rows = Rows(source, template.layouts, settings.skip_bad)
        for row in rows:
            try:
                rendered = template.render(row)
                for one in rendered:
                    check_text(one.text, row)
            except RowError as error:
                rows.reject(error)
                continue
            finally:
                counts.total, counts.bad = rows.total, rows.skipped
            yield from (_Row(counts, rows.place(), one) for one in rendered)
        counts.total, counts.bad = rows.total, rows.skipped
        report.bad_examples += rows.problems[: _EXAMPLES - len(report.bad_examples)]


def _encoded_chunks(
    rows: Iterator[_Row], encoder: TextEncoder, template: Template, settings: EncodingSettings
) -> Iterator[list[_Row]]:
    """Encodes chunk by chunk, the next one being read and rendered meanwhile."""

    def encode(chunk: list[_Row]) -> list[_Row]:
        encoded = encoder.encode(
            [row.rendered for row in chunk],
            adds_bos=template.adds_bos,
            max_length=settings.max_length,
            train_on_inputs=settings.train_on_inputs,
        )
        for row, result in zip(chunk, encoded, strict=True):
            row.encoded = result
        return chunk

    pending: deque[Future[list[_Row]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for chunk in _chunks(rows):
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _chunks(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Lists of rows, bounded in number and in characters."""
    chunk: list[_Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.rendered.text)
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _count(row: _Row, report: DataReport) -> bool:
    """Adds a row to the report; whether it has a supervised token, and so is kept."""
    encoded = row.encoded
    supervised = int(np.count_nonzero(encoded.supervised))
    report.longest = max(report.longest, encoded.full_length)
    if not supervised:
        row.source.unsupervised += 1
        if len(report.unsupervised_examples) < _EXAMPLES:
            report.unsupervised_examples.append(f"{row.place}: {encoded.full_length:,} tokens")
        return False
    report.tokens += len(encoded.input_ids)
    report.supervised_tokens += supervised
    report.truncated += encoded.truncated
    report.straddling_rows += encoded.straddling > 0
    report.straddling_tokens += encoded.straddling
    return True
