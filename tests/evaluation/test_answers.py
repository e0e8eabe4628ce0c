"""Answers are read off real kinds of sentences."""

from __future__ import annotations

import pytest

from linchain_cli.evaluation.answers import AnswerRule, within_turn
from linchain_cli.evaluation.numbers import is_number, stated_number, value_of

YES_NO = ("yes", "no")
CHOICES = ("answer1", "answer2", "answer10")


def read(rule, text, options=(), answer=""):
    return {name: one.prediction for name, one in rule.readings(text, options, answer).items()}


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("I do not know, but yes.", YES_NO, "yes"),  # no "no" in "not" or "know"
        ("Yes, it is.", YES_NO, "yes"),
        ("NO!", YES_NO, "no"),
        ("neither", YES_NO, None),
        ("the correct answer is answer2, not answer1", CHOICES, "answer2"),
        ("the correct answer is answer10", CHOICES, "answer10"),
        ("ANSWER3 it is", CHOICES, None),
        ("C++ is", ("C", "C++"), "C++"),
        ("us, and the US", ("US", "us"), "us"),
        ("İyi olur", ("kötü", "iyi"), "iyi"),
        ("ISI", ("ısı", "ses"), "ısı"),
        ("", YES_NO, None),
    ],
)
def test_options_are_words_whatever_their_case(text, options, expected):
    assert read(AnswerRule("options"), text, options) == {"words": expected}


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("true\n### Response:\nfalse", "### Instruction:\nTrue?\n\n### Response:\n", "true\n"),
        (
            "6 * 7 = 42\n#### 42\nThat took 3 steps",
            "### Response:\n",
            "6 * 7 = 42\n#### 42\nThat took 3 steps",
        ),
        # As chat models write: nothing says that a new turn begins.
        (
            "### Step 1\n6 * 7\n### Answer\n42",
            "<|user|>6 * 7?<|assistant|>",
            "### Step 1\n6 * 7\n### Answer\n42",
        ),
    ],
)
def test_a_new_turn_begins_with_a_heading_where_prompts_have_them(text, prompt, expected):
    assert within_turn(text, prompt) == expected


def test_the_published_reading_of_a_builtin_task_stands_beside():
    rule = AnswerRule("options", "true|false")
    assert read(rule, "True or untrue", ("true", "false")) == {"words": "true", "published": "true"}
    assert read(rule, "False", ("true", "false")) == {"words": "false", "published": None}
    right = rule.readings("it is untrue: false", ("true", "false"), "false")
    assert right["words"].correct and not right["published"].correct


def test_a_pattern_gives_its_first_group():
    rule = AnswerRule("pattern", r"colou?r: (\w+)")
    assert read(rule, "My color: red, no, colour: blue") == {"pattern": "red"}
    assert rule.readings("none", (), "red")["pattern"].prediction is None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("The answer is 5. Eleven more would be 16", "16", "5"),
        ("She sold 1,250 in 3 days.", "3", "3"),
        ("6 * 7 = 42\n#### 42\nThat took 3 steps", "3", "42"),
        ("the result is -7", "-7", "-7"),
        ("10-5", "-5", "5"),
        ("no number", None, None),
    ],
)
def test_numbers_strictly_and_flexibly(text, strict, flexible):
    assert read(AnswerRule("number"), text, answer="0") == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 1,250.", 1250), ("1'000'000 people", 1e6), ("12,345,678.9", 12345678.9),
        ("1\u202f000 km", 1000), ("3,5 km", 3.5), ("1, 2 and 3", 3), ("1,2,3", 3), (".5", 0.5), ("4.", 4),
        ("it is -7", -7), ("= −7", -7), ("pages 5-6", 6), ("(-4)", -4), ("-$5", -5), ("$1,234.50", 1234.5),
        ("so 3/4 of it", 0.75), ("1 1/2 cups", 1.5), ("-1 1/2", -1.5), ("\\boxed{\\frac{3}{4}}", 0.75),
        ("-3.5e-2", -0.035), ("Answer = 1e5", 1e5), ("2 × 10^3", 2000), ("5 \\times 10^{-1}", 0.5),
        ("It is 50%", 50), ("The correct answer is \\$18", 18), ("The final answer is: **16**", 16),
        ("The answer to the question is 42 because 6 * 7", 42), ("x is 7\nAnswer: it depends", 7),
    ],
)  # fmt: skip
def test_numbers_as_people_write_them(text, value):
    assert value_of(stated_number(text)) == pytest.approx(value)


def test_a_number_is_right_within_its_tolerance():
    assert is_number("3.1409", "3.14") and not is_number("3.142", "3.14")
    assert is_number("50%", "50") and is_number("50 %", "0.5") and not is_number("50", "0.5")
    assert not is_number("1/0", "1") and not is_number(None, "1")
    assert AnswerRule("number").readings("18", (), "18.0")["strict"].correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B because A and C are wrong", "B"),
        ("A train goes ... so the option is D", "D"),
        ("Answer: (C)", "C"),
        ("the correct answer is \\boxed{A}, not B", "A"),
        ("the answer is **D**", "D"),
        ("A train. I pick E", "E"),
        ("Answer: A. B is too small", "A"),
        ("ANSWER: C\n\nOption D is too large", "C"),
        ("The answer is B, while option C is wrong", "B"),
        ("**Option B**, because a cell in A divides", "B"),
        ("F or G", None),
    ],
)
def test_the_stated_letter_comes_before_the_last(text, expected):
    assert read(AnswerRule("letter"), text) == {"letter": expected}
