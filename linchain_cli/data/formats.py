"""From a source's rows as they are stored to the columns that a template reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from linchain_cli.data import readers
from linchain_cli.data.readers import MAX_CELL
from linchain_cli.data.reading import RawRows
from linchain_cli.data.rows import Layout, RowError, Template
from linchain_cli.data.sources import Source, SourceLike, resolve_source
from linchain_cli.errors import InputError, did_you_mean, nearest

_SURROGATE = re.compile("[\ud800-\udfff]")
_EXAMPLES = 5  # problems of rows that are kept as text


class Rows:
    """The usable rows of a source, in order, each as {the template's column: text}.

    Iterate once; then `kept + skipped == total`. With `skip_bad` a row that cannot be used is counted and
    the first few are kept in `problems`; without it, the first one raises InputError. Who finds a row
    unusable later calls `reject` before asking for the next one.
    """

    def __init__(self, source: Source, layouts: Sequence[Layout], skip_bad: bool = False):
        self.source = source
        self.total = self.kept = self.skipped = 0
        self.problems: list[str] = []
        self._skip_bad = skip_bad
        self._layouts = [_MappedLayout(layout, source.columns) for layout in layouts]
        self._raw = RawRows(source, {name for layout in self._layouts for name in layout.theirs})
        _check_columns(source, layouts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for raw in self._raw:
            if self.total == 0:
                self._check_header()
            self.total += 1
            row = raw if isinstance(raw, RowError) else self._map(raw)
            if isinstance(row, RowError):
                self.skipped += 1
                self._note(row)
            else:
                self.kept += 1
                yield row
        if not self.kept:
            reason = (
                f": none of {self.total} rows can be used; first {self.problems[0]}"
                if self.problems
                else " has no rows."
            )
            raise InputError(f"{self.source.name}{reason}")

    def reject(self, error: RowError) -> None:
        """Takes the last row back out of the kept ones."""
        self.kept -= 1
        self.skipped += 1
        self._note(error)

    def place(self) -> str:
        """Where the last row stands: file, line and row."""
        return self._raw.place()

    def _note(self, error: RowError) -> None:
        message = f"{self.place()}: {error}"
        if not self._skip_bad:
            raise InputError(f"{message}. Mend the row, or set data.on_bad_row: skip to leave such rows out.")
        if len(self.problems) < _EXAMPLES:
            self.problems.append(message)

    def _check_header(self) -> None:
        """Says at once, and of the file, what would be wrong with its every row."""
        header = self._raw.columns
        if header is not None and all(layout.missing(header) for layout in self._layouts):
            raise InputError(f"{self._raw.header_place()}: {self._missing(header)}.")

    def _map(self, raw: Mapping[str, Any]) -> dict[str, Any] | RowError:
        for layout in self._layouts:
            if not layout.missing(raw):
                return layout.pick(raw)
        return RowError(self._missing(raw))

    def _missing(self, found: Mapping[str, Any] | Sequence[str]) -> str:
        """What is missing for the layout that comes closest, and which column may be meant."""
        layout = max(self._layouts, key=lambda layout: layout.likeness(found))
        theirs = layout.missing(found)[0]
        names = [readers.shown(name) for name in found]
        others = [name for name in names if name not in layout.theirs]
        shown = ", ".join(names[:20]) or "none"
        return (
            f"there is no column '{theirs}' (columns: {shown}).{did_you_mean(theirs, others)} If it has "
            f"another name, map it with data.columns: {{{layout.ours_of(theirs)}: "
            f"{nearest(theirs, others) or 'NAME'}}}"
        )


class _MappedLayout:
    """A template's layout with the source's own column names."""

    def __init__(self, layout: Layout, columns: Mapping[str, str]):
        self._required = [(ours, columns.get(ours, ours)) for ours in layout.required]
        self._optional = [(ours, columns.get(ours, ours)) for ours in layout.optional]
        self.theirs = [theirs for _, theirs in self._required + self._optional]

    def missing(self, found: Mapping[str, Any] | Sequence[str]) -> list[str]:
        return [theirs for _, theirs in self._required if theirs not in found]

    def likeness(self, found: Mapping[str, Any] | Sequence[str]) -> int:
        """How many required columns are there, less those that are not."""
        return len(self._required) - 2 * len(self.missing(found))

    def ours_of(self, theirs: str) -> str:
        return next(ours for ours, name in self._required if name == theirs)

    def pick(self, raw: Mapping[str, Any]) -> dict[str, Any] | RowError:
        row = {}
        for ours, theirs in self._required + self._optional:
            if theirs not in raw:
                continue
            value = row[ours] = raw[theirs]
            if type(value) is not str and ours != "messages":
                return RowError(_not_text(theirs, value))
        return row


def _not_text(column: str, value: Any) -> str:
    if value is None:
        return f"'{column}' is null, where a text is expected (\"\" if there is none)"
    return f"'{column}' is {readers.shown(value)} ({type(value).__name__}), where a text is expected"


def _check_columns(source: Source, layouts: Sequence[Layout]) -> None:
    known = list(dict.fromkeys(name for layout in layouts for name in (*layout.required, *layout.optional)))
    for ours in source.columns:
        if ours not in known:
            raise InputError(
                f"data.columns: the template uses no column '{ours}'.{did_you_mean(ours, known)} It uses: "
                f"{', '.join(known)}."
            )


def check_text(text: str, row: Mapping[str, Any]) -> None:
    """Raises RowError for a text that cannot be tokenised: absurdly long, or with half a character."""
    if len(text) > MAX_CELL:
        column = max(row, key=lambda name: len(str(row[name])))
        raise RowError(f"'{column}' makes a text of {len(text):,} characters; the limit is {MAX_CELL:,}")
    if not text.isascii() and (broken := _SURROGATE.search(text)):
        column = next((name for name, value in row.items() if broken.group() in str(value)), "the row")
        raise RowError(f"'{column}' holds half a character (\\u{ord(broken.group()):04x}, a lone surrogate)")


def load_rows(
    source: SourceLike, template: Template, *, skip_bad: bool = False, data_dir: str | None = None
) -> Rows:
    """The usable rows of a recipe's source; see `resolve_source` and `Rows`."""
    return Rows(resolve_source(source, data_dir), template.layouts, skip_bad)
