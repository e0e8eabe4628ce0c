"""Tasks: which rows are asked, what their options are, and how an answer is read.

A task's rows come from a local LLM-Adapters file where there is one (`DIR/<task>/test.json`), else from
the benchmark's own data set on the hub, turned into the same prompts. `user_tasks` reads tasks of the
user's own.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from linchain_cli.data.sources import DATA_DIR_VARIABLE
from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.raw import RAW_SOURCES, RawSource
from linchain_cli.evaluation.task import Task, read_row, stored_rows
from linchain_cli.recipe import SourceConfig
from linchain_cli.storage import expand

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
_KNOWN = f"{', '.join([*SPECS, *GROUPS])}, a task's .yaml file, or lm_eval:NAME of lm-evaluation-harness"


def task_names() -> list[str]:
    """The built-in tasks and the groups."""
    return [*SPECS, *GROUPS]


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Groups replaced by their tasks, duplicates dropped; a path to a .yaml file stays as it is.

    Raises:
        InputError: a name that is neither.
    """
    expanded: dict[str, None] = {}
    for name in (part.strip() for listed in names for part in listed.split(",")):
        if name in GROUPS:
            expanded.update(dict.fromkeys(task for task, spec in SPECS.items() if spec.group == name))
        elif name in SPECS or name.endswith((".yaml", ".yml")):
            expanded[name] = None
        elif name:
            raise InputError(f"unknown task '{name}'.{did_you_mean(name, task_names())} Known: {_KNOWN}.")
    if not expanded:
        raise InputError(f"no task is named. Known: {_KNOWN}.")
    return list(expanded)


def load_tasks(
    names: Iterable[str], data_dir: Path | str | None = None, limit: int | None = None
) -> list[Task]:
    """The named tasks and groups, each cut to its first `limit` rows.

    Raises:
        InputError: an unknown task, rows that cannot be found or used, or two tasks of one name.
    """
    tasks = [load_task(name, data_dir, limit) for name in expand_tasks(names)]
    for own, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise InputError(f"two tasks are named '{own}': give yours another `name` in its file")
    return tasks


def load_task(name: str, data_dir: Path | str | None = None, limit: int | None = None) -> Task:
    """One task by its built-in name or its .yaml file, cut to its first `limit` rows.

    Raises:
        InputError: rows that cannot be found or used.
    """
    if name.endswith((".yaml", ".yml")):
        from linchain_cli.evaluation.user_tasks import load_user_task

        return load_user_task(expand(name), limit)
    spec = SPECS[name]
    raw_rows, source = _find_rows(name, data_dir)
    rows = tuple(read_row(row, index, spec.rule, source) for index, row in enumerate(islice(raw_rows, limit)))
    if not rows:
        raise InputError(f"{source} has no rows")
    return Task(name, rows, source, spec.rule, spec.max_new_tokens)


def _find_rows(name: str, data_dir: Path | str | None) -> tuple[Iterable[Mapping[str, Any]], str]:
    """The rows of a built-in task and where they were found."""
    if name == "everyday":
        from linchain_cli.data.everyday import everyday_rows

        return everyday_rows("test"), "everyday (test)"
    if data_dir is not None and not expand(data_dir).is_dir():
        raise InputError(f"--data-dir {data_dir}: there is no such directory")
    tried = []
    for folder in dict.fromkeys(filter(None, [data_dir, os.environ.get(DATA_DIR_VARIABLE)])):
        path = expand(folder) / name / "test.json"
        if path.is_file():
            return stored_rows(SourceConfig(path=str(path))), str(path)
        tried.append(str(path))
    return _hub_rows(name, tried)


def _hub_rows(name: str, tried: Sequence[str]) -> tuple[Iterable[Mapping[str, Any]], str]:
    source = RAW_SOURCES.get(name)
    if source is None:
        raise InputError(_not_found(name, tried))
    from linchain_cli.data.hub import load_hub_dataset

    try:
        path = f"{source.path}/{source.name}" if source.name else source.path
        loaded = load_hub_dataset(path, source.split, source.revision)
    except InputError as error:
        raise InputError(_not_found(name, tried, f"the hub's {source}: {error}")) from error
    return _built(source, loaded), str(source)


def _built(source: RawSource, rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for index, raw in enumerate(rows):
        try:
            yield source.build(raw)
        except (KeyError, ValueError, TypeError) as error:
            reason = f"it has no field {error}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"{source}, row {index + 1} cannot be used: {reason}") from None


def _not_found(name: str, tried: Sequence[str], hub: str = "no hub data set with these rows is known") -> str:
    local = [f"no file {path}" for path in tried] or [f"neither --data-dir nor {DATA_DIR_VARIABLE} is given"]
    return (
        f"the rows of {name} cannot be found: {'; '.join([*local, hub.rstrip('.')])}. To have them, put"
        f" dataset/{name}/test.json of github.com/AGI-Edgerunners/LLM-Adapters at DIR/{name}/test.json"
        " and give --data-dir DIR."
    )
