"""Tasks: which rows are asked, what their options are, and how an answer is read.

A task's rows come from a local LLM-Adapters file where there is one (`DIR/<task>/test.json`), else from
the benchmark's own data set on the hub, turned into the same prompts. `user_tasks` reads tasks of the
user's own.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.raw import ANSWER_PREFIX, RAW_SOURCES
from linchain_cli.storage import sha256_bytes

DATA_DIR_VARIABLE = "LINCHAIN_DATA_DIR"
OPTIONS_LINE = re.compile(r"Answer format:\s*(\S[^\n]*?)\s*$")

COMMONSENSE_TOKENS = 32
ARITHMETIC_TOKENS = 256


@dataclass(frozen=True)
class Spec:
    """What is known of a built-in task before any row is read."""

    group: str
    rule: AnswerRule
    max_new_tokens: int


def _commonsense(pattern: str) -> Spec:
    return Spec("commonsense", AnswerRule("options", pattern), COMMONSENSE_TOKENS)


_ANSWERS = "answer1|answer2|answer3|answer4|answer5"
_NUMBER = Spec("arithmetic", AnswerRule("number"), ARITHMETIC_TOKENS)
SPECS: dict[str, Spec] = {
    "boolq": _commonsense("true|false"),
    "piqa": _commonsense("solution1|solution2"),
    "social_i_qa": _commonsense(_ANSWERS),
    "hellaswag": _commonsense("ending1|ending2|ending3|ending4"),
    "winogrande": _commonsense("option1|option2"),
    "ARC-Easy": _commonsense(_ANSWERS),
    "ARC-Challenge": _commonsense(_ANSWERS),
    "openbookqa": _commonsense(_ANSWERS),
    "gsm8k": _NUMBER,
    "SVAMP": _NUMBER,
    "AQuA": Spec("arithmetic", AnswerRule("letter"), ARITHMETIC_TOKENS),
    "MultiArith": _NUMBER,
    "AddSub": _NUMBER,
    "SingleEq": _NUMBER,
    "mawps": _NUMBER,
    "everyday": Spec("everyday", AnswerRule("options"), COMMONSENSE_TOKENS),
}
GROUPS = ("commonsense", "arithmetic")


@dataclass(frozen=True)
class TaskRow:
    """One question. `fields` go through the template; `options` is empty where the answer is free."""

    index: int
    fields: Mapping[str, str]
    answer: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A named list of questions, where they come from, and how answers are read.

    `prefix` is what an answer begins with before the option; `template` replaces the model's when it is set.
    """

    name: str
    rows: tuple[TaskRow, ...]
    source: str
    rule: AnswerRule
    max_new_tokens: int
    prefix: str = ANSWER_PREFIX
    template: str | Mapping[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the rows and the reading rule: two results can be compared only where it is equal."""
        rows = [[row.index, dict(row.fields), row.answer, row.options] for row in self.rows]
        rule = [self.rule.kind, self.rule.pattern, self.max_new_tokens, self.prefix]
        return sha256_bytes(json.dumps([rule, rows], sort_keys=True, ensure_ascii=False).encode())

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent answer; None where answers are free."""
        if self.rule.kind == "number" or not self.rows:
            return None
        return max(Counter(row.answer for row in self.rows).values()) / len(self.rows)


def task_names() -> list[str]:
    """The built-in tasks and the groups."""
    return [*SPECS, *GROUPS]


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Groups replaced by their tasks, duplicates dropped; a path to a .yaml file stays as it is.

    Raises:
        InputError: a name that is neither.
    """
    expanded: dict[str, None] = {}
    for name in (part.strip() for name in names for part in name.split(",")):
        if name in GROUPS:
            expanded.update(dict.fromkeys(task for task, spec in SPECS.items() if spec.group == name))
        elif name in SPECS or name.endswith((".yaml", ".yml")):
            expanded[name] = None
        elif name:
            raise InputError(
                f"unknown task '{name}'.{did_you_mean(name, task_names())}"
                f" Known: {', '.join(task_names())}, or a task's .yaml file."
            )
    if not expanded:
        raise InputError(f"no task is named. Known: {', '.join(task_names())}, or a task's .yaml file.")
    return list(expanded)


def load_tasks(names: Iterable[str], data_dir: Path | str | None = None, limit: int | None = None) -> list[Task]:
    """The named tasks and groups, each cut to its first `limit` rows.

    Raises:
        InputError: an unknown task, rows that cannot be found or used, or two tasks of one name.
    """
    tasks = [load_task(name, data_dir, limit) for name in expand_tasks(names)]
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise InputError(f"two tasks are named '{name}': give one of them another `name` in its file")
    return tasks


def load_task(name: str, data_dir: Path | str | None = None, limit: int | None = None) -> Task:
    """One task by its built-in name or its .yaml file, cut to its first `limit` rows.

    Raises:
        InputError: rows that cannot be found or used.
    """
    if name.endswith((".yaml", ".yml")):
        from linchain_cli.evaluation.user_tasks import load_user_task

        return load_user_task(Path(name), limit)
    spec = SPECS[name]
    raw_rows, source = _find_rows(name, data_dir)
    rows = tuple(read_row(row, index, spec.rule, source) for index, row in enumerate(raw_rows[:limit]))
    if not rows:
        raise InputError(f"{source} has no rows")
    return Task(name, rows, source, spec.rule, spec.max_new_tokens)


def read_row(
    row: Any,
    index: int,
    rule: AnswerRule,
    source: str,
    options: Sequence[str] = (),
    required: Sequence[str] = ("instruction",),
    optional: Sequence[str] = ("input",),
) -> TaskRow:
    """Checks one row. Its options are those given, else its column `options`, else those its own last line names.

    `required` and `optional` are the columns that the template asks for.

    Raises:
        InputError: naming the source, the row (from 1) and what is wrong with it.
    """
    place = f"{source}, row {index + 1}"
    if not isinstance(row, Mapping):
        raise InputError(f"{place}: expected a mapping with {', '.join(required)} and answer, got {row!r:.60}")
    fields = {name: row.get(name) for name in required}
    fields |= {name: row[name] if row.get(name) is not None else "" for name in optional}
    for name, value in fields.items():
        if not isinstance(value, str) or (name in required and not value.strip()):
            raise InputError(f"{place}: '{name}' is missing or is not text")
    answer = _plain_answer(row.get("answer"))
    if answer is None:
        raise InputError(f"{place}: 'answer' is missing or is not text or a number")
    if rule.kind == "number":
        _check_number(answer, place)
    if rule.kind != "options":
        return TaskRow(index, fields, answer)
    options = tuple(options or _own_options(row, place))
    if len(set(options)) < 2 or len(set(options)) < len(options):
        raise InputError(f"{place}: it needs two or more different options, found {list(options)}")
    if answer not in options:
        raise InputError(f"{place}: its answer '{answer}' is none of its options {'/'.join(options)}")
    return TaskRow(index, fields, answer, options)


def _own_options(row: Mapping[str, Any], place: str) -> Sequence[str]:
    listed = row.get("options")
    if listed is None:
        return row_options(str(row.get("instruction") or ""))
    if not isinstance(listed, (list, tuple)) or not all(isinstance(option, str) and option for option in listed):
        raise InputError(f"{place}: 'options' is not a list of texts")
    return listed


def row_options(instruction: str) -> tuple[str, ...]:
    """The options that a row's own last line names: `Answer format: answer1/answer2/answer3`."""
    found = OPTIONS_LINE.search(instruction)
    return tuple(option.strip() for option in found.group(1).split("/")) if found else ()


def _plain_answer(answer: Any) -> str | None:
    """Some LLM-Adapters files hold `[14.0]` or `["C"]`, of which the last counts, some a number, most text."""
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


def _find_rows(name: str, data_dir: Path | str | None) -> tuple[list[Any], str]:
    """The rows of a built-in task and where they were found."""
    if name == "everyday":
        from linchain_cli.data.everyday import everyday_rows

        return everyday_rows("test"), "everyday (test)"
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"--data-dir {data_dir}: there is no such directory")
    tried = []
    for folder in dict.fromkeys(filter(None, [data_dir, os.environ.get(DATA_DIR_VARIABLE)])):
        path = Path(folder) / name / "test.json"
        if path.is_file():
            return read_json_rows(path), str(path)
        tried.append(str(path))
    return _hub_rows(name, tried)


def read_json_rows(path: Path) -> list[Any]:
    """A JSON file that holds a list.

    Raises:
        InputError: it cannot be read or holds something else.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a JSON list of rows, got {type(rows).__name__}")
    return rows


def _hub_rows(name: str, tried: Sequence[str]) -> tuple[list[Any], str]:
    source = RAW_SOURCES.get(name)
    if source is None:
        raise InputError(_not_found(name, tried))
    from linchain_cli.data.hub import load_hub_dataset

    try:
        path = f"{source.path}/{source.name}" if source.name else source.path
        loaded = load_hub_dataset(path, source.split, source.revision)
    except InputError as error:
        raise InputError(_not_found(name, tried, f"the hub's {source}: {error}")) from error
    rows = []
    for index, raw in enumerate(loaded):
        try:
            rows.append(source.build(raw))
        except (KeyError, ValueError, TypeError) as error:
            reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{source}, row {index + 1} cannot be used: {reason}") from None
    return rows, str(source)


def _not_found(name: str, tried: Sequence[str], hub: str = "no hub data set with these rows is known") -> str:
    local = [f"no file {path}" for path in tried] or [f"neither --data-dir nor {DATA_DIR_VARIABLE} is given"]
    return (
        f"the rows of {name} cannot be found: {'; '.join([*local, hub.rstrip('.')])}. To have them, put"
        f" dataset/{name}/test.json of github.com/AGI-Edgerunners/LLM-Adapters at DIR/{name}/test.json and give --data-dir DIR."
    )
