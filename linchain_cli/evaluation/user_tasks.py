"""Tasks of the user's own: a YAML file that names rows, a prompt, and how answers are read.

name: colours                       # how results name it; left out, the file's name
path: colours.jsonl                 # beside this file; .json, .jsonl, .csv, .parquet or a hub id
columns: {instruction: question}    # ours to theirs, where the rows' columns have other names
options: [red, green, blue]         # or a column `options`, or lines "Answer format: ..." in the rows
template: alpaca                    # a name or {prompt, response}; left out, the model's own
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field

from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.raw import ANSWER_PREFIX
from linchain_cli.evaluation.task import Task, read_row
from linchain_cli.recipe.schema import Columns, Count, FileName, TemplateConfig, Text
from linchain_cli.recipe.strict_yaml import parse
from linchain_cli.recipe.validation import Conflict, Expected, StrictModel, check


class TaskFile(StrictModel):
    """A task as its file describes it."""

    name: FileName | None = None
    """How results name the task; null takes the file's name."""
    path: Text
    """Rows: a file (relative to this one) or a hub id."""
    split: Text = "test"
    """Split of a hub data set."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set."""
    columns: Columns = {}
    """Column names, ours to theirs: instruction, input, answer, options, or what the template asks for."""
    template: Text | TemplateConfig | None = None
    """A template's name or a prompt of your own; null takes the model's."""
    options: Annotated[list[Text] | None, Field(min_length=2), Expected("a list of two or more texts")] = None
    """The options of every row; null takes each row's own."""
    answer: Literal["options", "pattern", "number", "letter"] = "options"
    """How an answer is read: the first of the options, the first match of answer_pattern, the last number, or
    the last letter from A to E. Only options can be scored by likelihood.
    """
    answer_pattern: Text | None = None
    """A regular expression whose first match (or its first group) is the answer a model wrote."""
    prefix: Annotated[str, Field(max_length=1000)] = ANSWER_PREFIX
    """What an answer begins with, before the option."""
    max_new_tokens: Count = 32
    """Length of a generated answer at most."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.answer != "options" and self.options:
            yield Conflict(
                ("options", "answer"), f"options are given, but the answer is read as a {self.answer}."
            )
        if self.answer in ("number", "letter") and self.answer_pattern:
            yield Conflict(
                ("answer_pattern", "answer"),
                f"a pattern is given, but the answer is read as a {self.answer}.",
            )
        if self.answer == "pattern" and not self.answer_pattern:
            yield Conflict(("answer", "answer_pattern"), "an answer_pattern is missing.")
        if self.answer_pattern is not None:
            try:
                re.compile(self.answer_pattern)
            except re.error as error:
                yield Conflict(("answer_pattern",), f"not a regular expression: {error}.")


def load_user_task(path: Path, limit: int | None = None) -> Task:
    """The task that the YAML file describes, cut to its first `limit` rows.

    Raises:
        InputError: the file or a row is wrong, naming file, line and key, or source and row.
    """
    file = _read(path)
    name = file.name or path.stem
    rule = AnswerRule(file.answer, file.answer_pattern)
    required, optional = _columns(file.template)
    rows = []
    for index, raw in enumerate(_raw_rows(file, path)):
        if index == limit:
            break
        row = _renamed(raw, file.columns) if isinstance(raw, Mapping) else raw
        rows.append(read_row(row, index, rule, file.path, file.options or (), required, optional))
    if not rows:
        raise InputError(f"{path}: {file.path} has no rows")
    template = file.template.model_dump() if isinstance(file.template, TemplateConfig) else file.template
    return Task(name, tuple(rows), file.path, rule, file.max_new_tokens, file.prefix, template)


def _read(path: Path) -> TaskFile:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"there is no task file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    try:
        document = parse(text)
    except InputError as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(document.value, dict):
        raise InputError(f"{path}: expected a mapping with path, and options or answer_pattern")
    file, problems = check(TaskFile, document.value)
    complaints = [
        (problem.line, f"{path}:{problem.line}: {problem.message}") for problem in document.problems
    ]
    for problem in problems:
        line = next((document.lines[key] for key in _outwards(problem.key) if key in document.lines), 1)
        complaints.append((line, f"{path}:{line}: {'.'.join(map(str, problem.key))}: {problem.message}"))
    if complaints:
        raise InputError("\n".join(message for _, message in sorted(complaints)))
    assert file is not None
    return file


def _outwards(key: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """The key, then the sections around it."""
    return (key[:length] for length in range(len(key), -1, -1))


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


def _raw_rows(file: TaskFile, path: Path) -> Iterator[Any]:
    from linchain_cli.data.reading import RawRows
    from linchain_cli.data.rows import RowError
    from linchain_cli.data.sources import SourceRequest, resolve_source

    beside = path.parent / file.path
    source = resolve_source(
        SourceRequest(str(beside) if beside.is_file() else file.path, file.split, file.revision)
    )
    rows = RawRows(source, set())
    for row in rows:
        if isinstance(row, RowError):
            raise InputError(f"{rows.place()}: {row}")
        yield row


def _renamed(raw: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {**raw, **{ours: raw.get(theirs) for ours, theirs in columns.items()}}
