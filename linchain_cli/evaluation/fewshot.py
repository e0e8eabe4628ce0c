"""Examples in front of a question: earlier turns of a conversation, or answered prompts above it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from linchain_cli.data.conversation import Conversation, Message
from linchain_cli.data.messages import conversation_of
from linchain_cli.data.rows import Rendered, Row, Template
from linchain_cli.evaluation.task import Task
from linchain_cli.storage import sha256_bytes

BETWEEN = "\n\n"


def with_examples(template: Template, task: Task) -> Template:
    """The template with the task's examples in front of every question; itself without any."""
    if not task.examples:
        return template
    answered = [(row.fields, task.prefix + row.answer) for row in task.examples]
    return (_Turns if template.name == "chat" else _Above)(template, answered)


class _Examples:
    """What both kinds have in common; `answered` are examples' columns and answers."""

    def __init__(self, template: Template, answered: Sequence[tuple[Row, str]]):
        self._template, self._answered = template, answered
        self.name, self.layouts, self.adds_bos = template.name, template.layouts, template.adds_bos
        self.frame, self.thinking = template.frame, template.thinking

    @property
    def fingerprint(self) -> str:
        parts = [self._template.fingerprint, type(self).__name__, [[dict(r), a] for r, a in self._answered]]
        return sha256_bytes(json.dumps(parts, sort_keys=True).encode())

    def response(self, row: Row) -> str | None:
        return self._template.response(row)

    def end_marks(self) -> list[str]:
        return self._template.end_marks()


class _Above(_Examples):
    """Each example as its prompt and answer, an empty line behind it."""

    def _before(self) -> str:
        lead, tail = self.frame
        shown = (f"{self._template.prompt(row)}{lead}{answer}{tail}" for row, answer in self._answered)
        return "".join(text + BETWEEN for text in shown)

    def prompt(self, row: Row) -> str:
        return self._before() + self._template.prompt(row)

    def complete(self, row: Row, response: str) -> Rendered:
        return self._behind(self._template.complete(row, response))

    def render(self, row: Row) -> list[Rendered]:
        return [self._behind(rendered) for rendered in self._template.render(row)]

    def _behind(self, rendered: Rendered) -> Rendered:
        before = self._before()
        spans = [(start + len(before), end + len(before)) for start, end in rendered.spans]
        return replace(rendered, text=before + rendered.text, spans=spans)


class _Turns(_Examples):
    """Each example as a user's turn and the assistant's answer."""

    def prompt(self, row: Row) -> str:
        return self._template.prompt(self._conversation(row))

    def complete(self, row: Row, response: str) -> Rendered:
        return self._template.complete(self._conversation(row), response)

    def render(self, row: Row) -> list[Rendered]:
        return self._template.render(self._conversation(row))[-1:]

    def _conversation(self, row: Row) -> Conversation:
        turns: list[Message] = []
        for fields, answer in self._answered:
            shown = conversation_of(fields)["messages"]
            turns += [*shown, {"role": "assistant", "content": answer, "train": False}]
        asked = conversation_of(row)
        messages = asked["messages"]
        system = [turn for turn in messages[:1] if turn["role"] == "system"]
        return {**asked, "messages": [*system, *turns, *messages[len(system) :]]}
