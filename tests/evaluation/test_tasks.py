"""Finding and checking rows: local files first, then the hub; wrong input says where and what to do."""

from __future__ import annotations

import codecs
import json
import re

import pytest

from linchain_cli.data import hub
from linchain_cli.errors import InputError
from linchain_cli.evaluation.raw import RAW_SOURCES
from linchain_cli.evaluation.tasks import GROUPS, SPECS, expand_tasks, load_task, load_tasks, task_names


@pytest.fixture
def data_dir(tmp_path, commonsense_rows):
    """DIR/<task>/test.json for three tasks, from the shared rows."""
    rows = commonsense_rows(30)
    for task, style in {"boolq": "true/", "piqa": "solution1/", "ARC-Easy": "answer1/"}.items():
        folder = tmp_path / task
        folder.mkdir()
        own = [row for row in rows if f"Answer format: {style}" in row["instruction"]]
        (folder / "test.json").write_text(json.dumps(own))
    return tmp_path


def write(folder, task, rows):
    (folder / task).mkdir(exist_ok=True)
    (folder / task / "test.json").write_text(json.dumps(rows))


def test_rows_come_from_local_files(data_dir):
    task = load_task("boolq", data_dir)
    assert len(task.rows) == 10 and task.rows[3].index == 3
    assert task.rows[0].options == ("true", "false")
    assert task.source == str(data_dir / "boolq" / "test.json")
    assert load_task("boolq", data_dir, limit=4).rows == task.rows[:4]


def test_the_variable_names_the_directory_too(data_dir, monkeypatch):
    monkeypatch.setenv("LINCHAIN_DATA_DIR", str(data_dir))
    assert len(load_task("piqa").rows) == 10


def test_each_row_has_the_options_it_names_itself(data_dir):
    task = load_task("ARC-Easy", data_dir)
    assert {len(row.options) for row in task.rows} == {3, 4, 5}
    assert all(row.answer in row.options for row in task.rows)


def test_majority_is_the_most_frequent_answer(tmp_path):
    rows = [
        {"instruction": "Q\n\nAnswer format: true/false", "answer": answer}
        for answer in ["true"] * 3 + ["false"]
    ]
    write(tmp_path, "boolq", rows)
    assert load_task("boolq", tmp_path).majority == 0.75
    write(tmp_path, "gsm8k", [{"instruction": "1 + 1?", "answer": 2}])
    assert load_task("gsm8k", tmp_path).majority is None


def test_fingerprint_follows_the_rows(data_dir):
    first = load_task("boolq", data_dir)
    assert load_task("boolq", data_dir).fingerprint == first.fingerprint
    assert load_task("boolq", data_dir, limit=9).fingerprint != first.fingerprint


@pytest.mark.parametrize("answer", [[14.0], ["14"], "14.0", 14, 14.0])
def test_numbers_as_the_files_hold_them(tmp_path, answer):
    write(
        tmp_path, "MultiArith", [{"instruction": " How many? ", "input": "", "output": "", "answer": answer}]
    )
    row = load_task("MultiArith", tmp_path).rows[0]
    assert float(row.answer) == 14 and row.options == ()


def test_groups_and_names():
    assert expand_tasks(["commonsense"])[:2] == ["boolq", "piqa"] and len(expand_tasks(["commonsense"])) == 8
    assert len(expand_tasks(["arithmetic"])) == 7
    assert expand_tasks(["piqa, boolq,piqa"]) == ["piqa", "boolq"]
    assert set(task_names()) == {*SPECS, *GROUPS}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bolq"], "unknown task 'bolq'. Did you mean 'boolq'?"),
        (["arc-easy"], "Did you mean 'ARC-Easy'?"),
        ([" ,"], "no task"),
    ],
)
def test_unknown_tasks_list_the_nearest(names, expected):
    with pytest.raises(InputError) as error:
        expand_tasks(names)
    assert expected in str(error.value)


BAD_ROWS = [
    ("text", "the row is a text, not an object"),
    ({"answer": "true"}, "'instruction' is missing"),
    ({"instruction": 3, "answer": "true"}, "'instruction' is missing or is not text"),
    ({"instruction": "Q\n\nAnswer format: true/false"}, "'answer' is missing"),
    (
        {"instruction": "Q\n\nAnswer format: one/two", "answer": True},
        "its answer is true, but of its options one/two",
    ),
    (
        {"instruction": "Q\n\nAnswer format: true/false", "answer": "maybe"},
        "'maybe' is none of its options true/false",
    ),
    ({"instruction": "Q?", "answer": "true"}, "two or more different options"),
    ({"instruction": "Q\n\nAnswer format: true/true", "answer": "true"}, "two or more different options"),
    ({"instruction": "Q", "input": 3, "answer": "true"}, "'input' is missing or is not text"),
    ({"instruction": "Q \ud83d", "answer": "true"}, "'instruction' holds half a character"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, reason):
    write(tmp_path, "boolq", [{"instruction": "Q\n\nAnswer format: true/false", "answer": "true"}, row])
    with pytest.raises(InputError) as error:
        load_task("boolq", tmp_path)
    assert re.search(r"test\.json(, |:1 \()row 2\b", str(error.value)) and reason in str(error.value)


def test_rows_are_read_as_far_as_they_are_asked(tmp_path):
    row = {"instruction": "Q\n\nAnswer format: true/false", "answer": "true"}
    write(tmp_path, "boolq", [row, row, "text"])
    path = tmp_path / "boolq" / "test.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert len(load_task("boolq", tmp_path, limit=2).rows) == 2


def test_an_answer_that_is_no_number_is_named(tmp_path):
    write(tmp_path, "gsm8k", [{"instruction": "1 + 1?", "answer": "two"}])
    with pytest.raises(InputError, match="row 1: its answer 'two' is not a number"):
        load_task("gsm8k", tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[]"])
def test_a_file_that_holds_no_rows_is_named(tmp_path, content):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(content)
    with pytest.raises(InputError) as error:
        load_task("boolq", tmp_path)
    assert str(tmp_path / "boolq" / "test.json") in str(error.value)


def test_a_missing_file_says_what_was_tried_and_how_to_get_it(tmp_path):
    with pytest.raises(InputError) as error:
        load_task("mawps", tmp_path)
    message = str(error.value)
    assert str(tmp_path / "mawps" / "test.json") in message
    assert "dataset/mawps/test.json of github.com/AGI-Edgerunners/LLM-Adapters" in message


def test_a_hub_that_cannot_be_reached_says_so(tmp_path, monkeypatch):
    def unreachable(name, split, revision):
        raise InputError(f"The data set '{name}' is not on this machine")

    monkeypatch.setattr(hub, "load_hub_dataset", unreachable)
    with pytest.raises(InputError) as error:
        load_task("ARC-Easy", tmp_path)
    assert "allenai/ai2_arc/ARC-Easy' is not on this machine" in str(error.value)
    assert str(tmp_path / "ARC-Easy" / "test.json") in str(error.value)


def test_a_directory_that_is_not_there_is_not_passed_over(tmp_path):
    with pytest.raises(InputError, match="there is no such directory"):
        load_task("boolq", tmp_path / "nowhere")


def test_without_local_files_rows_are_built_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def load(name, split, revision):
        asked.append((name, split, revision))
        return [
            {"goal": "dry a plate", "sol1": "wipe it", "sol2": "wet it", "label": label} for label in (0, 1)
        ]

    monkeypatch.setattr(hub, "load_hub_dataset", load)
    task = load_task("piqa", tmp_path)
    assert asked == [("ybisk/piqa", "validation", RAW_SOURCES["piqa"].revision)]
    assert [row.answer for row in task.rows] == ["solution1", "solution2"]
    assert task.source == "ybisk/piqa (validation)"

    monkeypatch.setattr(hub, "load_hub_dataset", lambda *_: [{"goal": "dry a plate", "sol1": "wipe it"}])
    with pytest.raises(InputError, match="row 1 cannot be used: it has no field 'sol2'"):
        load_task("piqa", tmp_path)


def test_everyday_needs_no_files():
    task = load_task("everyday", limit=20)
    assert len(task.rows) == 20 and all(row.answer in row.options for row in task.rows)
    assert len({row.options for row in task.rows}) > 1


def test_two_tasks_of_one_name_are_refused(data_dir, tmp_path):
    (tmp_path / "boolq.yaml").write_text("path: boolq/test.json\n")
    with pytest.raises(InputError, match="two tasks are named 'boolq'"):
        load_tasks(["boolq", str(tmp_path / "boolq.yaml")], data_dir)
