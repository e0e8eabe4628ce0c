"""run.json: what is read of it, and what other programs leave there."""

from __future__ import annotations

import json

import pytest

from linchain_cli.errors import InputError
from linchain_cli.run import KeptAdapter, RunBase, RunDirectory, RunStatus, Timings

TRAINED = {
    "name": "quickstart",
    "status": "finished",
    "created_at": "2026-05-01T10:00:00.000+00:00",
    "reason": None,
    "started_at": "2026-05-01T10:00:00.100+00:00",
    "resumed_from": None,
    "timings": {"prepare_seconds": 1.5, "train_seconds": 60.25},
    "versions": {"linchain": "0.1.0", "python": "3.11.9", "torch": "2.9.0"},
    "hashes": {"recipe": "1" * 64, "data": "2" * 64, "base": "3" * 64},
    "base": {
        "path": "models/tiny",
        "source": "/here/models/tiny",
        "directory": "/here/models/tiny",
        "dtype": "bfloat16",
    },
    "seed": 42,
    "split_seed": 42,
    "machine": {"device": "cpu", "processor": "a CPU", "threads": 2, "processes": 1, "sharded": False},
    "total_steps": 60,
    "micro_batch_size": 4,
    "trainable_parameters": 1000,
    "adapted_modules": 30,
    "rows": {"total": 10, "kept": 9, "skipped": 1, "truncated": 0, "sources": [{"name": "a"}]},
    "plan": None,
    "finished_at": "2026-05-01T10:01:00.000+00:00",
    "step": 60,
    "tokens": 5000,
    "supervised_tokens": 700,
    "tokens_per_second": 83,
    "validation_loss": 0.5,
    "adapter": {"step": 40, "kept": "best"},
}
IMPORTED = {
    "name": "theirs",
    "status": "finished",
    "created_at": "2026-05-02T10:00:00.000+00:00",
    "finished_at": "2026-05-02T10:00:00.001+00:00",
    "imported": {"from": "there", "padded": [], "rescaled": [], "biases_dropped": []},
}


def run_of(tmp_path, content) -> RunDirectory:
    (tmp_path / "run.json").write_text(json.dumps(content))
    return RunDirectory(tmp_path)


def test_a_run_is_read(tmp_path):
    status = run_of(tmp_path, TRAINED).read_status()
    assert status.finished and status.created_at == TRAINED["created_at"] and status.tokens_per_second == 83
    assert status.base == RunBase(**TRAINED["base"]) and status.machine.threads == 2
    assert status.timings == Timings(prepare_seconds=1.5, train_seconds=60.25)
    assert status.adapter == KeptAdapter(step=40, kept="best")
    assert status.own_peak_memory and status.comparison is None


def test_an_update_keeps_what_it_does_not_know_and_writes_the_present_version(tmp_path):
    run = run_of(tmp_path, {**IMPORTED, "colour": "green"})
    run.update_status(step=3, base=RunBase(path="org/tiny"))
    content = json.loads(run.status_path.read_bytes())
    assert (content["format"], content["format_version"]) == ("linchain run", RunStatus.VERSION)
    assert content["colour"] == "green" and content["finished_at"] == IMPORTED["finished_at"]
    assert run.read_status().base == RunBase(path="org/tiny") and run.read_status().step == 3


def test_a_name_that_is_no_utf8_has_a_question_mark(tmp_path):
    run = run_of(tmp_path, TRAINED)
    run.update_status(rows={"bad_examples": ["caf\udce9.jsonl:4"]})
    assert run.read_status().rows == {"bad_examples": ["caf?.jsonl:4"]}


def test_what_the_format_does_not_know_is_not_written(tmp_path):
    run = run_of(tmp_path, TRAINED)
    with pytest.raises(TypeError, match="RunStatus has no field colour"):
        run.update_status(colour="green")
    with pytest.raises(TypeError, match="step"):
        run.update_status(step="three")
    assert json.loads(run.status_path.read_bytes()) == TRAINED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format version 3, this linchain reads up to 2: install the version"),
        ({"format": "linchain comparison"}, "no 'linchain run' file"),
        ({"format_version": "two"}, "no 'linchain run' file"),
        ({"status": "done"}, "damaged: status: input should be 'running'"),
        ({"machine": {"threads": "2"}}, "damaged: machine.threads: input should be a valid integer"),
        ({"base": "models/tiny"}, "damaged: "),
        ({"base": {"path": 1, "directory": None}}, "damaged: "),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as error:
        run_of(tmp_path, {**TRAINED, **change}).read_status()
    assert str(tmp_path / "run.json") in str(error.value)


def test_the_base_of_another_recipe_is_not_the_runs():
    base = RunBase(path="models/tiny", source="/there/models/tiny", directory="/there/models/tiny")
    status = RunStatus(status="finished", base=base)
    assert status.base_of("models/tiny", None) is base
    assert status.base_of("models/other", None) == RunBase(path="models/other")
    assert RunStatus(status="finished").base_of("org/tiny", "main") == RunBase(
        path="org/tiny", revision="main"
    )
