"""Everyday reasoning: generated rows in the Commonsense170K format, true by construction.

A fact holds for whole kinds of things: birds and aircraft can fly; fish, trees and metals cannot; of insects
nothing is said. The words of each kind are divided once into those of training rows and those of test
rows, so a test row asks about things that no training row mentions, in its wrong options too: what carries
over is the kind of question, and what the model knew of the things before.

Answers give no hint of themselves: labels and places are balanced, each property is asked as often with
true as with false, and each kind of thing is right about as often as it is wrong.

Options are named by what they say ("to use a knife") and not by labels ("solution1") as in Commonsense170K.
To answer with a label a model must find the right thing and bind it to its label, which small models do not
learn in minutes (Robinson and Wingate, arXiv 2210.12353; docs/evidence.md has a learning curve).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

from linchain_cli.data.everyday_facts import GOALS, PROPERTIES, SIZES, Fact
from linchain_cli.data.everyday_words import KINDS, SOUNDS_LIKE_Y, WITHOUT_ARTICLE
from linchain_cli.errors import InputError

T = TypeVar("T")

SEED = 20241105
TEST_SHARE = 1 / 3  # of each kind's words
# Rows of each style. True or false is learnt last and has most of them.
STYLES = {
    "train": {"boolq": 800, "piqa": 400, "answers3": 140, "answers4": 130, "answers5": 130},
    "test": {"boolq": 220, "piqa": 100, "answers3": 34, "answers4": 33, "answers5": 33},
}


def words(split: str) -> dict[str, tuple[str, ...]]:
    """The words of each kind that rows of `split` (train or test) may contain; the two splits share none."""
    if split not in STYLES:
        raise InputError(f"the data set 'everyday' has the splits train and test, not '{split}'.")
    parts = {}
    for kind, all_words in KINDS.items():
        shuffled = list(all_words)
        random.Random(f"{SEED} {kind}").shuffle(shuffled)
        cut = round(len(shuffled) * TEST_SHARE)
        parts[kind] = tuple(shuffled[:cut] if split == "test" else shuffled[cut:])
    return parts


def everyday_rows(split: str) -> list[dict[str, str]]:
    """All rows of a split, always the same: dicts with instruction, input (empty), output and answer."""
    writer = _Writer(split)
    rows = [row for style, count in STYLES[split].items() for row in writer.rows(style, count)]
    random.Random(f"{SEED} order of {split}").shuffle(rows)
    return rows


class _Writer:
    """Draws the rows of one split; no text comes twice."""

    def __init__(self, split: str):
        self._words = words(split)
        self._random = random.Random(f"{SEED} {split}")
        self._decks: dict[object, list] = {}
        self._seen: set[str] = set()

    def rows(self, style: str, count: int) -> list[dict[str, str]]:
        """`count` rows of a style."""
        made: list[dict[str, str]] = []
        while len(made) < count:
            drawn = self._true_and_false() if style == "boolq" else [self._choice(style)]
            texts = {row["instruction"] for row in drawn}
            if len(texts) == len(drawn) and not texts & self._seen:
                self._seen |= texts
                made += drawn
        return made

    def _deal(self, name: object, cards: Iterable[T]) -> T:
        """The next card of the deck called `name`; an empty deck is filled with `cards` and shuffled."""
        deck = self._decks.setdefault(name, [])
        if not deck:
            deck.extend(cards)
            self._random.shuffle(deck)
        return deck.pop()

    def _word(self, kind: str) -> str:
        return self._deal(("word", kind), self._words[kind])

    def _asked(self, about: tuple[Fact, ...]) -> tuple[Fact, str]:
        """A fact and a kind of which it is true: each kind as often as any other, then each of its facts."""
        kind = self._deal(
            ("kind", about), [kind for kind in KINDS if any(kind in fact.yes for fact in about)]
        )
        return self._deal(("fact", about, kind), [fact for fact in about if kind in fact.yes]), kind

    def _true_and_false(self) -> list[dict[str, str]]:
        """Two questions of one property, so that neither the property nor the kind tells the label."""
        if self._deal("comparison", [True] + 19 * [False]):
            small, large = sorted(self._random.sample(range(len(SIZES)), 2))
            x, y = (
                _phrase(kind, self._word(kind))
                for kind in map(self._random.choice, (SIZES[small], SIZES[large]))
            )
            questions = [f"is {x} smaller than {y}?", f"is {x} bigger than {y}?"]
            if self._deal("order", [True, False]):
                questions = [f"is {y} bigger than {x}?", f"is {y} smaller than {x}?"]
        else:
            fact, kind = self._asked(tuple(fact for fact in PROPERTIES if fact.asked))
            other = self._deal(("no", fact), fact.no)
            questions = [fact.question.format(x=_phrase(kind, self._word(kind))) for kind in (kind, other)]
        return [
            _row(
                f"Please answer the following question with true or false, question: {question}",
                ["true", "false"],
                answer,
            )
            for question, answer in zip(questions, ["true", "false"], strict=True)
        ]

    def _choice(self, style: str) -> dict[str, str]:
        """One thing that fits among others that do not, each of another kind; the right place is dealt."""
        count = {"piqa": 2, "answers3": 3, "answers4": 4, "answers5": 5}[style]
        place = self._deal(("place", style), range(count))
        fact, kind = self._asked(GOALS if style == "piqa" else (*PROPERTIES, *GOALS))
        served = {kind for goal in GOALS for kind in goal.yes}
        wrong = [other for other in fact.no if style != "piqa" or other in served]
        kinds = self._random.sample(wrong, count - 1)
        kinds.insert(place, kind)
        if style == "piqa":
            options = [fact.solution.format(x=_phrase(kind, self._word(kind))) for kind in kinds]
            text = f"Please choose the correct solution to the question: How can you {fact.wish}?"
        else:
            options = [self._word(kind) for kind in kinds]
            text = f"Please choose the correct answer to the question: {fact.choice}"
        return _row(text, options, options[place])


def _phrase(kind: str, word: str) -> str:
    """The word with its article: "an apple", "milk"."""
    if kind in WITHOUT_ARTICLE:
        return word
    return f"an {word}" if word[0] in "aeiou" and word not in SOUNDS_LIKE_Y else f"a {word}"


def _row(text: str, options: list[str], answer: str) -> dict[str, str]:
    return {
        "instruction": f"{text}\n\nAnswer format: {'/'.join(options)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
