"""Tasks of the user's own: a YAML file that names rows, a prompt, and how answers are read.

name: colours                       # how results name it; left out, the file's name
path: colours.jsonl                 # beside this file: a file, directory or pattern; or a hub id
columns: {instruction: question}    # ours to theirs, where the rows' columns have other names
options: [red, green, blue]         # or a column `options`, or lines "Answer format: ..." in the rows
template: alpaca                    # a name or {prompt, response}; left out, the model's own
examples: 5                         # answered rows in front of every question, from examples_path
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field

from linchain_cli.data.files import is_data_file
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.raw import ANSWER_PREFIX
from linchain_cli.evaluation.task import AnswerNames, Task, TaskRow, read_row, row_options, stored_rows
from linchain_cli.recipe import SourceConfig, TemplateConfig
from linchain_cli.recipe.fields import Count, FileName, Text
from linchain_cli.recipe.loading import FileKind, load_file
from linchain_cli.recipe.validation import Conflict, Expected, StrictModel


class TaskFile(StrictModel):
    """A task as its file describes it."""

    name: FileName | None = None
    """How results name the task; null takes the file's name."""
    path: Text
    """Rows: files, a directory or a pattern (relative to this file), or a hub id."""
    split: Text = "test"
    """Split of a hub data set."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    columns: dict[Text, Text | list[Text]] = {}
    """Column names, ours to theirs: instruction, input, answer, options, messages, or what the template asks
    for. A dot leads into a column of mappings (choices.text); a list of names makes a list of their values.
    """
    template: Text | TemplateConfig | None = None
    """A template's name or a prompt of your own; null takes the model's."""
    options: Annotated[list[Text] | None, Field(min_length=2), Expected("a list of two or more texts")] = None
    """The options of every row; null takes each row's own."""
    answer_names: AnswerNames = "option"
    """What a row's answer is: one of the options, its index (from 0), position (from 1) or letter."""
    answer: Literal["options", "pattern", "number", "letter", "loss"] = "options"
    """How an answer is read: the first of the options, the first match of answer_pattern, a number, or a
    letter from A to E. Only options can be scored by likelihood. `loss` reads none: the rows, answers
    included, are scored as training would learn them.
    """
    answer_pattern: Text | None = None
    """A regular expression whose first match (or its first group) is the answer a model wrote."""
    prefix: Annotated[str, Field(max_length=1000)] = ANSWER_PREFIX
    """What an answer begins with, before the option."""
    max_new_tokens: Count = 32
    """Length of a generated answer at most."""
    stop: list[Text] = []
    """Texts before which a generated answer ends."""
    examples: Annotated[int, Field(ge=0)] = 0
    """Rows of examples_path that stand, answered, in front of every question: its first ones."""
    examples_path: Text | None = None
    """Rows of examples, which are no rows of path: where they are is written as in path."""
    examples_split: Text = "train"
    """Their split of a hub data set."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.answer != "options" and self.options:
            yield Conflict(
                ("options", "answer"), f"options are given, but the answer is read as a {self.answer}."
            )
        if self.answer in ("number", "letter", "loss") and self.answer_pattern:
            yield Conflict(
                ("answer_pattern", "answer"),
                f"a pattern is given, but the answer is read as a {self.answer}.",
            )
        if bool(self.examples) != bool(self.examples_path):
            yield Conflict(
                ("examples", "examples_path"), "examples need both their number and rows to take them from."
            )
        if self.examples and self.answer == "loss":
            yield Conflict(
                ("examples", "answer"), "rows whose loss is measured stand alone: no examples go before them."
            )
        if self.answer != "options" and self.answer_names != "option":
            yield Conflict(("answer_names", "answer"), "there are no options that an answer could name.")
        if self.answer == "pattern" and not self.answer_pattern:
            yield Conflict(("answer", "answer_pattern"), "an answer_pattern is missing.")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                yield Conflict(("answer_pattern",), f"not a regular expression: {error}.")


_TASK = FileKind("a task", "path: rows.jsonl", "docs/evaluation.md says what one holds.")


def load_user_task(path: Path, limit: int | None = None) -> Task:
    """The task that the YAML file describes, cut to its first `limit` rows.

    Raises:
        InputError: the file or a row is wrong, naming file, line and key, or source and row.
    """
    file = load_file(TaskFile, path, _TASK)
    name = file.name or path.stem
    rule = AnswerRule(file.answer, file.answer_pattern)
    rows = list(_task_rows(file, path, file.path, file.split, rule, limit))
    if not rows:
        raise InputError(f"{path}: {file.path} has no rows")
    examples: list[TaskRow] = []
    if file.examples_path:
        wanted = file.examples
        examples = list(_task_rows(file, path, file.examples_path, file.examples_split, rule, wanted))
        if len(examples) < wanted:
            raise InputError(f"{path}: {file.examples_path} has {len(examples)} rows, not {wanted}")
    template = file.template.model_dump() if isinstance(file.template, TemplateConfig) else file.template
    return Task(
        name,
        tuple(rows),
        file.path,
        rule,
        file.max_new_tokens,
        file.prefix,
        template,
        stop=tuple(file.stop),
        free_text=rule.kind == "options" and not file.options and not _labelled(rows),
        examples=tuple(examples),
    )


def _task_rows(
    file: TaskFile, path: Path, source: str, split: str, rule: AnswerRule, limit: int | None
) -> Iterator[TaskRow]:
    required, optional = _columns(file.template)
    rows = stored_rows(_source(file, path, source, split))
    for index, raw in enumerate(islice(rows, limit)):
        row = {**raw, **{ours: _value(raw, theirs) for ours, theirs in file.columns.items()}}
        yield read_row(row, index, rule, source, file.options or (), required, optional, file.answer_names)


def _labelled(rows: Sequence[TaskRow]) -> bool:
    """Whether options are labels, which stand in the question, rather than texts of their own."""
    return all(row_options(str(row.fields.get("instruction") or "")) == row.options for row in rows)


def _columns(template: str | TemplateConfig | None) -> tuple[list[str], list[str]]:
    """The columns that a template's prompt must and may have."""
    if not isinstance(template, TemplateConfig):
        return ["instruction"], ["input"]
    asked = _placeholders(template.prompt)
    if template.prompt_no_input is None:
        return asked, []
    always = _placeholders(template.prompt_no_input)
    return always, [name for name in asked if name not in always]


def _placeholders(pattern: str) -> list[str]:
    try:
        return list(dict.fromkeys(name for _, name, _, _ in Formatter().parse(pattern) if name))
    except ValueError:
        return []  # get_template says what is wrong with it


def _source(file: TaskFile, path: Path, named: str, split: str) -> SourceConfig:
    """What the task's file names: beside it, or else a hub id or a path or address of its own."""
    beside = glob.glob(os.path.join(glob.escape(str(path.parent)), named), recursive=True)
    is_file = is_data_file(named) and "://" not in named and not named.startswith("~")
    place = str(path.parent / named) if beside or is_file else named
    return SourceConfig(path=place, split=split, revision=file.revision)


def _value(raw: Mapping[str, Any], name: str | list[str]) -> Any:
    """The value of a column, of one within it (choices.text), or the values of several."""
    if isinstance(name, list):
        return [_value(raw, each) for each in name]
    if name in raw:
        return raw[name]
    value: Any = raw
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
