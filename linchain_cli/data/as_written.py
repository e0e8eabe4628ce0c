"""Templates that add nothing to what the rows hold: documents, and prompts with their completions.

An instruction, which evaluation asks through them, goes through another template.
"""

from __future__ import annotations

import hashlib

from linchain_cli.data.rows import Layout, Rendered, Row, RowError, Template


class _AsWritten:
    """A row of its own kind, which has the layout's first column, is asked with what stands there."""

    name: str
    layouts: tuple[Layout, ...]
    adds_bos = True
    frame = ("", "")
    thinking = None

    def __init__(self, instructions: Template):
        self._instructions = instructions
        self._asked = self.layouts[0].required[0]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} 1".encode()).hexdigest()

    def prompt(self, row: Row) -> str:
        return row[self._asked] if self._asked in row else self._instructions.prompt(row)

    def response(self, row: Row) -> str | None:
        if self._asked not in row:
            return self._instructions.response(row)
        return next((row.get(name) for name in self.layouts[0].answer), None)

    def complete(self, row: Row, response: str) -> Rendered:
        return Rendered.answered(self.prompt(row), response)

    def end_marks(self) -> list[str]:
        return []


class DocumentTemplate(_AsWritten):
    """`text`: all of a document is learned."""

    name = "text"
    layouts = (Layout(("text",), answer=()),)

    def render(self, row: Row) -> list[Rendered]:
        text = row["text"]
        if not text.strip():
            raise RowError("'text' is empty: there is nothing to learn from this row")
        return [Rendered(text, [(0, len(text))])]


class CompletionTemplate(_AsWritten):
    """`prompt-completion`: the completion directly behind the prompt, of which it alone is learned."""

    name = "prompt-completion"
    layouts = (Layout(("prompt", "completion"), answer=("completion",)),)

    def render(self, row: Row) -> list[Rendered]:
        if not row["completion"].strip():
            raise RowError("'completion' is empty: there is nothing to learn from this row")
        return [self.complete(row, row["completion"])]
