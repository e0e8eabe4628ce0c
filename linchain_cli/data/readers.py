"""Files of text, one row at a time: .json (a list, or one object after another), .jsonl, .csv and .tsv.

A reader yields a row (a dict), or a RowError for one that cannot be read but can be skipped. What breaks
the file as a whole raises InputError. Both name the line. Memory does not grow with the file, and a row of
absurd size is refused before it fills the memory.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from linchain_cli.data.rows import RowError
from linchain_cli.data.streams import open_bytes
from linchain_cli.errors import InputError

MAX_CELL = 5_000_000  # characters; tokenising more takes minutes and gigabytes, for a few hundred tokens kept
MAX_LINE = 64 << 20  # bytes of one row, whatever its columns
_BLOCK = 1 << 20
_BOM = codecs.BOM_UTF8
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_JSON_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# How files begin that are something else than their name says.
_OTHER_FILES = {
    codecs.BOM_UTF16_LE: "the file is UTF-16 text. Save it as UTF-8.",
    codecs.BOM_UTF16_BE: "the file is UTF-16 text. Save it as UTF-8.",
    b"\x1f\x8b": "the file is compressed (gzip). Put .gz behind its name.",
    b"BZh": "the file is compressed (bzip2). Put .bz2 behind its name.",
    b"\xfd7zXZ": "the file is compressed (xz). Put .xz behind its name.",
    b"\x28\xb5\x2f\xfd": "the file is compressed (zstd). Put .zst behind its name.",
    b"PK\x03\x04": "the file is a zip archive or a spreadsheet. Unpack it, or save its rows as CSV.",
    b"PAR1": "the file is a parquet file. Its name has to end in .parquet.",
}


class Reader:
    """Rows of one file, in one pass.

    `row` is the number of the last one, from 1; `line` is where it begins, for formats that have lines;
    `header` the columns, for formats that name them once. `name` is what messages call the file.
    """

    def __init__(self, path: Path, name: str = ""):
        self.path = path
        self.name = name or str(path)
        self.row = 0
        self.line: int | None = None
        self.header: list[str] | None = None

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        raise NotImplementedError

    def problem(self, message: str, line: int | None = None) -> InputError:
        place = f"{self.name}:{line}" if line else self.name
        return InputError(f"{place}: {message}")


class _LineReader(Reader):
    """Lines of UTF-8 text, each with its number and the offset of its first byte."""

    def __init__(self, path: Path, name: str = ""):
        super().__init__(path, name)
        self._line = 0

    def _lines(self, handle: BinaryIO) -> Iterator[tuple[bytes | None, int]]:
        """(line, offset); None in place of a line of more than MAX_LINE bytes."""
        offset = _skip_byte_order_mark(handle, self)
        while raw := handle.readline(MAX_LINE):
            self._line += 1
            start, offset = offset, offset + len(raw)
            whole: bytes | None = raw
            while not raw.endswith(b"\n") and (raw := handle.readline(MAX_LINE)):
                whole, offset = None, offset + len(raw)
            yield whole, start

    def _texts(self, handle: BinaryIO) -> Iterator[str | RowError]:
        """The lines that are not blank, each with its number, or why one cannot be read."""
        for raw, offset in self._lines(handle):
            if raw is None:
                yield RowError(f"the line has more than {MAX_LINE:,} bytes")
            elif raw.strip():
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    yield RowError(_not_utf8(error, offset))

    def _check_header(self, header: list[str], line: int) -> None:
        if twice := [name for name in header if header.count(name) > 1]:
            raise self.problem(f"the header names the column '{shown(twice[0])}' twice.", line)


def _skip_byte_order_mark(handle: BinaryIO, reader: Reader) -> int:
    """Reads over a UTF-8 byte-order mark and returns its length; refuses empty files and other encodings."""
    start = handle.peek(8)
    if not start:
        raise reader.problem("the file is empty.")
    for mark, said in _OTHER_FILES.items():
        if start.startswith(mark):
            raise reader.problem(said)
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise reader.problem(
            "the file is a web page. Get the file that it shows: at the hub its address has `resolve`, at"
            " GitHub `raw`, where the page's has `blob`."
        )
    return len(handle.read(len(_BOM))) if start.startswith(_BOM) else 0


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return f"byte {offset + error.start:,} (0x{byte:02x}) is not UTF-8. Save the file as UTF-8."


class WrittenNumber(float):
    """A number whose text is what stands in the file: 2.50 and 0.00001, where Python writes 2.5 and 1e-05."""

    __slots__ = ("_text",)
    _text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number._text = text
        return number

    def __str__(self) -> str:
        return self._text


class JsonLinesReader(_LineReader):
    """One JSON object per line; blank lines don't count."""

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        with open_bytes(self.path, self.name) as handle:
            for text in self._texts(handle):
                self.row += 1
                self.line = self._line
                yield text if isinstance(text, RowError) else self._parse(text)

    def _parse(self, text: str) -> dict[str, Any] | RowError:
        try:
            value = json.loads(text.rstrip(), parse_float=WrittenNumber)
        except json.JSONDecodeError as error:
            cut = "; the file ends here without a line break, as if it had been cut off"
            cut = "" if text.endswith("\n") else cut
            return RowError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{cut}")
        except (ValueError, RecursionError) as error:
            return RowError(_unreadable_json(error))
        return value if isinstance(value, dict) else RowError(_not_an_object(value))


def _not_an_object(value: Any) -> str:
    return f'the row is {_kind(value)}, not an object like {{"instruction": ..., "output": ...}}'


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _unreadable_json(error: Exception) -> str:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return f"not JSON that can be read: {reason}"


class JsonReader(Reader):
    """A list of objects, or objects one after another, parsed as the file is read."""

    def __init__(self, path: Path, name: str = ""):
        super().__init__(path, name)
        self._decoder = json.JSONDecoder(parse_float=WrittenNumber)
        self._text, self._at = "", 0  # a window of the file's text, and where in it we are
        self._dropped = 0  # characters before the window
        # Line breaks up to a position of the window.
        self._counted, self._line_breaks, self._line_start = 0, 0, 0

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        with open_bytes(self.path, self.name) as handle:
            self._handle, self._offset = handle, _skip_byte_order_mark(handle, self)
            self._decode = codecs.getincrementaldecoder("utf-8")()
            self._ended = False
            first = self._next_character()
            if first == "[":
                yield from self._list()
            elif first == "{":
                yield from self._sequence()
            elif not first:
                raise self.problem("the file holds only white space.")
            else:
                raise self._problem_here("not JSON: a list of objects begins with '[', or an object with '{'")

    def _list(self) -> Iterator[dict[str, Any] | RowError]:
        self._at += 1
        if self._next_character() == "]":
            raise self.problem("the list is empty.")
        while True:
            yield self._row()
            mark = self._next_character()
            self._at += 1
            if mark == "]":
                break
            if mark != ",":
                self._at -= 1
                raise self._unfinished() if not mark else self._problem_here("not JSON: ',' or ']' expected")
            if self._next_character() == "]":
                raise self._problem_here("not JSON: a comma before the end of the list")
        if self._next_character():
            raise self._problem_here("not JSON: more text after the end of the list")

    def _sequence(self) -> Iterator[dict[str, Any] | RowError]:
        while self._next_character():
            yield self._row()

    def _row(self) -> dict[str, Any] | RowError:
        if not self._next_character():
            raise self._unfinished()
        value, end = self._value()
        self.row += 1
        self.line, _ = self._place(self._at)
        self._at = end
        return value if isinstance(value, dict) else RowError(_not_an_object(value))

    def _value(self) -> tuple[Any, int]:
        """The JSON value at the current position and where it ends; reads on while it may be incomplete."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                incomplete = self._may_go_on(error)
                if incomplete and not self._ended:
                    self._read_on()
                elif incomplete:
                    raise self._unfinished() from None
                else:
                    raise self._problem_here(f"not JSON: {error.msg}", error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._problem_here(_unreadable_json(error)) from None
            else:
                if end < len(self._text) or self._ended:  # "12" at the end may go on as "123"
                    return value, end
                self._read_on()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether the text only lacks its rest: it ends where the error is, or in a word or string."""
        rest = self._text[error.pos : error.pos + 16].rstrip()
        in_string = error.msg.startswith("Unterminated string") or "escape" in error.msg and len(rest) < 8
        return in_string or any(word.startswith(rest) for word in _JSON_WORDS)

    def _read_on(self) -> None:
        """Drops the text before the current position and reads at least as much as is waiting."""
        if len(self._text) - self._at > MAX_LINE:
            raise self._problem_here(f"row {self.row + 1} has more than {MAX_LINE:,} characters")
        block = self._handle.read(max(_BLOCK, len(self._text) - self._at))
        pending = len(self._decode.getstate()[0])
        try:
            text = self._decode.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise self.problem(_not_utf8(error, self._offset - pending)) from None
        self._offset += len(block)
        self._ended = not block
        self._place(self._at)
        self._dropped += self._at
        self._text, self._at, self._counted = self._text[self._at :] + text, 0, 0

    def _next_character(self) -> str:
        """Skips white space; the character behind it, or "" at the end of the file."""
        while True:
            self._at = _WHITE_SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read_on()

    def _place(self, position: int) -> tuple[int, int]:
        """(line, column) of a position of the window; positions are asked for in rising order."""
        self._line_breaks += self._text.count("\n", self._counted, position)
        last = self._text.rfind("\n", self._counted, position)
        if last >= 0:
            self._line_start = self._dropped + last + 1
        self._counted = position
        return self._line_breaks + 1, self._dropped + position - self._line_start + 1

    def _problem_here(self, message: str, position: int | None = None) -> InputError:
        line, column = self._place(self._at if position is None else position)
        return self.problem(f"{message} (column {column}, behind row {self.row}).", line)

    def _unfinished(self) -> InputError:
        line, _ = self._place(len(self._text))
        return self.problem(
            f"the file ends in the middle, behind row {self.row}: it was cut off. Get it again.", line
        )


_CSV_REASONS = {
    "unexpected end of data": "a quote that is opened here is never closed",
    "field larger than field limit": f"a cell has more than {MAX_CELL:,} characters (is a quote left open?)",
    "new-line character seen": "a carriage return outside quotes",
}


class CsvReader(_LineReader):
    """Comma-separated values with a header line, quoted as RFC 4180 says."""

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        before = csv.field_size_limit(MAX_CELL)  # a setting of the whole process
        try:
            with open_bytes(self.path, self.name) as handle:
                yield from self._rows(csv.reader(self._decoded(handle), strict=True))
        finally:
            csv.field_size_limit(before)

    def _rows(self, rows: Iterator[list[str]]) -> Iterator[dict[str, Any] | RowError]:
        self.header = self._next(rows)
        if not self.header:
            raise self.problem("there is no header line that names the columns.")
        self._check_header(self.header, 1)
        if len(self.header) == 1 and (other := next((mark for mark in "\t;|" if mark in self.header[0]), "")):
            raise self.problem(
                f"the columns are separated by {other!r}, not by commas. Write the file with commas"
                f"{', or end its name in .tsv' if other == chr(9) else ''}.",
                1,
            )
        while (cells := self._next(rows)) is not None:
            self.line = self._begin
            if not cells:  # a blank line
                continue
            self.row += 1
            if len(cells) == len(self.header):
                yield dict(zip(self.header, cells, strict=True))
            else:
                yield RowError(
                    f"the row has {len(cells)} cells where the header names {len(self.header)} columns; a "
                    "comma or line break inside a cell needs quotes around the cell"
                )
        if not self.row:
            raise self.problem("there is a header line and no row.")

    def _next(self, rows: Iterator[list[str]]) -> list[str] | None:
        self._begin = self._line + 1
        try:
            return next(rows, None)
        except csv.Error as error:
            reason = next(
                (ours for theirs, ours in _CSV_REASONS.items() if str(error).startswith(theirs)), str(error)
            )
            raise self.problem(f"not CSV: {reason}.", self._begin) from None

    def _decoded(self, handle: BinaryIO) -> Iterator[str]:
        for raw, offset in self._lines(handle):
            if raw is None:
                raise self.problem(f"the line has more than {MAX_LINE:,} bytes.", self._line)
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self.problem(_not_utf8(error, offset), self._line) from None


class TsvReader(_LineReader):
    """Tab-separated values with a header line, unless `header` was set before. Quotes are part of the text,
    as in GLUE's files; only a cell that was quoted because it holds quotes is taken out of them."""

    def __iter__(self) -> Iterator[dict[str, Any] | RowError]:
        with open_bytes(self.path, self.name) as handle:
            for text in self._texts(handle):
                if self.header is None:
                    if isinstance(text, RowError):
                        raise self.problem(f"{text}.", self._line)
                    self.header = _cells(text)
                    self._check_header(self.header, self._line)
                    continue
                self.row += 1
                self.line = self._line
                yield text if isinstance(text, RowError) else self._parse(_cells(text))
        if not self.row:
            raise self.problem("there is no row (behind the header line).")

    def _parse(self, cells: list[str]) -> dict[str, Any] | RowError:
        if len(cells) == len(self.header):
            return dict(zip(self.header, cells, strict=True))
        return RowError(
            f"the row has {len(cells)} cells where the header names {len(self.header)} columns; a .tsv file "
            "cannot hold tabs or line breaks inside a cell (.csv and .jsonl can)"
        )


def _cells(line: str) -> list[str]:
    return [_unquoted(cell) if '""' in cell else cell for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    inner = cell[1:-1].replace('""', "\0")
    quoted = len(cell) > 3 and cell[0] == cell[-1] == '"' and '"' not in inner
    return inner.replace("\0", '"') if quoted else cell


def shown(value: Any) -> str:
    """A name or value out of a file, short and on one line, as it may stand in a message."""
    text = value if isinstance(value, str) and value and value.isprintable() else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def starts_list(reader: Reader) -> bool:
    """Whether the file begins with the [ of a JSON list."""
    with open_bytes(reader.path, reader.name) as handle:
        return handle.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")
