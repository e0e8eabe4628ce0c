"""What a model thought before it answered, and what it answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from linchain_cli.data.rows import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USUAL_MARKS = ("<think>", "</think>")


class Reasoning:
    """Takes what a model wrote apart, by the marks that its template writes around reasoning, or by the usual
    ones. Marks may be control tokens, which a decoded text does not show, or plain letters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        self._tokenizer = tokenizer
        self._begins, self._ends = template.thinking or USUAL_MARKS
        self._begin_ids, self._end_ids = (
            tokenizer(mark, add_special_tokens=False).input_ids for mark in (self._begins, self._ends)
        )
        self._special = set(tokenizer.all_special_ids)

    @property
    def end(self) -> int | str:
        """The token behind which an answer stands; the mark itself where it ends in no token of its own."""
        *others, last = self._end_ids
        return self._ends if others and last not in self._special else last

    def parts(self, tokens: Sequence[int], prompt: str) -> tuple[str, str | None]:
        """The reasoning and the answer behind it, which is None where the reasoning does not end.

        Args:
            prompt: the text behind which `tokens` were written; it may begin the reasoning.
        """
        end, begin = _last(tokens, self._end_ids), _last(tokens, self._begin_ids)
        if end is not None:
            start = begin + len(self._begin_ids) if begin is not None and begin < end else 0
            answer = tokens[end + len(self._end_ids) :]
            return self._decoded(self._message(tokens[start:end])), self._decoded(answer)
        text = self._decoded(tokens)
        thought, ended, answer = text.rpartition(self._ends)
        if ended:
            return thought.rpartition(self._begins)[2], answer
        begun = begin is not None or self._begins in text or prompt.rstrip().endswith(self._begins)
        return (text.rpartition(self._begins)[2], None) if begun else ("", text)

    def shown(self, tokens: Sequence[int]) -> str:
        """What was written, with the marks, also where they are control tokens: without these nobody would
        know where a thought ends."""
        hidden = self._special.intersection([*self._begin_ids, *self._end_ids])
        return self._tokenizer.decode(tokens, skip_special_tokens=not hidden)

    def _message(self, tokens: Sequence[int]) -> Sequence[int]:
        """As far as a control token, behind which other things begin (in gpt-oss the answer's author)."""
        return tokens[: next((at for at, token in enumerate(tokens) if token in self._special), None)]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _last(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted` begins for the last time."""
    places = range(len(tokens) - len(wanted), -1, -1)
    return next((at for at in places if list(tokens[at : at + len(wanted)]) == list(wanted)), None)
