"""Where rows come from: a registered name, a file, a hub data set; and which of their cells are text.

A `Source` says what it is and what its content hashes to; `Rows` reads it once, maps its columns to the
template's, and stops at the first row that cannot be used, or skips and counts such rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from linchain_cli.data import readers
from linchain_cli.data.readers import MAX_CELL, open_reader
from linchain_cli.data.rows import Layout, RowError, Template
from linchain_cli.errors import InputError, did_you_mean, nearest

DATA_DIR_VARIABLE = "LINCHAIN_DATA_DIR"
_SURROGATE = re.compile("[\ud800-\udfff]")
_EXAMPLES = 5  # problems of rows that are kept as text


class SourceLike(Protocol):
    """The fields of a recipe's SourceConfig."""

    path: str
    split: str | None
    revision: str | None
    columns: Mapping[str, str] | None


@dataclass(frozen=True)
class SourceRequest:
    """A source as a recipe writes it."""

    path: str
    split: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Source:
    """One data source, found but not read. `columns` are names of ours to theirs."""

    name: str  # as the recipe writes it
    kind: Literal["file", "hub", "generated"]
    location: str
    split: str = "train"
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Registered:
    """A data set known by name: a local file of one of these names, else a hub id."""

    files: tuple[str, ...] = ()
    hub: str | None = None
    origin: str = ""


_REGISTERED = {
    "commonsense170k": _Registered(("commonsense_170k.json",), "zwhe99/commonsense_170k"),
    "math10k": _Registered(("math_10k.json",), None, "ft-training_set/ of the LLM-Adapters repository"),
    "everyday": _Registered(),
}
DATASET_NAMES = tuple(_REGISTERED)


def resolve_source(source: SourceLike, data_dir: str | Path | None = None) -> Source:
    """Finds a source; registered files in `data_dir`, $LINCHAIN_DATA_DIR and the current directory.

    Raises InputError for a file that is missing or of an unknown kind, and for what is neither a file, a
    registered name nor a hub id.
    """
    settings = {
        "split": source.split or "train",
        "revision": source.revision,
        "columns": dict(source.columns or {}),
    }
    name = source.path
    if name in _REGISTERED:
        return _registered(name, settings, data_dir)
    path = Path(name).expanduser()
    if path.suffix.lower() in readers.FORMATS or path.exists():
        _check_file(path)
        return Source(name, "file", str(path), **settings)
    if _could_be_hub_id(name):
        return Source(name, "hub", name, **settings)
    raise InputError(
        f"data: '{name}' is no file, hub id (owner/data-set) or registered data "
        f"set.{did_you_mean(name, DATASET_NAMES)} Registered: {', '.join(DATASET_NAMES)}. Files: "
        f"{', '.join(readers.FORMATS)}."
    )


def _registered(name: str, settings: dict[str, Any], data_dir: str | Path | None) -> Source:
    known = _REGISTERED[name]
    if not known.files:
        return Source(name, "generated", name, **settings)
    folders = _data_folders(data_dir)
    for folder in folders:
        for file in known.files:
            if (folder / file).is_file():
                return Source(name, "file", str(folder / file), **settings)
    if known.hub:
        return Source(name, "hub", known.hub, **settings)
    raise InputError(
        f"data: '{name}' needs the file {known.files[0]} (from {known.origin}) in the current directory or "
        f"in ${DATA_DIR_VARIABLE}; or give its path."
    )


def _data_folders(data_dir: str | Path | None) -> list[Path]:
    """Where registered files may lie; LLM-Adapters has them in ft-training_set/, beside its tests."""
    roots = [Path(root).expanduser() for root in (data_dir, os.environ.get(DATA_DIR_VARIABLE)) if root]
    return [
        folder
        for root in roots
        for folder in (root, root / "ft-training_set", root.parent / "ft-training_set")
    ] + [Path(".")]


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in readers.FORMATS:
        what = "directory" if path.is_dir() else "file"
        raise InputError(f"data: {path} is a {what}; a data file ends in {', '.join(readers.FORMATS)}.")
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = did_you_mean(
            path.name, [file.name for file in beside if file.suffix.lower() in readers.FORMATS]
        )
        raise InputError(f"data: there is no file {path}.{hint}")
    if not os.access(path, os.R_OK):
        raise InputError(f"data: {path} may not be read (permission denied).")


def _could_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return (
        2 <= len(parts) <= 3
        and all(parts)
        and not name.startswith((".", "~"))
        and not any(c.isspace() for c in name)
    )


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
        self._place: Callable[[], str] = lambda: source.name
        _check_columns(source, layouts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for raw in self._raw_rows():
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
        return self._place()

    def _note(self, error: RowError) -> None:
        message = f"{self._place()}: {error}"
        if not self._skip_bad:
            raise InputError(f"{message}. Mend the row, or set data.on_bad_row: skip to leave such rows out.")
        if len(self.problems) < _EXAMPLES:
            self.problems.append(message)

    def _raw_rows(self) -> Iterator[dict[str, Any] | RowError]:
        wanted = {name for layout in self._layouts for name in layout.theirs}
        if self.source.kind == "file":
            reader = open_reader(Path(self.source.location), wanted)
            self._place = lambda: _file_place(reader)
            for row in reader:
                if reader.row == 1 and reader.header is not None:
                    self._check_header(reader)
                yield row
            return
        rows = self._hub_rows(wanted) if self.source.kind == "hub" else generated_rows(self.source)
        self._place = lambda: f"{self.source.name} (row {self.total}, split {self.source.split})"
        yield from rows

    def _hub_rows(self, wanted: set[str]) -> Iterator[dict[str, Any]]:
        from linchain_cli.data.hub import hub_rows, load_hub_dataset

        dataset = load_hub_dataset(self.source.location, self.source.split, self.source.revision)
        if all(layout.missing(dataset.column_names) for layout in self._layouts):
            raise InputError(f"{self.source.name}: {self._missing(dataset.column_names)}")
        return hub_rows(dataset, wanted)

    def _check_header(self, reader: readers.Reader) -> None:
        """Says at once, and of the file, what would be wrong with its every row."""
        if all(layout.missing(reader.header) for layout in self._layouts):
            raise reader.problem(f"{self._missing(reader.header)}.", 1 if reader.line else None)

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


def _file_place(reader: readers.Reader) -> str:
    line = f":{reader.line}" if reader.line else ""
    return f"{reader.path}{line} (row {reader.row})"


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


def generated_rows(source: Source) -> list[dict[str, Any]]:
    """The rows of a data set that the project makes itself."""
    from linchain_cli.data.everyday import everyday_rows

    if source.split not in ("train", "test"):
        raise InputError(f"data: '{source.name}' has the splits train and test, not '{source.split}'.")
    return everyday_rows(source.split)


def load_rows(
    source: SourceLike, template: Template, *, skip_bad: bool = False, data_dir: str | None = None
) -> Rows:
    """The usable rows of a recipe's source; see `resolve_source` and `Rows`."""
    return Rows(resolve_source(source, data_dir), template.layouts, skip_bad)
