"""Tasks of the user's own, from YAML files."""

from __future__ import annotations

import json
import textwrap

import pytest

from linchain_cli.errors import InputError
from linchain_cli.evaluation.tasks import load_task


def task_file(folder, text, rows=({"q": "The sky?", "a": "blue"}, {"q": "Grass?", "a": "green"})):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(textwrap.dedent(text))
    return str(folder / "colours.yaml")


def test_options_and_columns(tmp_path):
    task = load_task(
        task_file(
            tmp_path, "path: rows.jsonl\ncolumns: {instruction: q, answer: a}\noptions: [red, green, blue]\n"
        )
    )
    assert task.name == "colours" and task.rule.kind == "options" and task.template is None
    assert [row.fields for row in task.rows] == [
        {"instruction": "The sky?", "input": ""},
        {"instruction": "Grass?", "input": ""},
    ]
    assert task.rows[1].options == ("red", "green", "blue") and task.rows[1].answer == "green"
    assert len(load_task(str(tmp_path / "colours.yaml"), limit=1).rows) == 1


def test_each_row_may_bring_its_options(tmp_path):
    rows = [{"instruction": "Q", "choices": ["a dog", "a cat"], "answer": "a cat"}]
    task = load_task(task_file(tmp_path, "path: rows.jsonl\ncolumns: {options: choices}\nprefix: ''\n", rows))
    assert task.rows[0].options == ("a dog", "a cat") and task.prefix == ""
    with pytest.raises(InputError, match="row 1: 'options' is not a list of texts"):
        load_task(
            task_file(tmp_path, "path: rows.jsonl\n", [{"instruction": "Q", "options": "x", "answer": "x"}])
        )


def test_a_prompt_of_its_own_names_its_columns(tmp_path):
    text = """\
        name: by-hand
        path: rows.jsonl
        columns: {answer: a}
        template: {prompt: "Q: {q}\\nA: ", response: "{a}"}
        answer: pattern
        answer_pattern: "[a-z]+"
        max_new_tokens: 5
        """
    task = load_task(task_file(tmp_path, text))
    assert task.name == "by-hand" and task.rows[0].fields == {"q": "The sky?"} and task.max_new_tokens == 5
    assert task.rule.extract("It is blue") == "t" and task.template["prompt"] == "Q: {q}\nA: "
    with pytest.raises(InputError, match="row 2: 'q' is missing"):
        load_task(task_file(tmp_path, text, [{"q": "x", "a": "y"}, {"a": "y"}]))


def test_all_problems_of_a_file_are_told_with_their_lines(tmp_path):
    path = task_file(tmp_path, "pth: rows.jsonl\noptions: [red]\nanswer: numbr\n")
    with pytest.raises(InputError) as error:
        load_task(path)
    lines = str(error.value).splitlines()
    assert lines == [
        f"{path}:1: pth: unknown key. Did you mean 'path'?",
        f"{path}:2: options: expected a list of two or more texts, got ['red'].",
        f"{path}:3: answer: expected one of options, pattern, number, letter, got 'numbr'."
        " Did you mean 'number'?",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path: rows.jsonl\nanswer: number\noptions: [a, b]\n", "read as a number"),
        ("path: rows.jsonl\nanswer: pattern\n", "an answer_pattern is missing"),
        ("path: rows.jsonl\nanswer: pattern\nanswer_pattern: '('\n", "not a regular expression"),
        ("path: nowhere.jsonl\n", "no file nowhere.jsonl"),
        ("path: [\n", "not YAML"),
        ("- path\n", "expected a mapping"),
        ("path: rows.jsonl\n", "row 1: 'instruction' is missing"),
        ("path: rows.jsonl\ncolumns: {instruction: q, answer: a}\n", "two or more different options"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, text, reason):
    with pytest.raises(InputError) as error:
        load_task(task_file(tmp_path, text))
    assert reason in str(error.value)


def test_a_missing_task_file(tmp_path):
    with pytest.raises(InputError, match="there is no task file"):
        load_task(str(tmp_path / "none.yaml"))


def test_a_torn_row_names_its_line(tmp_path):
    path = task_file(
        tmp_path, "path: rows.jsonl\ncolumns: {instruction: q, answer: a}\noptions: [red, blue]\n"
    )
    with open(tmp_path / "rows.jsonl", "a") as handle:
        handle.write('{"q": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        load_task(path)
