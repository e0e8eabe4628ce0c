"""Reading answers off generated texts."""

from __future__ import annotations

import pytest

from linchain_cli.evaluation.answers import AnswerRule, any_of
from linchain_cli.evaluation.tasks import SPECS


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, because it is not true", "false"),
        ("boolq", "I cannot say", None),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("ARC-Easy", "answer4 and not answer1", "answer4"),
        ("ARC-Easy", "the correct answer is answer5", "answer5"),
        ("winogrande", "Option1", None),
        ("hellaswag", "ending3", "ending3"),
        ("gsm8k", "He pays 3 * 4 = 12 dollars. The answer is 1,200.", "1200."),
        ("gsm8k", "It is -3.5 degrees", "-3.5"),
        ("gsm8k", "no number here", None),
        ("AQuA", "A train takes 5 hours. The answer is (C).", "C"),
        ("AQuA", "BAD CASE", None),
    ],
)
def test_extracts_as_the_protocol_says(task, text, expected):
    assert SPECS[task].rule.extract(text) == expected


def test_what_the_model_asks_itself_next_does_not_count():
    text = "The answer is 7.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\nThe answer is 4."
    assert (
        SPECS["gsm8k"].rule.extract(text) == "2"
    )  # what stands before the next response counts, its prompt too
    assert SPECS["boolq"].rule.extract("### Response: true") is None


def test_options_of_a_row_are_read_longest_first():
    rule = AnswerRule("options")
    assert rule.extract("it is answer10", ["answer1", "answer10"]) == "answer10"
    assert any_of(["a.b", "a"]) == r"a\.b|a"


def test_a_pattern_gives_its_first_group():
    assert AnswerRule("pattern", r"=\s*(\w+)").extract("x = seven, y = 8") == "seven"
    assert AnswerRule("pattern", r"[a-z]{5}").extract("on seven") == "seven"


def test_numbers_are_compared_as_numbers():
    rule = AnswerRule("number")
    assert rule.is_correct("1200.", "1200.0")
    assert rule.is_correct("0.3333", "0.33333333")
    assert not rule.is_correct("0.33", "0.33333333")
    assert not rule.is_correct(None, "1")
