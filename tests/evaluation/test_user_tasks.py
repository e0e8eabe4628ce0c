"""Tasks of the user's own, from YAML files."""

from __future__ import annotations

import datetime
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


@pytest.mark.parametrize("path", ["rows.jsonl", "more/*.jsonl", "more"])
def test_rows_lie_beside_the_file_whatever_they_are(tmp_path, path):
    (folder := tmp_path / "tasks").mkdir()
    task_file(folder, "")
    (folder / "more").mkdir()
    (folder / "more" / "some.jsonl").write_text(json.dumps({"q": "Snow?", "a": "white"}) + "\n")
    columns = "columns: {instruction: q, answer: a}\noptions: [blue, green, white]\n"
    task = load_task(task_file(folder, f"path: {path}\nsplit: train\n{columns}"))
    assert task.rows[0].answer == ("blue" if path == "rows.jsonl" else "white")


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
    assert (
        task.rule.readings("It is blue", (), "")["pattern"].prediction == "t"
        and task.template["prompt"] == "Q: {q}\nA: "
    )
    with pytest.raises(InputError, match="row 2: 'q' is missing"):
        load_task(task_file(tmp_path, text, [{"q": "x", "a": "y"}, {"a": "y"}]))


def test_all_problems_of_a_file_are_told_with_their_lines(tmp_path):
    path = task_file(tmp_path, "pth: rows.jsonl\noptions: [red]\nanswer: numbr\n")
    with pytest.raises(InputError) as error:
        load_task(path)
    lines = str(error.value).splitlines()
    assert lines == [
        f"{path} has 3 problems:",
        f"  {path}:1: pth: unknown key. Did you mean 'path'?",
        f"  {path}:2: options: expected a list of two or more texts, got ['red'].",
        f"  {path}:3: answer: expected one of options, pattern, number, letter, loss, got 'numbr'."
        " Did you mean 'number'?",
    ]


def test_an_alias_is_one_problem(tmp_path):
    with pytest.raises(InputError) as error:
        load_task(task_file(tmp_path, "path: rows.jsonl\noptions: *colours\n"))
    (line,) = str(error.value).splitlines()
    assert ":2: options: aliases such as *colours are not allowed" in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path: rows.jsonl\nanswer: number\noptions: [a, b]\n", "read as a number"),
        ("path: rows.jsonl\nanswer: pattern\n", "an answer_pattern is missing"),
        ("path: rows.jsonl\nanswer: pattern\nanswer_pattern: '('\n", "not a regular expression"),
        ("path: nowhere.jsonl\n", "there is no file {}/nowhere.jsonl"),
        ("path: [\n", "not YAML"),
        ("- path\n", "a task is a mapping that begins like `path: rows.jsonl`"),
        ("", "the file is empty. docs/evaluation.md says"),
        ("path: rows.jsonl\n", "row 1: 'instruction' is missing"),
        ("path: rows.jsonl\ncolumns: {instruction: q, answer: a}\n", "two or more different options"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, text, reason):
    with pytest.raises(InputError) as error:
        load_task(task_file(tmp_path, text))
    assert reason.format(tmp_path) in str(error.value)


def test_a_missing_task_file(tmp_path):
    task_file(tmp_path, "")
    with pytest.raises(InputError, match="clors.yaml: no such file. Did you mean '.*/colours.yaml'"):
        load_task(str(tmp_path / "clors.yaml"))


def test_a_torn_row_names_its_line(tmp_path):
    path = task_file(
        tmp_path, "path: rows.jsonl\ncolumns: {instruction: q, answer: a}\noptions: [red, blue]\n"
    )
    with open(tmp_path / "rows.jsonl", "a") as handle:
        handle.write('{"q": \n')
    with pytest.raises(InputError, match=r"rows\.jsonl"):
        load_task(path)


ASK = {"instruction": "Q", "options": ["a dog", "a cat", "a cow"]}


@pytest.mark.parametrize(
    ("names", "answer", "expected"),
    [
        ("option", "a cat", "a cat"),
        ("index", 1, "a cat"),
        ("index", "0", "a dog"),
        ("position", 3, "a cow"),
        ("position", 1.0, "a dog"),
        ("letter", "b", "a cat"),
    ],
)
def test_an_answer_may_name_its_option(tmp_path, names, answer, expected):
    text = f"path: rows.jsonl\nanswer_names: {names}\n"
    task = load_task(task_file(tmp_path, text, [{**ASK, "answer": answer}]))
    assert task.rows[0].answer == expected and task.free_text


@pytest.mark.parametrize(
    ("names", "answer", "reason"),
    [
        ("option", 1, r"its answer '1' is none of its options .* \(say `answer_names: index` or `position`"),
        ("index", 3, "its answer '3' is no index of its 3 options"),
        ("position", 0, "its answer '0' is no position"),
        ("letter", "D", "its answer 'D' is no letter"),
        ("option", True, "its answer is true, but of its options a dog/a cat/a cow none says so"),
    ],
)
def test_an_answer_that_names_none_is_told(tmp_path, names, answer, reason):
    text = f"path: rows.jsonl\nanswer_names: {names}\n"
    with pytest.raises(InputError, match=reason):
        load_task(task_file(tmp_path, text, [{**ASK, "answer": answer}]))


def test_a_boolean_is_the_option_that_says_so(tmp_path):
    rows = [{"instruction": "Q", "answer": True}, {"instruction": "Q", "answer": False}]
    for yes, no in (("Yes", "No"), ("true", "false")):
        task = load_task(task_file(tmp_path, f"path: rows.jsonl\noptions: ['{no}', '{yes}']\n", rows))
        assert [row.answer for row in task.rows] == [yes, no] and not task.free_text


def test_columns_within_columns_and_side_by_side(tmp_path):
    rows = [
        {"q": {"stem": "Q"}, "choices": {"text": ["one", "two"]}, "key": 1, "sol1": "three", "sol2": "four"}
    ]
    head = "path: rows.jsonl\nanswer_names: index\ncolumns: {instruction: q.stem, answer: key, options: "
    assert load_task(task_file(tmp_path, head + "choices.text}\n", rows)).rows[0].answer == "two"
    row = load_task(task_file(tmp_path, head + "[sol1, sol2]}\n", rows)).rows[0]
    assert row.options == ("three", "four") and row.fields == {"instruction": "Q", "input": ""}
    with pytest.raises(InputError, match="row 1: 'options' is not a list of texts"):
        load_task(task_file(tmp_path, head + "[sol1, sol3]}\n", rows))


def test_conversations_are_rows(tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"messages": turns[:1], "answer": "no"}]
    task = load_task(task_file(tmp_path, "path: rows.jsonl\noptions: ['yes', 'no']\nprefix: ''\n", rows))
    assert [row.answer for row in task.rows] == ["yes", "no"]
    assert all(row.fields == {"messages": turns[:1]} for row in task.rows)
    for messages, reason in (
        ([], "not a list of turns"),
        (turns[1:], "asks nothing"),
        ("x", "neither a list"),
    ):
        with pytest.raises(InputError, match=reason):
            load_task(
                task_file(tmp_path, "path: rows.jsonl\noptions: ['yes', 'no']\n", [{"messages": messages}])
            )


def test_conversations_are_read_as_in_training(tmp_path):
    asked, said = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "yes"}
    in_parts = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    share_gpt = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "yes"}]
    tool = {"type": "function", "function": {"name": "greet"}}
    options = {"enable_thinking": False}
    rows = [
        {"messages": [in_parts, said]},
        {"messages": json.dumps([asked, said])},
        {"conversations": share_gpt, "system": "Be brief."},
        {"messages": [asked, said], "tools": [{"name": "greet"}], "chat_template_kwargs": options},
    ]
    task = load_task(task_file(tmp_path, "path: rows.jsonl\noptions: ['yes', 'no']\n", rows))
    assert [row.fields for row in task.rows] == [
        {"messages": [asked]},
        {"messages": [asked]},
        {"messages": [{"role": "system", "content": "Be brief."}, asked]},
        {"messages": [asked], "tools": [tool], "options": options},
    ]
    assert all(row.answer == "yes" for row in task.rows)
    with pytest.raises(InputError, match="row 1: turn 1 of 'messages' has the role 'usr'"):
        load_task(
            task_file(
                tmp_path,
                "path: rows.jsonl\noptions: ['yes', 'no']\n",
                [{"messages": [{**asked, "role": "usr"}, said]}],
            )
        )


def test_rows_with_dates_have_a_fingerprint(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"instruction": ["Q"], "output": ["A"], "when": [datetime.date(2024, 1, 2)], "none": [None]}
    path = task_file(tmp_path, "path: rows.parquet\nanswer: loss\n")
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    task = load_task(path)
    assert task.rows[0].fields.keys() == {"instruction", "output", "when"} and task.fingerprint


def test_examples_come_from_rows_of_their_own(tmp_path):
    shown = [{"q": f"Example {number}", "a": "red"} for number in range(4)]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
    head = "path: rows.jsonl\ncolumns: {instruction: q, answer: a}\noptions: [red, green, blue]\n"
    task = load_task(task_file(tmp_path, head + "examples: 2\nexamples_path: shown.jsonl\n"), limit=1)
    assert [row.fields["instruction"] for row in task.examples] == ["Example 0", "Example 1"]
    assert len(task.rows) == 1
    for lines, reason in {
        "examples: 2\n": "examples need both their number and rows",
        "examples: 9\nexamples_path: shown.jsonl\n": "has 4 rows, not 9",
    }.items():
        with pytest.raises(InputError, match=reason):
            load_task(task_file(tmp_path, head + lines))
    lost = "path: rows.jsonl\nanswer: loss\nexamples: 2\nexamples_path: shown.jsonl\n"
    with pytest.raises(InputError, match="no examples go before them"):
        load_task(task_file(tmp_path, lost))


def test_losses_need_no_answers(tmp_path):
    rows = [{"instruction": "Q", "output": "a text"}]
    task = load_task(task_file(tmp_path, 'path: rows.jsonl\nanswer: loss\nstop: ["\\n\\n"]\n', rows))
    assert task.rule.kind == "loss" and task.rows[0].fields == rows[0] and task.stop == ("\n\n",)
