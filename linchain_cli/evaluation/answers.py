"""From a generated text to an answer, and whether it is the right one.

A text may be read in several ways, of which the first one counts and the others are reported beside it.
The published ways are those of the LLM-Adapters evaluation scripts. They find an option within a word ("no"
in "not"), in its own case only, and for a letter the first capital A to E anywhere ("A train ...").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from linchain_cli.evaluation.numbers import NUMBER_TOLERANCE, is_number, last_number, stated_number

RuleKind = Literal["options", "pattern", "number", "letter", "loss"]
# Changes with the rules below: answers that were read in another way are other results.
RULES_VERSION: dict[RuleKind, int] = {"options": 3, "pattern": 3, "number": 3, "letter": 4, "loss": 2}
_HEADING = "###"
# A heading of a new turn; four marks are how GSM8K writes its answer.
_NEXT_TURN = re.compile(rf"(?<!#){_HEADING}(?!#)")
_LETTER = re.compile(r"\b[A-E]\b")
# "The answer is (B)", "Answer: B", "option B": the first two say which one it is, the last may only name one.
_STATED_LETTER = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\s+\w+){0,3}?\s*(?P<says>\b(?i:is|must be)\b|[:=])?[\s:*$({\[\"']*"
    r"(?:\\boxed\s*\{|\\text\s*\{|(?i:option|choice)\s)*[\s*({\[\"']*(?P<letter>[A-E])\b(?!['’]\w)",
)


@dataclass(frozen=True)
class Reading:
    """One way to read a text: the answer that was found, or None, and whether it is right."""

    prediction: str | None
    correct: bool


@dataclass(frozen=True)
class AnswerRule:
    """How a task's answer is read.

    `options`: the first of the row's options that stands in the text as a word, whatever its case. With
        `pattern` the published reading, its first match, is reported beside it.
    `pattern`: the first match of `pattern`; its first group, if it has one.
    `number`: `strict`, the last number, right within 0.001; beside it `flexible`, the stated number.
    `letter`: the stated A to E, else the last that stands alone.
    `loss`: no answer is read; the row's own text is scored.
    """

    kind: RuleKind
    pattern: str | None = None

    def readings(self, text: str, options: Sequence[str], answer: str) -> dict[str, Reading]:
        """The text read in each way, by its name; the first one counts."""
        text = text.strip()
        if self.kind == "number":
            strict, flexible = last_number(text), stated_number(text)
            is_right = strict is not None and abs(float(strict) - float(answer)) <= NUMBER_TOLERANCE
            return {
                "strict": Reading(strict, is_right),
                "flexible": Reading(flexible, is_number(flexible, answer)),
            }
        if self.kind == "letter":
            return {"letter": _exact(stated_letter(text), answer)}
        if self.kind == "pattern":
            return {"pattern": _exact(_first_match(self.pattern, text), answer)}
        found = {"words": _exact(first_option(text, options), answer)}
        if self.pattern:
            found["published"] = _exact(_first_match(self.pattern, text), answer)
        return found


def within_turn(text: str, prompt: str) -> str:
    """The text up to the heading of a new turn, which only a model writes whose prompts have headings."""
    return _NEXT_TURN.split(text)[0] if _HEADING in prompt else text


def _exact(prediction: str | None, answer: str) -> Reading:
    return Reading(prediction, prediction == answer)


def _first_match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    if found is None:
        return None
    return found.group(1) if found.re.groups else found.group(0)


def first_option(text: str, options: Sequence[str]) -> str | None:
    """The option that stands first in the text as words of its own; of two that begin alike the longer."""
    found = re.search(any_of(options), text, re.IGNORECASE)
    if found is None:
        return None
    # Options that differ in case alone are told apart where the text has one of them exactly.
    if found.group() in options:
        return found.group()
    # As the search compares letters: Turkish İ and ı are i to it, and not to casefold().
    return next(one for one in options if re.fullmatch(re.escape(one), found.group(), re.IGNORECASE))


def any_of(options: Sequence[str]) -> str:
    """A pattern for any of these texts as whole words; of two that begin alike the longer is tried first."""
    return "|".join(_as_words(option) for option in sorted(options, key=len, reverse=True))


def _as_words(option: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", option) else ""
    after = r"(?!\w)" if re.search(r"\w$", option) else ""
    return before + re.escape(option) + after


def stated_letter(text: str) -> str | None:
    """The letter of the last statement ("the answer is (B)"), else the last one that is called an option or
    answer, else the last that stands alone."""
    named = list(_STATED_LETTER.finditer(text))
    letters = [found["letter"] for found in named if found["says"]]
    letters = letters or [found["letter"] for found in named] or _LETTER.findall(text)
    return letters[-1] if letters else None
