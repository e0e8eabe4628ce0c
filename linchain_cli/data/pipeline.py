"""From the rows of sources to training rows on disk: formatted, rendered, encoded and counted, each once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from linchain_cli.data.as_written import DocumentTemplate
from linchain_cli.data.encoding import ControlTokens, EncodedText
from linchain_cli.data.formats import FormattedRows, check_text
from linchain_cli.data.labelled import Encoder, Labelled
from linchain_cli.data.packing import Packer
from linchain_cli.data.report import DataReport, SourceReport
from linchain_cli.data.rows import Rendered, RowError, Template, UnusableRow
from linchain_cli.data.sources import Source
from linchain_cli.data.store import StoreWriter
from linchain_cli.errors import InputError

_CHUNK_ROWS = 2048
_CHUNK_CHARACTERS = 4_000_000
_EXAMPLES = 5  # places of rows of one kind that are kept as text

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EncodingSettings:
    """What of a recipe changes the encoded rows, beside sources, tokenizer and templates."""

    max_length: int
    train_on_inputs: bool
    skip_bad: bool
    on_long_row: Literal["cut", "drop", "error"] = "cut"


@dataclass
class RenderedRow:
    """A row of a source with the training rows that it becomes."""

    place: str
    texts: list[Rendered] | list[Labelled]
    encoded: list[EncodedText] | None = None


def encoded_rows(
    sources: Sequence[tuple[Source, Template]], encoder: Encoder, settings: EncodingSettings
) -> Iterator[RenderedRow]:
    """The rows as they are encoded, with their places; nothing is written or told."""
    for source, template in sources:
        rows = rendered_rows(source, template, settings, SourceReport(source.name), DataReport())
        for chunk in encoded_chunks(rows, encoder, template, settings):
            yield from chunk


def encode_sources(
    sources: Sequence[tuple[Source, Template]],
    encoder: Encoder,
    settings: EncodingSettings,
    writer: StoreWriter,
    report: DataReport,
    progress: Progress | None = None,
) -> None:
    """Writes the training rows of all sources and counts them in `report`.

    Raises:
        InputError: a row cannot be used and is not to be skipped, one is too long and may not be, or none is
            left.
    """
    for source, template in sources:
        counts = SourceReport(source.name, source.location, template.name)
        report.sources.append(counts)
        packer = Packer(settings.max_length) if isinstance(template, DocumentTemplate) else None
        for rows in encoded_chunks(
            rendered_rows(source, template, settings, counts, report, encoder.control_tokens),
            encoder,
            template,
            settings,
        ):
            if packer is None:
                for row in rows:
                    _keep(row, settings, counts, report)
                writer.append(row.encoded for row in rows)
            else:
                counts.kept += len(rows)
                _write_packed(packer.rows(row.encoded[0] for row in rows), writer, report)
            if progress:
                progress(report.total)
        if packer is not None:
            _write_packed(packer.rest(), writer, report)
        counts.rows = writer.rows - sum(other.rows for other in report.sources[:-1])


def rendered_rows(
    source: Source,
    template: Template,
    settings: EncodingSettings,
    counts: SourceReport,
    report: DataReport,
    control_tokens: ControlTokens | None = None,
) -> Iterator[RenderedRow]:
    """The usable rows as text; bad ones are counted, or end it with UnusableRow. Those that hold
    `control_tokens` are counted, too."""
    rows = FormattedRows(source, template.layouts)
    bad = None
    for row in rows:
        counts.total += 1
        try:
            if isinstance(row, RowError):
                raise row
            texts = template.render(row)
            for one in texts:
                for text in one.parts:
                    check_text(text, row)
        except RowError as error:
            _leave_out(rows.place(), error, settings, counts, report)
            bad = bad or f"{rows.place()}: {error}"
        else:
            if control_tokens and (token := control_tokens.find(row)):
                report.control_rows += 1
                _note(report.control_examples, f"{rows.place()}: {token}")
            yield RenderedRow(rows.place(), texts)
    counts.unread, counts.unshown = rows.unread, rows.unshown
    if counts.bad == counts.total:
        reason = f": none of {counts.total} rows can be used; first {bad}" if bad else " has no rows."
        raise InputError(f"{source.name}{reason}")


def _leave_out(
    place: str, error: RowError, settings: EncodingSettings, counts: SourceReport, report: DataReport
) -> None:
    """Counts a row that cannot be used. Raises UnusableRow where none may be left out."""
    if not settings.skip_bad:
        raise UnusableRow(place, error) from None
    counts.bad += 1
    _note(report.bad_examples, f"{place}: {error}")


def _note(examples: list[str], message: str) -> None:
    if len(examples) < _EXAMPLES:
        examples.append(message)


def encoded_chunks(
    rows: Iterator[RenderedRow], encoder: Encoder, template: Template, settings: EncodingSettings
) -> Iterator[list[RenderedRow]]:
    """Encodes chunk by chunk, the next one being read and rendered meanwhile."""
    packed = isinstance(template, DocumentTemplate)

    def encode(chunk: list[RenderedRow]) -> list[RenderedRow]:
        encoded = iter(
            encoder.encode(
                [text for row in chunk for text in row.texts],
                adds_bos=template.adds_bos,
                max_length=settings.max_length if settings.on_long_row == "cut" and not packed else None,
                train_on_inputs=settings.train_on_inputs,
            )
        )
        for row in chunk:
            row.encoded = [next(encoded) for _ in row.texts]
        return chunk

    pending: deque[Future[list[RenderedRow]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for chunk in _chunks(rows):
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _chunks(rows: Iterator[RenderedRow]) -> Iterator[list[RenderedRow]]:
    """Lists of rows, bounded in number and in characters."""
    chunk: list[RenderedRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(text) for one in row.texts for text in one.parts)
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _keep(row: RenderedRow, settings: EncodingSettings, counts: SourceReport, report: DataReport) -> None:
    """Counts a row, and takes away those of its training rows from which nothing can be learned or that are
    too long."""
    if not any(encoded.full_length for encoded in row.encoded):
        _leave_out(
            row.place, RowError("its text is empty: the model has no token to read"), settings, counts, report
        )
        row.encoded = []
        return
    kept, long, cut_away = [], 0, 0
    for text, encoded in zip(row.texts, row.encoded, strict=True):
        report.longest = max(report.longest, encoded.full_length)
        if encoded.full_length > settings.max_length and settings.on_long_row != "cut":
            long = encoded.full_length
            continue
        supervised = int(np.count_nonzero(encoded.supervised))
        if not supervised:
            cut_away += 1
        else:
            kept.append(encoded)
            report.tokens += len(encoded.input_ids)
            report.supervised_tokens += supervised
            report.truncated += encoded.truncated
            for remark in text.remarks:
                report.remarks[remark] = report.remarks.get(remark, 0) + 1
            report.straddling_rows += encoded.straddling > 0
            report.straddling_tokens += encoded.straddling
    if long and settings.on_long_row == "error":
        raise InputError(
            f"{row.place}: the row has {long:,} tokens, data.max_length is {settings.max_length:,}. "
            "Raise it, shorten the row, or set data.on_long_row: cut or drop."
        )
    if kept:
        counts.kept += 1
        report.answers_cut_away += cut_away
    elif long:
        counts.long += 1
    else:
        counts.unsupervised += 1
        _note(report.unsupervised_examples, f"{row.place}: {row.encoded[0].full_length:,} tokens")
    row.encoded = kept


def _write_packed(rows: Iterator[EncodedText], writer: StoreWriter, report: DataReport) -> None:
    for row in rows:
        report.longest = max(report.longest, row.full_length)
        report.tokens += row.full_length
        report.supervised_tokens += row.full_length - 1
        writer.append([[row]])
