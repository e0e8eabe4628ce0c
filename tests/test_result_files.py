"""Result files: how they are read, and which of several is meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.result_files import (
    Evaluation,
    Found,
    describe,
    find_evaluations,
    first_of,
    read_evaluation,
    table,
)


def test_what_a_later_version_adds_is_kept(tmp_path):
    path = tmp_path / "likelihood.json"
    later = {"format_version": 2, "protocol": "likelihood", "machine": "m",
             "tasks": {"boolq": {"accuracy": 0.5, "calibration": 0.1}}}  # fmt: skip
    path.write_text(json.dumps(later))
    again = read_evaluation(path).to_json()
    assert again["machine"] == "m" and again["tasks"]["boolq"]["calibration"] == 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "no result of linchain eval, or a damaged one"),
        ("[]", "it has no tasks"),
        ('{"tasks": {"boolq": {"accuracy": "high"}}}', "tasks.boolq.accuracy"),
        ('{"format_version": 99, "tasks": {}}', "format version 99"),
    ],
)
def test_other_files_are_named(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="x.json") as error:
        read_evaluation(tmp_path / "x.json")
    assert reason in str(error.value)
    found, problems = find_evaluations(tmp_path)
    assert found == [] and reason in problems[0]


def make(name="likelihood", when="1", **fields):
    score = {"accuracy": 0.5, "measured_at": when}
    fields = {"format_version": 2, "protocol": "likelihood", "tasks": {"boolq": score}, **fields}
    return Found(Path(f"{name}.json"), Evaluation(**fields))


def test_of_several_the_first_of_this_adapter_and_limit_is_meant():
    found = [
        make("other-adapter", adapter_sha256="old"),
        make("later", when="3", adapter_sha256="new", dtype="float32"),
        make("meant", when="2", adapter_sha256="new"),
        make("limited", adapter_sha256="new", limit=5),
        make("generate", protocol="generate", adapter_sha256="new"),
        make("other-tasks", adapter_sha256="new", tasks={"piqa": {"accuracy": 1.0}}),
    ]
    one = first_of(found, "likelihood", limit=None, adapter_sha256="new", tasks=["boolq"])
    assert one is found[2]
    assert first_of(found, "likelihood", limit=7, adapter_sha256="new") is None


def test_the_table_tells_results_of_an_earlier_adapter():
    found = [make("before", adapter_sha256="old"), make("now", adapter_sha256="new")]
    assert [(line.path.stem, line.earlier) for line in table(found, "new")] == [
        ("now", False), ("before", True),
    ]  # fmt: skip
    assert not any(line.earlier for line in table(found)), "of a run without an adapter nobody knows"


def test_a_setting_in_a_line():
    one = Evaluation(
        protocol="generate", beams=1, template="custom", template_sha256="1a2b3c4d5e", dtype="bfloat16",
        quantization="nf4", limit=4000, tasks={},
    )  # fmt: skip
    assert describe(one) == (
        "generate (1 beam) · template custom 1a2b3c4d · bfloat16 · nf4 base · first 4,000 rows"
    )
    one = Evaluation(protocol="likelihood", normalise="bytes", template="chat", tasks={})
    assert describe(one) == "likelihood per byte · template chat"
