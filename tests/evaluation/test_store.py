"""Results that several processes and settings leave in one place."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.evaluation.results import fingerprint, predictions_path, read_results, summarise
from linchain_cli.evaluation.store import ResultStore
from linchain_cli.result_files import find_evaluations

from .test_results import SETTING, make_task, rows_of


def results_of(name, right=(True, False), **settings):
    setting = SETTING.model_copy(update=settings)
    task = make_task(name, len(right))
    digest = fingerprint(setting, task, "template")
    return setting, summarise([task], rows_of(task, right), setting, {name: digest}), {name: digest}


def add(directory, *args, **options):
    setting, results, _ = results_of(*args, **options)
    return ResultStore(directory, setting).add(results).path.name


def test_processes_that_finish_together_lose_nothing(tmp_path):
    """Eight processes add a task each to one file, and eight another setting."""
    context = multiprocessing.get_context("fork")
    jobs = [(f"task{number}", {"dtype": dtype}) for number in range(8) for dtype in ("float32", "bfloat16")]
    processes = [context.Process(target=add, args=(tmp_path, name), kwargs=options) for name, options in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 16
    found, problems = find_evaluations(tmp_path)
    assert problems == [] and len(found) == 2
    for one in found:
        assert sorted(one.evaluation.tasks) == [f"task{number}" for number in range(8)]
        assert len(read_results(one.path).predictions) == 16


def test_names_say_what_is_different(tmp_path):
    assert add(tmp_path, "boolq") == "likelihood.json"
    assert add(tmp_path, "boolq", dtype="bfloat16", limit=2) == "likelihood-bfloat16-limit2.json"
    assert add(tmp_path, "boolq", normalise="bytes") == "likelihood-per-byte.json"
    assert add(tmp_path, "boolq", adapter_sha256="other") == "likelihood-2.json"
    assert add(tmp_path, "boolq", adapter_sha256="another") == "likelihood-3.json"
    assert add(tmp_path, "boolq", right=(True, False, True)) == "likelihood-4.json"  # other rows
    assert add(tmp_path, "boolq") == "likelihood.json"


def test_what_is_no_result_is_left_alone(tmp_path):
    (tmp_path / "likelihood.json").write_text("{")
    (tmp_path / "likelihood-2.predictions.jsonl").write_text("somebody's")
    assert add(tmp_path, "boolq") == "likelihood-3.json"
    assert (tmp_path / "likelihood.json").read_text() == "{"


def test_measured_finds_the_tasks_of_a_fingerprint(tmp_path):
    add(tmp_path, "boolq")
    add(tmp_path, "piqa")
    setting, results, known = results_of("piqa")
    found = ResultStore(tmp_path, setting).measured(known)
    assert list(found.summary.tasks) == ["piqa"] and found.predictions == results.predictions
    assert found.summary.average == 0.5 and found.path.name == "likelihood.json"
    for other in (results_of("piqa", (True, True, True)), results_of("piqa", dtype="bfloat16")):
        assert ResultStore(tmp_path, other[0]).measured(other[2]) is None


def test_rows_that_were_written_without_their_summary_are_no_loss(tmp_path):
    """A process killed between the two files leaves rows that no summary counts yet."""
    add(tmp_path, "boolq")
    path = tmp_path / "likelihood.json"
    before = path.read_bytes()
    add(tmp_path, "piqa")
    path.write_bytes(before)
    assert len(read_results(path).predictions) == 2
    add(tmp_path, "piqa")
    assert len(predictions_path(path).read_text().splitlines()) == 4


def test_a_file_of_another_setting_is_refused_before_anything_is_measured(tmp_path):
    path = tmp_path / "mine.json"
    add(path, "boolq")
    assert add(path, "piqa") == "mine.json"
    with pytest.raises(InputError, match="holds another result"):
        ResultStore(path, SETTING.model_copy(update={"dtype": "bfloat16"}))


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    """A shell leaves the one in --out=~/results as it is, and `rm -r ~` is no way out of it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    assert add(Path("~/results"), "boolq") == "likelihood.json"
    assert add(Path("~/mine.json"), "boolq") == "mine.json"
    assert sorted(path.name for path in (tmp_path / "home").iterdir() if path.suffix != ".lock") == [
        "mine.json",
        "mine.predictions.jsonl",
        "results",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
