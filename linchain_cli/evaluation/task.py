"""A task: questions that were checked, where they come from, and how an answer is read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from linchain_cli.data.formats import check_text
from linchain_cli.data.messages import conversation, messages_of, pruned
from linchain_cli.data.reading import RawRows
from linchain_cli.data.rows import RowError
from linchain_cli.data.sources import resolve_source
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import RULES_VERSION, AnswerRule
from linchain_cli.evaluation.raw import ANSWER_PREFIX
from linchain_cli.recipe import SourceConfig
from linchain_cli.storage import sha256_bytes

OPTIONS_LINE = re.compile(r"Answer format:\s*(\S[^\n]*?)\s*$")


@dataclass(frozen=True)
class TaskRow:
    """One question. `fields` go through the template; `options` is empty where the answer is free."""

    index: int
    fields: Mapping[str, Any]
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named list of questions, where they come from, and how answers are read.

    `prefix` is what an answer begins with before the option; `template` replaces the model's when it is set.
    A generated answer ends before the first of `stop`. `free_text` says that options are texts and no labels,
    so that their lengths matter. `examples` stand answered in front of every question.
    """

    name: str
    rows: tuple[TaskRow, ...]
    source: str
    rule: AnswerRule
    max_new_tokens: int
    prefix: str = ANSWER_PREFIX
    template: str | Mapping[str, Any] | None = None
    stop: tuple[str, ...] = ()
    free_text: bool = False
    examples: tuple[TaskRow, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the rows and the reading rule: two results can be compared only where it is equal."""
        rows = [[row.index, dict(row.fields), row.answer, row.options] for row in self.rows]
        kind, pattern = self.rule.kind, self.rule.pattern
        rule = [RULES_VERSION[kind], kind, pattern, self.max_new_tokens, self.prefix, self.stop]
        examples = [[dict(row.fields), row.answer] for row in self.examples]
        parts = [rule, rows, *([examples] if examples else [])]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
        return sha256_bytes(text.encode())

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent answer; None where answers are free."""
        if self.rule.kind == "number" or not self.rows:
            return None
        return max(Counter(row.answer for row in self.rows).values()) / len(self.rows)


AnswerNames = Literal["option", "index", "position", "letter"]


def check_protocol(name: str, rule: AnswerRule, protocol: str) -> None:
    """Raises InputError when the protocol compares options and the task has none."""
    if protocol == "likelihood" and rule.kind not in ("options", "loss"):
        raise InputError(
            f"{name} has no options whose likelihood could be compared: use the protocol generate"
            " (--protocol generate, evaluation.protocol=generate)"
        )


def stored_rows(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are stored; one that cannot be read is an InputError."""
    rows = RawRows(resolve_source(source), set())
    for row in rows:
        if isinstance(row, RowError):
            raise InputError(f"{rows.place()}: {row}")
        yield pruned(row) if rows.is_table else row


def read_row(
    row: Mapping[str, Any],
    index: int,
    rule: AnswerRule,
    source: str,
    options: Sequence[str] = (),
    required: Sequence[str] = ("instruction",),
    optional: Sequence[str] = ("input",),
    names: AnswerNames = "option",
) -> TaskRow:
    """Checks one row. Its options are those given, else those of its column `options` or of its last line.

    `required` and `optional` are the columns that the template asks for; `names` says what its answer is
    where there are options: one of them, its number from 0 (index) or 1 (position), or its letter.

    Raises:
        InputError: naming the source, the row (from 1) and what is wrong with it.
    """
    place = f"{source}, row {index + 1}"
    try:
        check_text(json.dumps(row, ensure_ascii=False, default=str), row)
    except RowError as error:
        raise InputError(f"{place}: {error}") from None
    if rule.kind == "loss":
        return TaskRow(index, dict(row), "")  # in its form when the template is known
    if "messages" in row or "conversations" in row:
        fields, answer = _conversation(row, place)
    else:
        fields, answer = _fields(row, required, optional, place), row.get("answer")
    if rule.kind != "options":
        plain = _plain_answer(answer)
        if plain is None:
            raise InputError(f"{place}: 'answer' is missing or is not text or a number")
        if rule.kind == "number":
            _check_number(plain, place)
        return TaskRow(index, fields, plain)
    options = tuple(options or _own_options(row, place))
    if len(set(options)) < 2 or len(set(options)) < len(options):
        raise InputError(f"{place}: it needs two or more different options, found {list(options)}")
    return TaskRow(index, fields, _option_of(answer, options, names, place), options)


def _fields(
    row: Mapping[str, Any], required: Sequence[str], optional: Sequence[str], place: str
) -> dict[str, Any]:
    fields = {name: row.get(name) for name in required}
    fields |= {name: row[name] if row.get(name) is not None else "" for name in optional}
    for name, value in fields.items():
        if not isinstance(value, str) or (name in required and not value.strip()):
            raise InputError(f"{place}: '{name}' is missing or is not text")
    return fields


def _conversation(row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], Any]:
    """The turns that are read, with what the row says beside them, as in training; and the answer: the row's,
    or the assistant's last turn."""
    column = "messages" if "messages" in row else "conversations"
    try:
        read = conversation(messages_of(row[column], column), row)
    except RowError as error:
        raise InputError(f"{place}: {error}") from None
    asked, answer = read["messages"], row.get("answer")
    if asked[-1]["role"] == "assistant":
        answer = asked[-1]["content"] if answer is None else answer
        asked = asked[:-1]
    if not asked:
        raise InputError(f"{place}: '{column}' asks nothing: there is only the assistant's turn")
    return {**read, "messages": asked}, answer


def _option_of(answer: Any, options: Sequence[str], names: AnswerNames, place: str) -> str:
    """The option that the answer names."""
    shown = "/".join(options)
    if isinstance(answer, bool):
        words = {"true", "yes"} if answer else {"false", "no"}
        meant = [option for option in options if option.casefold() in words]
        if len(meant) != 1:
            said = str(answer).lower()
            raise InputError(f"{place}: its answer is {said}, but of its options {shown} none says so")
        return meant[0]
    plain = _plain_answer(answer)
    if plain is None:
        raise InputError(f"{place}: 'answer' is missing or is not text or a number")
    if names == "option":
        if plain not in options:
            hint = " (say `answer_names: index` or `position` if it is a number)" if plain.isdigit() else ""
            raise InputError(f"{place}: its answer '{plain}' is none of its options {shown}{hint}")
        return plain
    number = ord(plain.upper()) - ord("A") if names == "letter" and len(plain) == 1 else None
    if names != "letter" and re.fullmatch(r"\d+(\.0)?", plain):
        number = int(float(plain)) - (names == "position")
    if number is None or not 0 <= number < len(options):
        raise InputError(f"{place}: its answer '{plain}' is no {names} of its {len(options)} options {shown}")
    return options[number]


def _own_options(row: Mapping[str, Any], place: str) -> Sequence[str]:
    listed = row.get("options")
    if listed is None:
        return row_options(str(row.get("instruction") or ""))
    if not isinstance(listed, (list, tuple)) or not all(
        isinstance(option, str) and option for option in listed
    ):
        raise InputError(f"{place}: 'options' is not a list of texts")
    return listed


def row_options(instruction: str) -> tuple[str, ...]:
    """The options that a row's own last line names: `Answer format: answer1/answer2/answer3`."""
    found = OPTIONS_LINE.search(instruction)
    return tuple(option.strip() for option in found.group(1).split("/")) if found else ()


def _plain_answer(answer: Any) -> str | None:
    """Most files hold text, some a number, some a list like `[14.0]` or `["C"]`, of which the last counts."""
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return None
    return str(answer).strip() or None


def _check_number(answer: str, place: str) -> None:
    try:
        float(answer)
    except ValueError:
        raise InputError(f"{place}: its answer '{answer}' is not a number") from None
