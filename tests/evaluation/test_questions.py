"""What can be wrong with a task's rows, told before anything is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from linchain_cli.data.encoding import encode_prompt, encode_responses
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.questions import check_questions
from linchain_cli.evaluation.task import Task, read_row
from linchain_cli.model.limits import Limits
from linchain_cli.model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


@pytest.fixture(scope="module")
def check(tokenizer):
    """check(tasks, protocol, **limits)"""
    template = get_template("alpaca", tokenizer)

    def run(tasks, protocol="likelihood", **limits):
        return check_questions(
            tokenizer, template, tasks, protocol, Limits(**{"embeddings": len(tokenizer), **limits})
        )

    return run


@pytest.fixture(scope="module")
def task(commonsense_rows):
    rule = AnswerRule("options")
    rows = tuple(read_row(row, index, rule, "rows.json") for index, row in enumerate(commonsense_rows(9)))
    return Task("mixed", rows, "rows.json", rule, max_new_tokens=30)


def longest(tokenizer, task) -> tuple[int, int]:
    """Tokens of the longest row: with an option behind it, and without."""
    template, options, prompts = get_template("alpaca", tokenizer), [], []
    for row in task.rows:
        prompt, answers = encode_responses(
            tokenizer, template, row.fields, [task.prefix + option for option in row.options]
        )
        options += [len(prompt) + len(answer) for answer in answers]
        prompts.append(len(encode_prompt(tokenizer, template, row.fields)))
    return max(options), max(prompts)


def test_the_length_counts_what_the_model_reads(check, task, tokenizer):
    assert check([task]) == [] == check([task], "generate")
    with_option, prompt = longest(tokenizer, task)
    for protocol, most in (("likelihood", with_option), ("generate", prompt + 30)):
        assert check([task], protocol, positions=most + 1, table=True) == []
        (warning,) = check([task], protocol, positions=most - 2)
        assert "mixed: the longest row with its answer has" in warning
        with pytest.raises(InputError, match=f"has {most - 2} positions: leave mixed out"):
            check([task], protocol, positions=most - 2, table=True)


def test_tokens_without_an_embedding_are_named_with_their_row(check, task, tokenizer):
    with pytest.raises(InputError, match=r"rows.json, row 1: the token .* embeddings end at 299"):
        check([task], embeddings=300)


def test_all_tasks_are_looked_at_before_the_first_is_asked(check, task):
    rule = AnswerRule("number")
    row = read_row({"instruction": "1 + 1?", "answer": "2"}, 0, rule, "sums")
    with pytest.raises(InputError, match="sums has no options"):
        check([task, Task("sums", (row,), "sums", rule, 4)])


def test_rows_that_the_examples_answer_are_counted(check, task):
    assert check([replace(task, rows=task.rows[2:], examples=task.rows[:2])]) == []
    (warning,) = check([replace(task, examples=task.rows[:2])])
    assert warning == "mixed: 2 of its rows stand with their answers among its examples"
