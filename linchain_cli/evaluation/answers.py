"""From a generated text to an answer, and whether it is the right one.

The rules are those of the LLM-Adapters evaluation scripts. One deviation: for a letter they take the
first capital A to E anywhere, which finds the `A` of "A train ..."; here it is the last that stands alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NUMBER = re.compile(r"-?\d+\.?\d*")
LETTER = re.compile(r"\b[A-E]\b")
NUMBER_TOLERANCE = 1e-3
NEXT_TURN = "### Response:"

RuleKind = Literal["options", "pattern", "number", "letter"]


@dataclass(frozen=True)
class AnswerRule:
    """How a task's answer is read.

    `options`: the first of the options in the text (of `pattern`, if the task has one for all rows).
    `pattern`: the first match of `pattern`; its first group, if it has one.
    `number`: the last number, thousands separators removed, right within 0.001.
    `letter`: the last A to E that stands alone.
    """

    kind: RuleKind
    pattern: str | None = None

    def extract(self, text: str, options: Sequence[str] = ()) -> str | None:
        """The answer in a generated text, or None when there is none."""
        text = text.split(NEXT_TURN)[0].strip()
        if self.kind == "number":
            numbers = NUMBER.findall(text.replace(",", ""))
            return numbers[-1] if numbers else None
        if self.kind == "letter":
            letters = LETTER.findall(text)
            return letters[-1] if letters else None
        found = re.search(self.pattern or any_of(options), text)
        if found is None:
            return None
        return found.group(1) if found.re.groups else found.group(0)

    def is_correct(self, prediction: str | None, answer: str) -> bool:
        """Whether an extracted answer is the row's."""
        if prediction is None:
            return False
        if self.kind == "number":
            return abs(float(prediction) - float(answer)) <= NUMBER_TOLERANCE
        return prediction == answer


def any_of(options: Sequence[str]) -> str:
    """A pattern for any of these words; of two that begin alike the longer is tried first."""
    return "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
