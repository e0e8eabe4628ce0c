"""Templates that add nothing to what the rows hold: documents, and prompts with their completions.

An instruction, which evaluation asks through them, goes through another template.
"""

from __future__ import annotations

import hashlib

from linchain_cli.data.rows import Layout, Rendered, Row, RowError, Template


class DocumentTemplate:
    """`text`: all of a document is learned."""

    name = "text"
    layouts = (Layout(("text",), answer=()),)
    adds_bos = True

    def __init__(self, instructions: Template):
        self._instructions = instructions

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"text 1").hexdigest()

    def prompt(self, row: Row) -> str:
        return row["text"] if "text" in row else self._instructions.prompt(row)

    def response(self, row: Row) -> str | None:
        return None if "text" in row else self._instructions.response(row)

    def complete(self, row: Row, response: str) -> Rendered:
        return _answered(self.prompt(row), response)

    def end_marks(self) -> list[str]:
        return []

    def render(self, row: Row) -> list[Rendered]:
        text = row["text"]
        if not text.strip():
            raise RowError("'text' is empty: there is nothing to learn from this row")
        return [Rendered(text, [(0, len(text))])]


class CompletionTemplate:
    """`prompt-completion`: the completion directly behind the prompt, of which it alone is learned."""

    name = "prompt-completion"
    layouts = (Layout(("prompt", "completion"), answer=("completion",)),)
    adds_bos = True

    def __init__(self, instructions: Template):
        self._instructions = instructions

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"prompt-completion 1").hexdigest()

    def prompt(self, row: Row) -> str:
        return row["prompt"] if "prompt" in row else self._instructions.prompt(row)

    def response(self, row: Row) -> str | None:
        return row.get("completion") if "prompt" in row else self._instructions.response(row)

    def complete(self, row: Row, response: str) -> Rendered:
        return _answered(self.prompt(row), response)

    def end_marks(self) -> list[str]:
        return []

    def render(self, row: Row) -> list[Rendered]:
        if not row["completion"].strip():
            raise RowError("'completion' is empty: there is nothing to learn from this row")
        return [self.complete(row, row["completion"])]


def _answered(prompt: str, response: str) -> Rendered:
    return Rendered(prompt + response, [(len(prompt), len(prompt) + len(response))])
