"""What a comparison evaluates: every arm on its tasks, and the base."""

from __future__ import annotations

import json
import os
import signal

import pytest

from linchain_cli.comparison import runner
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.results import lines
from linchain_cli.comparison.runner import run_comparison
from linchain_cli.errors import InputError, Stopped
from linchain_cli.run import RunDirectory

from ..harness import write_task
from .conftest import WORDS, metrics


def test_named_tasks_are_evaluated_for_every_arm(recipe_path, tmp_path, commonsense_rows, loads, monkeypatch):
    task = tmp_path / "tasks" / "boolq" / "test.json"
    task.parent.mkdir(parents=True)
    task.write_text(
        json.dumps([row for row in commonsense_rows(60, seed=5) if row["answer"] in ("true", "false")])
    )
    words = [
        "adapter.depth=0,1",
        "training.max_steps=1",
        "evaluation.tasks=[boolq]",
        f"evaluation.data_dir={task.parents[1]}",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate_base", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="the same command continues") as stop:
            run_comparison(expand(recipe_path, [*words, "evaluation.limit=6"]), [1])
        assert stop.value.exit_code == 143 and (tmp_path / "tiny" / "results.json").is_file()
    results = run_comparison(expand(recipe_path, [*words, "evaluation.limit=6"]), [1])
    for run in results["runs"]:
        found = json.loads((tmp_path / "tiny" / run["directory"] / "eval" / "likelihood.json").read_bytes())
        assert run["accuracies"] == {"boolq": found["tasks"]["boolq"]["accuracy"]}
        assert found["tasks"]["boolq"]["n"] == 6
    assert all(row["accuracy"]["n"] == 1 for row in results["tables"]["recipe_rate"])
    assert "accuracy.boolq" in (tmp_path / "tiny" / "runs.csv").read_text()
    base = json.loads((tmp_path / "tiny" / "base" / "likelihood.json").read_bytes())
    assert base.get("adapter_sha256") is None and base["template"] == found["template"]
    for row, run in zip(results["accuracies"], results["runs"], strict=True):
        assert (row["task"], row["rows"], row["base"]) == ("boolq", 6, base["tasks"]["boolq"]["accuracy"])
        assert row["accuracy"]["mean"] == run["accuracy"]
        assert row["minus_base"]["mean"] == pytest.approx(run["accuracy"] - row["base"])
    lora, chain = results["accuracies"]
    assert lora["minus_reference"] is None
    assert chain["minus_reference"]["mean"] == pytest.approx(
        chain["accuracy"]["mean"] - lora["accuracy"]["mean"]
    )
    title = "Accuracy by task, each arm at its best learning rate (likelihood, first 6 rows of each task)"
    assert title in lines(results)
    # Other rows of the task: evaluated again, not trained again.
    before = metrics(RunDirectory(tmp_path / "tiny" / results["runs"][0]["directory"]))
    results = run_comparison(expand(recipe_path, [*words, "evaluation.limit=8"]), [1])
    eval_dir = tmp_path / "tiny" / results["runs"][0]["directory"] / "eval"
    found = json.loads((eval_dir / "likelihood-limit8.json").read_bytes())
    assert found["tasks"]["boolq"]["n"] == 8
    assert results["runs"][0]["accuracies"] == {"boolq": found["tasks"]["boolq"]["accuracy"]}
    assert [row["rows"] for row in results["accuracies"]] == [8, 8]
    assert json.loads((eval_dir / "likelihood.json").read_bytes())["tasks"]["boolq"]["n"] == 6
    assert metrics(RunDirectory(tmp_path / "tiny" / results["runs"][0]["directory"])) == before
    assert len(loads) == 3


def test_tasks_of_the_harness_are_evaluated_for_every_arm(recipe_path, tmp_path, harness_alone, loads):
    tasks = [f"lm_eval:{write_task(tmp_path / 'tasks')}", "everyday"]
    words = ["adapter.depth=0,1", "training.max_steps=1", f"evaluation.tasks=[{','.join(tasks)}]"]
    results = run_comparison(expand(recipe_path, [*words, "evaluation.limit=6"]), [1])
    for run in results["runs"]:
        found = json.loads((tmp_path / "tiny" / run["directory"] / "eval" / "lm_eval.json").read_bytes())
        own = found["tasks"]["linchain_test_places"]["accuracy"]
        assert run["accuracies"].keys() == {"everyday", "linchain_test_places"}
        assert run["accuracies"]["linchain_test_places"] == own
    rows = {(row["task"], row["arm"]): row for row in results["accuracies"]}
    assert len(rows) == 6  # two tasks and their average
    base = json.loads((tmp_path / "tiny" / "base" / "lm_eval.json").read_bytes())
    for run in results["runs"]:
        row = rows["linchain_test_places", run["arm"]]
        own = run["accuracies"]["linchain_test_places"]
        assert (row["rows"], row["accuracy"]["mean"]) == (6, own)
        assert row["base"] == base["tasks"]["linchain_test_places"]["accuracy"]
        assert row["minus_base"]["mean"] == pytest.approx(own - row["base"])
    assert any("(likelihood and lm_eval, first 6 rows" in line for line in lines(results))
    before = len(loads)
    run_comparison(expand(recipe_path, [*words, "evaluation.limit=6"]), [1])
    assert len(loads) == before  # all of it is there


def test_a_misspelt_task_is_told_before_anything_is_trained(recipe_path, tmp_path):
    with pytest.raises(InputError, match="unknown task 'boolk'"):
        run_comparison(expand(recipe_path, [*WORDS, "evaluation.tasks=[boolk]"]), [1])
    assert not (tmp_path / "tiny").exists()
