"""Rows, and what they become: texts with supervised spans, made by a template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from linchain_cli.errors import InputError

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that cannot be used. The message names the cell; the reader adds file and row."""


class UnusableRow(InputError):
    """A row that cannot be used, where none may be left out: `place` says which, `reason` why."""

    def __init__(self, place: str, reason: RowError):
        remedy = "Mend the row, or set data.on_bad_row: skip to leave such rows out."
        super().__init__(f"{place}: {reason}. {remedy}")
        self.place, self.reason = place, reason


@dataclass(frozen=True)
class Rendered:
    """The text of one training row.

    `spans` are (start, end) character positions that are supervised, in order. `ends` says that the text
    ends the answer, so that the end-of-sequence token belongs behind it. `remarks` are what a user should
    know of how the row was made; a template makes few different ones.
    """

    text: str
    spans: list[tuple[int, int]]
    ends: bool = True
    remarks: tuple[str, ...] = ()

    @classmethod
    def answered(cls, prompt: str, response: str) -> Rendered:
        """The response behind the prompt, of which it alone is supervised."""
        return cls(prompt + response, [(len(prompt), len(prompt) + len(response))])

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts that it is made of, as a labelled row may have two."""
        return (self.text,)


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of row that a template accepts. `answer` are those that the model learns to
    give."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    answer: tuple[str, ...] = ("output",)


class Template(Protocol):
    """What training and evaluation ask of a template: what is trained on begins with what is asked."""

    name: str
    layouts: tuple[Layout, ...]
    adds_bos: bool  # whether the tokenizer's own leading tokens (BOS) belong in front of the text
    frame: tuple[str, str]  # what stands in front of every answer, behind the prompt, and what behind it
    # What is written in front of an answer's reasoning, and between that and the answer; None: it knows none.
    thinking: tuple[str, str] | None

    @property
    def fingerprint(self) -> str:
        """Changes whenever any row could render differently."""

    def prompt(self, row: Row) -> str:
        """The text a model is given before its answer; needs no response column."""

    def response(self, row: Row) -> str | None:
        """The answer a row holds, or None when its columns are absent."""

    def complete(self, row: Row, response: str) -> Rendered:
        """The row's prompt followed by `response`, and nothing that closes it: what evaluation scores."""

    def end_marks(self) -> list[str]:
        """What ends an answer beside the tokenizer's end of sequence: control tokens, as text."""

    def render(self, row: Row) -> list[Rendered]:
        """The training rows that a row becomes; raises RowError when its values do not fit."""
