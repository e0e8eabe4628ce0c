"""Whether a model can be asked the rows of some tasks, found out before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from linchain_cli.data.rows import Template
from linchain_cli.data.templates import get_template
from linchain_cli.evaluation.fewshot import with_examples
from linchain_cli.evaluation.jobs import ProtocolName, Setup, texts_of
from linchain_cli.evaluation.task import Task, TaskRow, check_protocol
from linchain_cli.model.limits import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_questions(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    tasks: Sequence[Task],
    protocol: ProtocolName,
    limits: Limits,
) -> list[str]:
    """Encodes every row of the tasks as an evaluation will, which computes nothing yet.

    Returns:
        What is to be said of rows that the model reads without having been made for them.

    Raises:
        InputError: a task cannot be evaluated under this protocol, or the model cannot be asked a row.
    """
    for task in tasks:
        check_protocol(task.name, task.rule, protocol)
    found = []
    for task in tasks:
        own = with_examples(task_template(task, template, tokenizer), task)
        setup = Setup(None, tokenizer, own, batch_tokens=0)
        longest = max(_longest(setup, task, row, protocol, limits) for row in task.rows)
        answer = task.max_new_tokens if protocol == "generate" else 0
        what = f"{task.name}: the longest row with its answer has"
        if repeated := _among_examples(task):
            found.append(f"{task.name}: {repeated} of its rows stand with their answers among its examples")
        if warning := limits.check_length(longest + answer, what, f"leave {task.name} out"):
            found.append(warning)
    return found


def task_template(task: Task, template: Template, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The task's own template, or the one that the model was trained with."""
    return template if task.template in (None, template.name) else get_template(task.template, tokenizer)


def _among_examples(task: Task) -> int:
    """How many rows ask what an example has answered."""
    shown = [one.fields for one in task.examples]
    return sum(row.fields in shown for row in task.rows)


def _longest(setup: Setup, task: Task, row: TaskRow, protocol: ProtocolName, limits: Limits) -> int:
    """Tokens of the row's longest text. Raises InputError for one without an embedding."""
    tokens, longest = texts_of(setup, task, row, protocol)
    limits.check_ids(tokens, setup.tokenizer, f"{task.source}, row {row.index + 1}")
    return longest
