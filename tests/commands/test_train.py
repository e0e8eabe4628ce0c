"""`linchain train` from its arguments to its exit code, in this process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from linchain_cli import cli
from linchain_cli.recipe import load_recipe
from linchain_cli.run import RunDirectory, read_jsonl

from ..harness import ROWS, write_task

RECIPE = """
name: tiny
output_dir: {runs}
model:
  path: {model}
  dtype: float32
adapter: {{rank: 4, depth: 2, alpha: 8, target_modules: [q_proj, v_proj]}}
data:
  train: {rows}
  validation: 4
  max_length: 192
training:
  max_steps: 4
  global_batch_size: 4
  micro_batch_size: 2
  learning_rate: 0.01
  warmup_steps: 1
  log_every: 2
  eval_every: 2
  save_every: 2
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_dir: Path, commonsense_rows, monkeypatch) -> Path:
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(commonsense_rows(24)))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(runs=tmp_path / "runs", model=tiny_llama_dir, rows=rows))
    return path


@pytest.fixture
def linchain(capfd):
    """linchain(*arguments): exit code, what went to stdout, what went to stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return (end.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "tiny")


@pytest.mark.parametrize("copied", [False, True])
def test_a_run_that_was_moved_or_copied_is_not_begun_anew_in_its_old_place(
    linchain, recipe, run, tmp_path, monkeypatch, copied
):
    run.create(load_recipe(recipe).to_yaml())
    (tmp_path / "other").mkdir()
    (shutil.copytree if copied else shutil.move)(run.path, tmp_path / "other" / "place")
    monkeypatch.chdir(tmp_path / "other" / "place")
    for named, outer in ((tmp_path / "other" / "place", tmp_path / "other"), (Path(), tmp_path / "other")):
        code, _, err = linchain("train", named / "recipe.yaml", "--resume")
        assert code == 2 and f"names {run.path} as its place" in err
        assert err.endswith(f"output_dir={outer} name=place\n")
    assert run.exists() == copied and not run.rows_path.exists()


def test_from_a_recipe_to_a_finished_run(linchain, recipe, run):
    code, out, err = linchain("train", recipe)
    assert code == 0 and out == f"finished: {run.path} (adapter in {run.adapter_dir})\n"
    told, template, *lines = err.splitlines()
    assert template.endswith("rows.json: rows go through the template alpaca (data.template: auto)")
    assert told.startswith("chains on 16.7% of the blocks' weights; without: mlp.gate_proj 22.2%")
    assert lines[0].startswith("step 2/4  loss ") and "tokens/s" in lines[0] and lines[0].endswith("left")
    assert lines[1].startswith("step 2: validation loss ") and lines[1].endswith("(best so far)")
    assert run.read_status().status == "finished"
    assert run.loss_plot_path.read_bytes().startswith(b"\x89PNG")
    assert [row["step"] for row in read_jsonl(run.rows_path)] == [1, 2, 3, 4]
    assert (
        "links" in (run.adapter_dir / "chain.json").read_text()
        or (run.adapter_dir / "chain.safetensors").exists()
    )


def test_quiet_training_shows_its_result_and_warnings_only(linchain, recipe, run, monkeypatch):
    monkeypatch.setattr("linchain_cli.training.display.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("linchain_cli.console.SECONDS_BETWEEN_LINES", 0.0)
    words = ("train", recipe, "training.warmup_steps=9", "evaluation.tasks=[everyday]", "evaluation.limit=4")
    code, out, err = linchain(*words, "-q")
    finished = f"finished: {run.path} (adapter in {run.adapter_dir})\n"
    assert code == 0 and out.endswith(finished) and "everyday" in out
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert err.splitlines() == warned and any("training.warmup_steps" in line for line in warned)
    code, out, err = linchain(*words, "--fresh")
    assert code == 0 and out.endswith(finished)
    for shown in ("step 4/4  loss ", "step 4: validation loss ", "evaluating (everyday): 4 of 4"):
        assert shown in err


def test_an_existing_run_and_what_may_be_done_with_it(linchain, recipe, run):
    assert linchain("train", recipe, "training.max_steps=1")[0] == 0
    code, _, err = linchain("train", recipe)
    assert (
        code == 2
        and err
        == f"error: {run.path} holds a finished run. Use --fresh to replace it, or another name (name=NEW).\n"
    )
    code, _, err = linchain("train", recipe, "training.max_steps=1", "--resume")
    assert code == 0 and err == f"{run.path} is finished already; nothing to resume\n"
    code, _, err = linchain("train", recipe, "--resume", "--fresh")
    assert code == 2 and "give one of them" in err
    assert linchain("train", recipe, "--fresh")[0] == 0
    assert run.read_status().step == 4
    assert linchain("train", recipe, "name=new")[0] == 0


def test_a_run_goes_on_and_is_used_from_another_directory(
    linchain, recipe, run, tiny_llama_dir, tmp_path, monkeypatch
):
    """Its base was named by a relative path, and there is nothing, or another model, at that path there."""
    base = shutil.copytree(tiny_llama_dir, tmp_path / "models" / "tiny")
    recipe.write_text(recipe.read_text().replace(str(tiny_llama_dir), "models/tiny"))
    monkeypatch.chdir(tmp_path)
    assert linchain("train", recipe, "training.max_steps=2")[0] == 0
    kept = run.read_status().base
    assert (kept.path, kept.source, kept.directory) == ("models/tiny", str(base), str(base))
    run.update_status(status="stopped")
    (tmp_path / "elsewhere" / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "nowhere").mkdir()
    for place in ("elsewhere", "nowhere"):
        monkeypatch.chdir(tmp_path / place)
        code, _, err = linchain("train", recipe, "--resume", "training.max_steps=3")
        assert code == 0, err
        run.update_status(status="stopped")
    run.update_status(status="finished")
    assert linchain("inspect", run.path)[0] == 0
    assert linchain("generate", run.path, "Is it?", "--max-new-tokens", 1)[0] == 0
    code, _, err = linchain("generate", "models/tiny", "Is it?")
    assert code == 2 and "it looks like a path, so the hub was not asked" in err


def test_tasks_are_evaluated_at_the_end(linchain, recipe, run):
    code, out, _ = linchain(
        "train", recipe, "training.max_steps=1", "evaluation.tasks=[everyday]", "evaluation.limit=4"
    )
    assert code == 0 and "everyday" in out
    results = json.loads((run.eval_dir / "likelihood.json").read_bytes())
    assert results["tasks"]["everyday"]["n"] == 4 and results["model"] == str(run.path)
    assert len(read_jsonl(run.eval_dir / "likelihood.predictions.jsonl")) == 4


def test_tasks_of_the_harness_are_evaluated_at_the_end(linchain, recipe, run, tmp_path, harness_alone):
    task = f"lm_eval:{write_task(tmp_path / 'tasks')}"
    words = ("train", recipe, "training.max_steps=1", f"evaluation.tasks=[everyday,{task}]")
    limited = (*words, "evaluation.limit=4")
    code, out, err = linchain("check", recipe, f"evaluation.tasks=[{task}]")
    assert code == 0 and re.search(r"linchain_test_places +9 +lm-evaluation-harness", out), err
    code, out, err = linchain(*limited)
    assert code == 0 and "everyday" in out and "linchain_test_places" in out, err
    results = json.loads((run.eval_dir / "lm_eval.json").read_bytes())
    assert results["tasks"]["linchain_test_places"]["n"] == 4 and results["model"] == str(run.path)
    assert list(json.loads((run.eval_dir / "likelihood.json").read_bytes())["tasks"]) == ["everyday"]
    code, out, err = linchain(*limited, "--resume")
    assert (code, out) == (0, "") and "is finished already" in err
    # What is missing is made up, also of rows that have changed.
    write_task(tmp_path / "tasks", ROWS[::-1])
    code, out, err = linchain(*limited, "--resume")
    assert code == 0 and "linchain_test_places" in out
    assert len(list(run.eval_dir.glob("lm_eval*.json"))) == 2
    code, out, err = linchain("eval", run.path)  # which asks for what the recipe names, all rows of it
    assert code == 0 and "linchain_test_places" in out, err
    code, _, err = linchain("train", recipe, f"evaluation.tasks=[{task}]", "--fresh", "task=classification")
    assert code == 2 and "asks a model that writes, and this one predicts labels" in err


def test_a_wrong_task_is_told_before_training(linchain, recipe, run, tmp_path):
    code, _, err = linchain("train", recipe, "evaluation.tasks=[gsm8k]")
    assert code == 2 and "gsm8k has no options whose likelihood could be compared" in err
    (tmp_path / "sums.jsonl").write_text('{"instruction": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "sums.yaml").write_text("path: sums.jsonl\nanswer: number\n")
    code, _, err = linchain("train", recipe, f"evaluation.tasks=[{tmp_path}/sums.yaml]")
    assert code == 2 and "sums has no options whose likelihood could be compared" in err
    assert not run.path.exists()


def test_a_missing_evaluation_is_made_up_on_resume(linchain, recipe, run, monkeypatch):
    """It was cut off by Ctrl-C, and its tasks were named only later."""
    from linchain_cli.evaluation import evaluate

    tasks = ["evaluation.tasks=[everyday]", "evaluation.limit=4"]
    original = evaluate.Halving.run

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Halving, "run", interrupted)
        code, _, err = linchain("train", recipe, *tasks)
    assert code == 130 and f"{run.path} is finished, its evaluation is not: --resume continues it" in err
    assert run.read_status().finished and not list(run.eval_dir.glob("*.json"))
    code, out, err = linchain("train", recipe, *tasks, "--resume")
    assert code == 0 and "everyday" in out and out.endswith(f"(adapter in {run.adapter_dir})\n")
    made_up = (run.eval_dir / "likelihood.predictions.jsonl").read_bytes()
    code, out, err = linchain("train", recipe, *tasks, "--resume")
    assert (code, out) == (0, "") and err == f"{run.path} is finished already; nothing to resume\n"
    assert linchain("train", recipe, *tasks, "name=whole")[0] == 0
    whole = run.eval_dir.parents[1] / "whole" / "eval" / "likelihood.predictions.jsonl"
    assert whole.read_bytes() == made_up


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.tasks=[everday]"], "everyday"),
        (["model.path=/nowhere/model"], "/nowhere/model"),
        (["data.train=/nowhere/rows.json"], "/nowhere/rows.json"),
        (["adapter.target_modules=[k_prj]"], "Did you mean 'k_proj'?"),
        (["training.trackers=[aim]"], "training.trackers: aim cannot be used"),
        (["training.parallel=shard"], "shard needs several processes"),
        (["data.validation=24"], "data.validation: 24 rows cannot be held out of 24"),
        (["learning_rate=1"], "training.learning_rate"),
    ],
)
def test_wrong_input_is_one_message_and_leaves_no_run(linchain, recipe, run, overrides, message):
    code, out, err = linchain("train", recipe, *overrides)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert not run.path.exists()


def test_a_run_that_fails_says_why_and_exits_1(linchain, recipe, run, monkeypatch):
    from linchain_cli.training import loss

    monkeypatch.setattr(loss, "add_gradients", lambda model, batch, scale, device: scale * float("nan"))
    code, out, err = linchain("train", recipe)
    assert code == 1 and out == ""
    assert (
        "\nerror: step 1: the loss is nan" in err and "Its rows" not in err and "The step's rows are [" in err
    )
    assert run.read_status().status == "failed"


def test_with_json_stdout_holds_how_the_run_stands(recipe, linchain, tmp_path, capfd):
    tasks = ("evaluation.tasks=[everyday]", "evaluation.limit=3", "training.max_steps=2")
    code, out, err = linchain("train", recipe, *tasks, "--json")
    found = json.loads(out)
    assert code == 0 and (found["status"], found["step"], found["rank"]) == ("finished", 2, 4)
    assert found["path"] == str(tmp_path / "runs" / "tiny") and Path(found["adapter"]).is_dir()
    assert list(found["evaluations"][0]["tasks"]) == ["everyday"]
    code, out, _ = linchain("train", recipe, *tasks, "--json", "--resume")
    assert code == 0 and json.loads(out) == found
