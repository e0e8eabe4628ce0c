"""`linchain runs`: one line for each run and comparison, whatever state it is in."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory, jsonl_bytes, locked

from ..command_line import linchain


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(path: Path, depth: int = 3, age: timedelta = timedelta(), **status) -> RunDirectory:
    run = RunDirectory(path)
    recipe = Recipe.model_validate(
        {
            "name": path.name,
            "output_dir": str(path.parent),
            "model": {"path": "/models/small-model"},
            "adapter": {"rank": 8, "depth": depth},
            "data": {"train": ["a/rows.json", "org/set", "more.jsonl"]},
        }
    )
    run.path.mkdir(parents=True)
    run.recipe_path.write_text(recipe.to_yaml())
    moment = (datetime.now(UTC) - age).isoformat(timespec="milliseconds")
    run.update_status(**{"status": "finished", "finished_at": moment} | status)
    return run


def runs(capsys, *words: str) -> tuple[int, str, str]:
    return (linchain("runs", *words), *capsys.readouterr())


def listed(capsys, *words: str) -> dict[str, dict]:
    code, out, _ = runs(capsys, "--json", *words)
    assert code == 0
    return {Path(entry["path"]).name: entry for entry in json.loads(out)}


def test_a_finished_run_with_its_evaluation(here, capsys):
    run = make_run(here / "runs" / "first", age=timedelta(hours=5), validation_loss=1.23456, step=10)
    run.eval_dir.mkdir()
    tasks = {"boolq": {"accuracy": 0.5, "n": 4}, "piqa": {"accuracy": 0.75, "n": 4}}
    content = {"model": "x", "protocol": "likelihood", "tasks": tasks, "average": 0.625}
    (run.eval_dir / "likelihood.json").write_text(json.dumps(content))
    code, out, err = runs(capsys)
    assert (code, err) == (0, "")
    header, line = out.splitlines()
    assert header.split() == ["run", "status", "base", "data", "rank", "depth", "loss", "evaluation", "age"]
    assert line.split("  ")[0] == "runs/first"
    for cell in ("finished", "small-model", "rows.json and 2 more", "1.2346", "5 h"):
        assert cell in line
    assert "0.625 (2 tasks, likelihood)" in line
    entry = listed(capsys)["first"]
    assert (entry["depth"], entry["rank"], entry["data"][1]) == (3, 8, "org/set")
    assert entry["evaluations"][0]["tasks"] == {"boolq": 0.5, "piqa": 0.75}


def test_a_trial_on_a_few_rows_does_not_stand_for_all(here, capsys):
    run = make_run(here / "runs" / "first")
    run.eval_dir.mkdir()

    def measured(name: str, accuracy: float, when: str, **setting):
        tasks = {"boolq": {"accuracy": accuracy, "n": 4, "measured_at": when}}
        content = {"format_version": 2, "protocol": "likelihood", "tasks": tasks, "average": accuracy}
        (run.eval_dir / name).write_text(json.dumps({"model": "x", **content, **setting}))

    measured("likelihood-limit1.json", 1.0, "2026-01-03", limit=1)
    assert "1.000 (1 task, likelihood, first 1 rows)" in runs(capsys)[1]
    measured("likelihood.json", 0.5, "2026-01-01")
    assert "0.500 (1 task, likelihood)" in runs(capsys)[1]
    assert [one["limit"] for one in listed(capsys)["first"]["evaluations"]] == [None, 1]


def test_every_state_has_its_word(here, capsys):
    root = here / "runs"
    stopped = make_run(root / "stopped", status="stopped", step=4, total_steps=10)
    stopped.metrics_path.write_bytes(jsonl_bytes([{"step": 2, "eval_loss": 0.5}]))  # logged before it ended
    make_run(root / "failed", status="failed", reason="the loss is nan", total_steps=10)
    killed = make_run(root / "killed", status="running", total_steps=10)
    killed.metrics_path.write_bytes(
        jsonl_bytes([{"step": 2, "loss": 1.0}, {"step": 3, "eval_loss": 0.5}, {"step": 5, "loss": 1.0}])
    )
    make_run(root / "imported", imported={"from": "elsewhere"})
    make_run(root / "damaged").recipe_path.write_text("- no recipe")
    make_run(root / "hidden").path.rename(root / ".staging-x")
    make_run(root / "going", status="running")
    (root / "something").mkdir()
    with locked(root / "going"):
        found = listed(capsys)
    words = {name: entry["status"] for name, entry in found.items()}
    assert words == {name: name for name in ("stopped", "failed", "killed", "imported", "damaged")} | {
        "going": "running"
    }
    assert (found["killed"]["step"], found["killed"]["loss"]) == (5, 0.5)
    assert found["imported"]["data"] == []
    _, out, _ = runs(capsys)
    assert "stopped at 4 of 10" in out and "killed at 5 of 10" in out
    assert "runs/damaged: " in out.splitlines()[-1]


def test_the_newest_stands_first(here, capsys):
    for name, days in {"old": 9, "new": 1, "middle": 4}.items():
        make_run(here / "elsewhere" / name, age=timedelta(days=days))
    assert list(listed(capsys, "elsewhere")) == ["new", "middle", "old"]
    assert list(listed(capsys, "elsewhere/old")) == ["old"]
    _, out, _ = runs(capsys, "elsewhere")
    assert [line.split("  ")[-1].strip() for line in out.splitlines()[1:]] == ["24 h", "4 d", "9 d"]


def test_a_comparison_is_one_line(here, capsys):
    from linchain_cli.comparison.definition import Definition, arm_recipe
    from linchain_cli.comparison.grid import expand
    from linchain_cli.run import ComparisonDirectory

    (here / "recipe.yaml").write_text("name: arms\nmodel: {path: org/base}\ndata: {train: rows.json}\n")
    grid = expand(here / "recipe.yaml", ["adapter.depth=0,3"])
    definition, directory = Definition(grid.base, False), ComparisonDirectory(grid.base.run_path)
    definition.add(grid.arms, [1, 2])
    definition.write(directory)
    for seed, loss in ((1, 2.0), (2, 1.5)):
        recipe = arm_recipe(grid.arms[0], seed, directory)
        make_run(recipe.run_path, depth=0, validation_loss=loss, comparison="arms")
    entry = listed(capsys)["arms"]
    assert (entry["kind"], entry["status"], entry["loss"]) == ("comparison", "2 of 4 runs finished", 1.5)
    assert (entry["base"], entry["data"]) == ("org/base", ["rows.json"])
    assert set(listed(capsys, str(directory.path))) == {"depth-0_seed-1", "depth-0_seed-2"}
    directory.definition_path.write_text("{")
    assert listed(capsys)["arms"]["status"] == "damaged"


def test_where_nothing_lies_it_says_so(here, capsys):
    assert runs(capsys) == (0, "", "there is no runs/ here yet: 'linchain train RECIPE' makes one\n")
    assert runs(capsys, "--json")[1] == "[]\n"
    code, out, err = runs(capsys, "elsewhere")
    assert (code, out) == (2, "") and "elsewhere is not a directory" in err
    (here / "runs").mkdir()
    assert runs(capsys) == (0, "", "no run lies in runs/\n")
