"""Rows with a label: one text or two, and a class or a number that a model is to tell from them.

A `Labelling` stands where a template stands for rows that are text to be written: it says which columns a row
has and what becomes of them. The tokenizer itself joins texts and special tokens, as it does everywhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from linchain_cli.data.encoding import ControlTokens, EncodedText, TextEncoder, serialized_tokenizer
from linchain_cli.data.formats import FormattedRows, as_class
from linchain_cli.data.glue import TASKS
from linchain_cli.data.reading import RawRows
from linchain_cli.data.rows import Layout, Row, RowError, Template
from linchain_cli.data.sources import Source, resolve_source
from linchain_cli.errors import InputError, nearest, some
from linchain_cli.recipe import SourceConfig

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.data.store import EncodedRows
    from linchain_cli.recipe import DataConfig

LabelledTask = Literal["classification", "regression"]
_LAYOUT = Layout(("text", "label"), ("text_pair",), answer=("label",))
# Columns that data sets with a label have, in whatever case, first come first taken: (text, text_pair).
_TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text", None),
    ("sentence", None),
    ("content", None),
    ("review", None),
    ("comment", None),
    ("tweet", None),
    ("utterance", None),
)
_LABELS = (
    *("label", "labels", "gold_label", "class", "target", "score"),
    *("sentiment", "category", "intent", "rating", "stars"),
)
_MOST_CLASSES = 1000
_LIKE_A_NUMBER = 100  # classes from which on a class for every second row looks like a number


class UnknownLabel(RowError):
    """A row's label that is none of the classes."""


@dataclass(frozen=True)
class Labelled:
    """A row's texts and its target: the number of its class, or the number itself."""

    text: str
    text_pair: str | None
    target: float
    remarks: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True)
class Labelling:
    """How rows with a label are read. It takes a template's place (see data/rows.py).

    name: the recipe's task
    classes: their names, in the order of the model's outputs; none for a regression
    paired: whether the tokenizer has a separator for two texts; if not, a line break stands between them
    segments: whether the model is told which of two texts a token is of
    splits: whether the tokenizer takes control tokens in a text for letters (its `split_special_tokens`)
    keeps_end: whether it cuts a text that is too long at its beginning (its `truncation_side`)
    """

    name: LabelledTask
    classes: tuple[str, ...] = ()
    paired: bool = True
    segments: bool = False
    splits: bool = False
    keeps_end: bool = False
    layouts: tuple[Layout, ...] = (_LAYOUT,)
    adds_bos: bool = True

    @classmethod
    def of(cls, task: LabelledTask, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Labelling:
        paired = joins_pairs(tokenizer)
        segments = paired and "token_type_ids" in tokenizer.model_input_names
        keeps_end = tokenizer.truncation_side == "left"
        return cls(task, tuple(classes), paired, segments, tokenizer.split_special_tokens, keeps_end)

    @property
    def fingerprint(self) -> str:
        parts: list[Any] = [self.name, self.classes, self.paired, self.segments]
        parts += [*([True] if self.splits else []), *(["keeps_end"] if self.keeps_end else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def alike(self) -> list[str]:
        """Classes that differ by upper and lower case alone, as a slip of whoever wrote the labels may."""
        folded = [name.casefold() for name in self.classes]
        return [name for name in self.classes if folded.count(name.casefold()) > 1]

    def render(self, row: Row) -> list[Labelled]:
        """The row with its target.

        Raises:
            RowError: its label is no class, or no number.
        """
        return [Labelled(row["text"], row.get("text_pair"), self.target(row["label"]))]

    def target(self, label: str) -> float:
        """The number of a class by its name (in another case, where only one class has it so), or the number
        that a text says."""
        if self.name == "regression":
            return _number(label)
        name = label if label in self.classes else class_name(label)
        if name not in self.classes:
            # A class that nobody has named is LABEL_0 to transformers.
            alike = [each for each in self.classes if each.casefold() in (name.casefold(), f"label_{name}")]
            name = alike[0] if len(alike) == 1 else name
        if name not in self.classes:
            near = nearest(name, self.classes)
            hint = f", such as {near!r}" if near else ""
            raise UnknownLabel(f"the label {label!r} is none of the classes{hint} ({some(self.classes, 10)})")
        return float(self.classes.index(name))


def joins_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer joins two texts so that they can be told apart: whether it has a separator."""
    return tokenizer.sep_token is not None


def label_name(target: float, classes: Sequence[str]) -> str:
    """How a row's target is called: a class's name, or without classes the number."""
    return classes[int(target)] if classes else f"{target:g}"


def label_counts(rows: EncodedRows, classes: Sequence[str]) -> dict[str, int]:
    """How many rows each class has."""
    counts = np.bincount(rows.targets.astype(np.int64), minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def _number(label: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RowError(f"the label {label!r} is no number, which task: regression learns to tell")
    return value


def class_name(label: str) -> str:
    """A label as a class's name.

    Raises:
        RowError: there is none. A .csv without a label there would make nothing a class.
    """
    name = as_class(label)
    if not name:
        raise RowError("the label is empty: there is no class to learn from this row")
    return name


def labelled_source(
    wanted: SourceConfig, task: LabelledTask, data_dir: str | Path | None = None
) -> tuple[Source, bool]:
    """A recipe's source with its columns, and whether they were chosen here: GLUE's are known, others' by
    what such columns are usually called.

    Raises:
        InputError: it is not there, or has no column that could be the text or the label.
    """
    source = resolve_source(wanted, data_dir)
    if source.glue is not None:
        known = TASKS[source.glue]
        theirs = known.columns if source.files is None else known.local_columns
        words = {str(number): name for number, name in enumerate(known.classes)}
        _check_glue(source, task)
        columns, labels = {**theirs, **source.columns}, source.labels or words
        return replace(source, columns=columns, labels=labels), False
    if {"text", "label"} <= source.columns.keys():
        return source, False
    columns = {**_guessed(source), **source.columns}
    return replace(source, columns=columns), columns != source.columns


def _check_glue(source: Source, task: LabelledTask) -> None:
    right = "classification" if TASKS[source.glue].classes else "regression"
    if task != right:
        raise InputError(f"task: {source.name} is a {right}: set task to that, not to {task}.")


def column_names(source: Source) -> tuple[str, ...]:
    """The columns of a source's first row that can be read; none where there is no such row."""
    rows = RawRows(source, set())
    return tuple(next((row for row in islice(rows, 100) if not isinstance(row, RowError)), ()))


def _guessed(source: Source) -> dict[str, str]:
    """Which columns of a source are texts and label, by their names; what it does not know it leaves out."""
    names = column_names(source)
    theirs = {name.lower(): name for name in reversed(names)} | {name: name for name in names}
    found: dict[str, str] = {}
    for text, pair in _TEXTS:
        if text in theirs and (pair is None or pair in theirs):
            found = {"text": theirs[text]} | ({"text_pair": theirs[pair]} if pair else {})
            break
    label = next((theirs[name] for name in _LABELS if name in theirs), None)
    return found | ({"label": label} if label else {})


def find_classes(config: DataConfig, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """The names of the classes that a recipe's training rows have, in the order of a model's outputs.

    They are data.labels' words, or the data set's own names, or else the labels themselves: whole numbers
    by their size, others by the alphabet.

    Raises:
        InputError: there are fewer than two, or so many that they look like numbers to predict.
    """
    named: dict[str, None] = {}
    met: dict[str, None] = {}
    rows_seen, bad = 0, None
    for wanted in config.sources:
        source, _ = labelled_source(wanted, "classification", data_dir)
        if source.labels:
            named |= dict.fromkeys(source.labels.values())
            continue
        rows = FormattedRows(source, (_LAYOUT,))
        for row in rows:
            if rows.class_names:
                named |= dict.fromkeys(rows.class_names)
                break
            rows_seen += 1
            try:
                if isinstance(row, RowError):
                    raise row
                met.setdefault(class_name(row["label"]))
            except RowError as error:
                bad = bad or f"{rows.place()}: {error}"
            if len(met) > _MOST_CLASSES:
                break
    found = [*named, *(name for name in _in_order(met) if name not in named)]
    if len(found) > _MOST_CLASSES or len(met) > max(_LIKE_A_NUMBER, rows_seen / 2):
        values = f"more than {_MOST_CLASSES:,}" if len(found) > _MOST_CLASSES else f"{len(found):,}"
        raise InputError(
            f"data.train: the labels have {values} values in {rows_seen:,} rows (such as {found[0]!r},"
            f" {found[1]!r}): they look like no classes. Map data.columns.label to another column, or"
            " set task: regression for numbers; if they are classes, name them all in data.labels."
        )
    if len(found) < 2 and bad is not None:
        raise InputError(f"{bad}.")
    if len(found) < 2:
        raise InputError(
            f"data.train: all labels are {found[0] if found else 'missing'}: there is nothing to tell apart."
            " Map data.columns.label to the column of the classes."
        )
    return tuple(found)


def _in_order(names: Iterable[str]) -> list[str]:
    names = list(names)
    numbers = all(re.fullmatch(r"-?\d{1,15}", name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def encoder_for(template: Template | Labelling, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """What encodes the rows of a template, or of a labelling."""
    if isinstance(template, Labelling):
        return LabelledEncoder(tokenizer, template)
    return TextEncoder(tokenizer)


class LabelledEncoder:
    """Encodes labelled rows as the tokenizer does: with all its special tokens, two texts as its pair.

    Where a row is too long, the longer of its texts loses tokens, one at a time: at its end, unless the
    tokenizer says otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labelling: Labelling):
        from tokenizers import Tokenizer

        self._labelling = labelling
        self._tokenizer = Tokenizer.from_str(serialized_tokenizer(tokenizer))
        self._tokenizer.encode_special_tokens = labelling.splits
        self.control_tokens = None if labelling.splits else ControlTokens(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(
        self,
        rows: Sequence[Labelled],
        *,
        adds_bos: bool = True,
        max_length: int | None = None,
        train_on_inputs: bool = False,
    ) -> list[EncodedText]:
        """Encodes rows on all cores, each with one supervised place: its label's."""
        inputs = [self._input(row) for row in rows]
        whole = self._tokenizer.encode_batch(inputs)
        lengths = [len(encoding) for encoding in whole]
        if max_length is not None:
            long = [number for number, length in enumerate(lengths) if length > max_length]
            for number, cut in zip(long, self._cut([inputs[n] for n in long], max_length), strict=True):
                whole[number] = cut
        return [self._encoded(*each) for each in zip(rows, whole, lengths, strict=True)]

    def _input(self, row: Labelled) -> str | tuple[str, str]:
        if row.text_pair is None:
            return row.text
        return (row.text, row.text_pair) if self._labelling.paired else f"{row.text}\n{row.text_pair}"

    def _cut(self, inputs: list[str | tuple[str, str]], max_length: int) -> list[tokenizers.Encoding]:
        if not inputs:
            return []
        pairs = any(isinstance(one, tuple) for one in inputs)
        special = self._tokenizer.num_special_tokens_to_add(pairs)
        if max_length <= special + pairs:
            raise InputError(
                f"data.max_length: {max_length} leaves no room for the texts beside {special} special tokens."
                " Raise it."
            )
        side = "left" if self._labelling.keeps_end else "right"
        self._tokenizer.enable_truncation(max_length, strategy="longest_first", direction=side)
        try:
            return self._tokenizer.encode_batch(inputs)
        finally:
            self._tokenizer.no_truncation()

    def _encoded(self, row: Labelled, encoding: tokenizers.Encoding, full_length: int) -> EncodedText:
        input_ids = np.array(encoding.ids, dtype=np.int32)
        supervised = np.zeros(len(input_ids), dtype=bool)
        supervised[:1] = True
        segments = np.array(encoding.type_ids, dtype=np.uint8) if self._labelling.segments else None
        return EncodedText(input_ids, supervised, 0, full_length, segments, row.target)


Encoder = TextEncoder | LabelledEncoder
