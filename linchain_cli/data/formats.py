"""The formats that rows come in, found by their columns, and how each becomes the row that a template takes.

messages                     OpenAI's conversations, with tools
conversations                ShareGPT's, with system and tools
instruction, output          Alpaca's, with input, system and history
prompt, completion           TRL's, as text or as messages
text                         documents
the columns of a template of one's own
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from linchain_cli.data import messages, readers
from linchain_cli.data.choosing import PICTURES, template_for
from linchain_cli.data.readers import MAX_CELL
from linchain_cli.data.reading import RawRows
from linchain_cli.data.rows import Layout, Row, RowError, Template
from linchain_cli.data.sources import Source, resolve_source
from linchain_cli.errors import InputError, did_you_mean, nearest
from linchain_cli.recipe import SourceConfig

_SURROGATE = re.compile("[\\ud800-\\udfff]")

Cells = Mapping[str, Any]
_SAID_BEFORE = ("system", "history", "system_prompt")
_ASKING = (("instruction", "output"), ("prompt", "completion"))


@dataclass(frozen=True)
class Format:
    """Columns by our names, and what a row with them becomes. `make` gets the cells that are not null."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[Cells], Row]


def _of_messages(cells: Cells) -> Row:
    return messages.conversation(messages.messages_of(cells["messages"], "messages"), cells)


def _of_conversations(cells: Cells) -> Row:
    return messages.conversation(messages.messages_of(cells["conversations"], "conversations"), cells)


def _of_prompt_and_completion(cells: Cells) -> Row:
    names = ("prompt", "completion")
    said = (cells[name] if messages.is_messages(cells[name]) else _text(name, cells[name]) for name in names)
    return messages.conversation(messages.asked_and_answered(*said, names), cells)


_BESIDE_TURNS = ("system", "tools", "chat_template_kwargs")
_CONVERSATIONS = (
    Format(("messages",), (*_BESIDE_TURNS, "functions"), _of_messages),
    Format(("conversations",), _BESIDE_TURNS, _of_conversations),
    Format(("prompt", "completion"), _BESIDE_TURNS, _of_prompt_and_completion),
)


def _formats(
    layouts: Sequence[Layout], labels: Mapping[str, str], columns: Mapping[str, str]
) -> list[Format]:
    """All that a template with these layouts can be given, in the order in which it is looked for."""
    found: list[Format] = []
    takes_conversations = any(layout.required == ("messages",) for layout in layouts)
    if takes_conversations:
        found += _CONVERSATIONS[:2]
    for layout in layouts:
        if layout.required == ("messages",):
            continue
        found.append(Format(layout.required, layout.optional, _Texts(layout, labels, columns)))
        if layout.required == ("instruction", "output") and not takes_conversations:
            found.append(Format(("prompt", "completion"), (), _asked(_Texts(layout, labels, columns))))
    return found + list(_CONVERSATIONS[2:] if takes_conversations else ())


def _asked(make: Callable[[Cells], Row]) -> Callable[[Cells], Row]:
    def of_texts(cells: Cells) -> Row:
        if any(messages.is_messages(cells[name]) for name in ("prompt", "completion")):
            raise RowError("the row holds messages: data.template: chat takes it")
        return make({"instruction": cells["prompt"], "output": cells["completion"]})

    return of_texts


class _Texts:
    """Makes a row of texts: numbers as they are written, classes by their names, a `history` as pairs."""

    def __init__(self, layout: Layout, labels: Mapping[str, str], columns: Mapping[str, str]):
        self._theirs = columns
        self._answer = frozenset(layout.answer) if labels else frozenset()
        self._is_labelled = layout.answer == ("label",)
        self._labels = labels

    def __call__(self, cells: Cells) -> Row:
        row = {}
        for name, value in cells.items():
            if self._is_labelled and name == "label" and isinstance(value, (list, tuple, Mapping)):
                raise RowError(
                    f"'{self._theirs.get(name, name)}' is {readers.shown(value)}: a row has one label, and"
                    " several at once (multi-label) cannot be learned"
                )
            if name in self._answer:
                row[name] = self._label(name, value)
            elif type(value) is str and name != "history":
                row[name] = value
            else:
                theirs = self._theirs.get(name, name)
                row[name] = _history(value) if name == "history" else _text(theirs, value)
        return row

    def _label(self, column: str, value: Any) -> str:
        if isinstance(value, str) and value in self._labels.values():
            return value
        text = _text(self._theirs.get(column, column), value)
        name = next((self._labels[key] for key in (text, as_class(text)) if key in self._labels), None)
        if name is None:
            known = ", ".join(list(self._labels)[:20])
            theirs = self._theirs.get(column, column)
            raise RowError(f"'{theirs}' is {readers.shown(value)}, which data.labels does not name ({known})")
        return name


def as_class(label: str) -> str:
    """A label without white space around it; a whole number that was stored as a fraction is that number."""
    label = label.strip()
    return str(int(float(label))) if re.fullmatch(r"-?\d{1,15}\.0+", label) else label


def _text(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal)):
        return str(value)
    hint = "; conversations are for data.template: chat" if messages.are_turns(value) else ""
    raise RowError(
        f"'{column}' is {readers.shown(value)} ({type(value).__name__}), where a text is expected{hint}"
    )


def _history(value: Any) -> list[tuple[str, str]]:
    """Earlier turns as (question, answer), out of a list of pairs or its JSON text."""
    pairs = messages.parsed(value, "history") if value != "" else []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
    ):
        raise RowError(f"'history' is {readers.shown(value)}, not a list of pairs [question, answer]")
    return [(_text("history", asked), _text("history", answered)) for asked, answered in pairs]


class RowFormats:
    """The ways to write rows that a template with these layouts takes, by the names that a source's columns
    have."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        labels: Mapping[str, str] | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        self._columns = columns or {}
        self._labelled = any("label" in layout.answer for layout in layouts)
        formats = _formats(layouts, labels or {}, self._columns)
        self.stored = [_Stored(form, self._columns) for form in formats]

    def fitting(self, found: Mapping[str, Any] | Sequence[str]) -> _Stored | None:
        """The first one whose required columns are all there."""
        return next((stored for stored in self.stored if not stored.missing(found)), None)

    def row(self, raw: Mapping[str, Any]) -> Row:
        """A row as the template takes it. Raises RowError for one that is unusable."""
        if (stored := self.fitting(raw)) is None:
            raise RowError(self.missing(raw))
        return stored.make(raw)

    def missing(self, found: Iterable[str]) -> str:
        """What is missing for the format that comes closest, and which column may be meant."""
        found = list(found)
        closest = max(self.stored, key=lambda stored: stored.likeness(found))
        theirs = closest.missing(found)[0]
        names = [readers.shown(name) for name in found]
        others = [name for name in names if name not in closest.theirs]
        shown = ", ".join(names[:20]) or "none"
        other = None if self._labelled else template_for(found, self._columns)
        if other:
            return (
                f"there is no column '{theirs}' (columns: {shown}). The rows hold {other.holds}: "
                f"data.template: {other.name} takes them"
            )
        return (
            f"there is no column '{theirs}' (columns: {shown}).{did_you_mean(theirs, others)} If it has "
            f"another name, map it with data.columns: {{{closest.ours_of(theirs)}: "
            f"{nearest(theirs, others) or 'NAME'}}}"
        )

    def check_columns(self) -> None:
        """Raises InputError where a column is mapped that no format has."""
        known = list(dict.fromkeys(name for stored in self.stored for name in stored.ours))
        for ours in self._columns:
            if ours not in known:
                raise InputError(
                    f"data.columns: the template uses no column '{ours}'.{did_you_mean(ours, known)} It "
                    f"uses: {', '.join(known)}."
                )


class FormattedRows:
    """The rows of a source in the form that a template takes: a row, or a RowError for one that is unusable.

    Iterate once. `unread` are then the columns that nothing asked for.
    """

    def __init__(self, source: Source, layouts: Sequence[Layout]):
        self.source = source
        self._layouts = layouts
        self._formats = RowFormats(layouts, source.labels, source.columns)
        self._formats.check_columns()
        wanted = {name for stored in self._formats.stored for name in stored.theirs}
        self._raw = RawRows(source, wanted | {"tools"})
        self._seen: dict[str, None] = {}
        self._asked: set[str] = set()
        self._unshown: set[str] = set()

    @property
    def unread(self) -> list[str]:
        # LLM-Adapters' rows say in `answer` once more, for evaluation, what their `output` ends with.
        known = {"answer"} if "output" in self._asked else set()
        return [name for name in self._seen if name not in self._asked | known]

    @property
    def unshown(self) -> list[str]:
        """What was said before an instruction, and what there is to see or to hear: filled in, but not shown
        to the model."""
        in_header = self._seen.keys() & PICTURES if self._raw.is_table else set()
        return sorted(self._unshown | in_header)

    @property
    def class_names(self) -> list[str]:
        """What the data set itself calls the classes in the answer's column, once a row was read."""
        answers = {self.source.columns.get(name, name) for layout in self._layouts for name in layout.answer}
        classes = [names for column, names in self._raw.class_names.items() if column in answers]
        return classes[0] if classes else []

    def place(self) -> str:
        """Where the last row stands: file, line and row."""
        return self._raw.place()

    def __iter__(self) -> Iterator[Row | RowError]:
        header = None
        for raw in self._raw:
            # Behind a .csv a directory may hold a .json, whose rows have their own columns.
            if self._raw.columns is not header and (header := self._raw.columns) is not None:
                self._check_header(header)
            yield raw if isinstance(raw, RowError) else self._made(raw)

    def _check_header(self, header: Sequence[str]) -> None:
        """Says at once, and of the file, what would be wrong with its every row."""
        self._seen |= dict.fromkeys(header)
        if self._formats.fitting(header) is None:
            raise InputError(f"{self._raw.header_place()}: {self._formats.missing(header)}.")
        if self.class_names and not self.source.labels:
            labels = {str(number): name for number, name in enumerate(self.class_names)}
            self._formats = RowFormats(self._layouts, labels, self.source.columns)

    def _made(self, raw: dict[str, Any]) -> Row | RowError:
        if not raw.keys() <= self._seen.keys():
            self._seen |= dict.fromkeys(raw)
        if (stored := self._formats.fitting(raw)) is None:
            return RowError(self._formats.missing(raw))
        self._asked |= stored.names
        if self._raw.is_table:
            raw = messages.pruned(raw)
        if not raw.keys().isdisjoint(PICTURES):
            self._unshown |= {name for name in PICTURES if raw.get(name)}
        if stored.asks:
            self._unshown |= {name for name in _SAID_BEFORE if raw.get(name) and name not in stored.names}
        try:
            return stored.make(raw)
        except RowError as error:
            return error


class _Stored:
    """A format with the source's own column names."""

    def __init__(self, form: Format, columns: Mapping[str, str]):
        self._required = [(ours, columns.get(ours, ours)) for ours in form.required]
        self._optional = [(ours, columns.get(ours, ours)) for ours in form.optional]
        self._make = form.make
        self.ours = [*form.required, *form.optional]
        self.theirs = [theirs for _, theirs in self._required + self._optional]
        self.names = frozenset(self.theirs)
        self.asks = form.required in _ASKING

    def missing(self, found: Mapping[str, Any] | Sequence[str]) -> list[str]:
        return [theirs for _, theirs in self._required if theirs not in found]

    def likeness(self, found: Sequence[str]) -> int:
        """How many required columns are there, less those that are not."""
        return len(self._required) - 2 * len(self.missing(found))

    def ours_of(self, theirs: str) -> str:
        return next(ours for ours, name in self._required if name == theirs)

    def make(self, raw: Mapping[str, Any]) -> Row:
        if raw.get("tools") and "tools" not in self.names and messages.tools_of(raw["tools"]):
            raise RowError(
                "the row holds `tools`, which this template does not show to the model: data.template: "
                "chat does"
            )
        cells = {}
        for ours, theirs in self._required:
            value = raw.get(theirs)
            if value is None or value != value:  # null, or the NaN that stands for it
                raise RowError(f"'{theirs}' is null, where a value is expected")
            cells[ours] = value
        for ours, theirs in self._optional:
            value = raw.get(theirs)
            if value is not None and value == value:
                cells[ours] = value
        return self._make(cells)


def check_text(text: str, row: Row) -> None:
    """Raises RowError for a text that cannot be tokenised: absurdly long, or with half a character."""
    if len(text) > MAX_CELL:
        column = max(row, key=lambda name: len(str(row[name])))
        raise RowError(f"'{column}' makes a text of {len(text):,} characters; the limit is {MAX_CELL:,}")
    if not text.isascii() and (broken := _SURROGATE.search(text)):
        column = next((name for name, value in row.items() if broken.group() in str(value)), "the row")
        raise RowError(f"'{column}' holds half a character (\\u{ord(broken.group()):04x}, a lone surrogate)")


def load_rows(source: SourceConfig, template: Template) -> Iterator[Row]:
    """The usable rows of a recipe's source in the template's form."""
    rows = FormattedRows(resolve_source(source), template.layouts)
    return (row for row in rows if not isinstance(row, RowError))
