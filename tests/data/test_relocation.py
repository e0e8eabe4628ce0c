"""The recipe of a run that was started in another directory than one is in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linchain_cli.data.relocation import recipe_from_here
from linchain_cli.recipe import Recipe
from linchain_cli.run import RunDirectory

DATA = {
    "train": ["rows/a.json", "rows/part-*.jsonl", "everyday", "glue/rte", "org/set", "https://host/x.json"],
    "validation": "rows/b.json",
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch) -> Recipe:
    for name in ("rows/a.json", "rows/part-1.jsonl", "rows/b.json", "tests/boolq", "task.yaml", "everyday"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Recipe.model_validate(
        {
            "name": "r",
            "model": {"path": "org/model"},
            "data": DATA,
            "evaluation": {
                "tasks": ["boolq", "task.yaml", "lm_eval:mmlu", "lm_eval:task.yaml"],
                "data_dir": "tests",
            },
        }
    )


def test_validation_files_are_found_whether_one_or_several(recipe, tmp_path):
    run, there = (
        make_run(tmp_path / "scratch" / "r", tmp_path / "project"),
        tmp_path / "project" / "rows" / "b.json",
    )

    def found(validation):
        data = recipe.data.model_validate({**recipe.data.model_dump(), "validation": validation})
        return recipe_from_here(recipe.model_copy(update={"data": data}), run).data.validation

    assert found("rows/b.json") == str(there)
    assert found({"path": "rows/b.json"}).path == str(there)
    assert [one.path for one in found(["rows/b.json", "glue/rte"])] == [str(there), "glue/rte"]
    assert (found(5), found("5%"), found("auto")) == (5, "5%", "auto")


def make_run(path: Path, started_in: Path | None = None) -> RunDirectory:
    run = RunDirectory(path)
    run.create("name: r\n")
    run.update_status(started_in=started_in and str(started_in))
    return run


@pytest.mark.parametrize("moved_together", [False, True])
def test_files_are_found_where_the_run_was_started_or_around_it(recipe, tmp_path, moved_together):
    project = tmp_path / "project"
    if moved_together:  # what it was started in is gone
        run = make_run(project / "runs" / "r", tmp_path / "gone")
    else:
        run = make_run(tmp_path / "scratch" / "r", project)
    here = recipe_from_here(recipe, run)
    rows = project / "rows"
    assert [source.path for source in here.data.train] == [
        f"{rows / 'a.json'}",
        f"{rows / 'part-*.jsonl'}",
        *DATA["train"][2:],
    ]
    assert here.data.validation == f"{rows / 'b.json'}"
    file = project / "task.yaml"
    assert here.evaluation.tasks == ["boolq", f"{file}", "lm_eval:mmlu", f"lm_eval:{file}"]
    assert here.evaluation.data_dir == f"{project / 'tests'}"
    assert here.model_copy(update={"data": recipe.data, "evaluation": recipe.evaluation}) == recipe


def test_what_is_here_and_what_is_nowhere_stays_as_it_is(recipe, tmp_path):
    (tmp_path / "elsewhere" / "rows").mkdir()
    (tmp_path / "elsewhere" / "rows" / "a.json").write_text(json.dumps([1]))
    here = recipe_from_here(recipe, make_run(tmp_path / "scratch" / "r"))
    assert here == recipe
    here = recipe_from_here(recipe, make_run(tmp_path / "scratch" / "s", tmp_path / "project"))
    assert here.data.train[0].path == "rows/a.json" and here.data.validation != recipe.data.validation
