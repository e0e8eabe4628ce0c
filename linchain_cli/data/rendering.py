"""What a template is to the rest of the program: rows in, texts with supervised spans out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that cannot be used. The message names the cell; the reader adds file and row."""


@dataclass(frozen=True)
class Rendered:
    """The text of one training row.

    `spans` are (start, end) character positions that are supervised, in order. `ends` says that the text
    ends the answer, so that the end-of-sequence token belongs behind it.
    """

    text: str
    spans: list[tuple[int, int]]
    ends: bool = True


@dataclass(frozen=True)
class Layout:
    """The columns of one kind of row that a template accepts."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@runtime_checkable
class Template(Protocol):
    """What training and evaluation ask of a template."""

    name: str
    layouts: tuple[Layout, ...]
    adds_bos: bool  # whether the tokenizer's own leading tokens (BOS) belong in front of the text

    @property
    def fingerprint(self) -> str:
        """Changes whenever any row could render differently."""

    def prompt(self, row: Row) -> str:
        """The text a model is given before its answer; needs no response column."""

    def response(self, row: Row) -> str | None:
        """The answer a row holds, or None when its columns are absent."""

    def complete(self, row: Row, response: str) -> Rendered:
        """The row's prompt followed by `response`, and nothing that closes it: what evaluation scores."""

    def render(self, row: Row) -> Rendered:
        """The full training text; raises RowError when the row's values do not fit."""
