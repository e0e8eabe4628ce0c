"""`linchain reproduce`: the same bits again, and where they are not, from where on."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.run.jsonl import jsonl_bytes
from linchain_cli.training.reproduction import compare_runs

from ..command_line import linchain
from .test_train import RECIPE


@pytest.fixture
def run(tmp_path, tiny_llama_dir, commonsense_rows, monkeypatch):
    """A finished run of four steps, whose rows lie in rows.json."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "rows.json").write_text(json.dumps(commonsense_rows(24)))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(runs="runs", model=tiny_llama_dir, rows="rows.json"))
    assert linchain("train", "recipe.yaml", "adapter.dropout=0.1") == 0
    return RunDirectory("runs/tiny")


def test_the_same_bits_come_out_again(run, capsys, tmp_path):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert linchain("reproduce", run.path) == 0
    out = capsys.readouterr().out
    assert "the same: every tensor of runs/tiny-reproduced is bit for bit that of runs/tiny" in out
    assert "logged values are the same" in out
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    second = RunDirectory("runs/tiny-reproduced")
    assert second.read_status().reproduces == "tiny"
    assert linchain("inspect", "--json") == 0  # the newest run is still the first one
    assert json.loads(capsys.readouterr().out)["run"] == "tiny"
    assert linchain("reproduce", run.path) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    # Another adapter than was trained, and a metric that was another from step 4 on.
    tensors = load_file(run.adapter_dir / "chain.safetensors")
    name = next(iter(tensors))
    tensors[name][0] += 0.5
    save_file(tensors, run.adapter_dir / "chain.safetensors")
    rows = read_jsonl(run.metrics_path)
    for row in rows:
        if row["step"] == 4 and "loss" in row:
            row["loss"] += 1.0
    run.metrics_path.write_bytes(jsonl_bytes(rows))
    assert linchain("reproduce", run.path, "--overwrite", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same"] and found["first"]["step"] == 4 and found["first"]["what"] == "loss"
    assert found["first"]["before"] == pytest.approx(found["first"]["now"] + 1.0)
    assert found["tensors"] == [1, len(tensors), pytest.approx(0.5)] and found["rows_from"] is None
    assert found["surroundings"] == {}


def test_micro_batches_that_auto_found_are_those_of_the_first_run(run, monkeypatch):
    """What is free on a device when it is measured differs from one time to the next."""
    found = iter([70, 10_000])
    monkeypatch.setattr("linchain_cli.training.runner.find_tokens", lambda job, say: next(found))
    assert linchain("train", "recipe.yaml", "name=auto", "training.micro_batch_size=auto") == 0
    assert linchain("reproduce", "runs/auto") == 0
    assert RunDirectory("runs/auto-reproduced").read_status().micro_batch_tokens == 70


def test_what_is_not_as_it_was_is_refused_before_training(run, capsys, tmp_path, commonsense_rows):
    recipe = run.recipe_path.read_text()
    run.recipe_path.write_text(recipe.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert linchain("reproduce", run.path) == 2
    assert "recipe.yaml is not the recipe that was trained" in capsys.readouterr().err
    run.recipe_path.write_text(recipe)
    (tmp_path / "rows.json").write_text(json.dumps(commonsense_rows(24, seed=5)))
    assert linchain("reproduce", run.path) == 2
    assert (
        "cannot be reproduced: the rows' files, or how they become tokens, are others"
        in capsys.readouterr().err
    )
    (tmp_path / "rows.json").unlink()
    assert linchain("reproduce", run.path) == 2
    (tmp_path / "rows.json").write_text(json.dumps(commonsense_rows(24)))
    status = json.loads(run.status_path.read_text())
    other = status | {"hashes": {**status["hashes"], "base": "tensors:" + "0" * 64}}
    run.status_path.write_text(json.dumps(other))
    assert linchain("reproduce", run.path) == 2
    assert "the base's weights are others (000000000000…" in capsys.readouterr().err
    config = {**status["base"]["config"], "rms_norm_eps": 0.25}
    run.status_path.write_text(json.dumps(status | {"base": {**status["base"], "config": config}}))
    assert linchain("reproduce", run.path) == 2
    assert "the base's config.json was changed (rms_norm_eps: 0.25, now 1e-06)" in capsys.readouterr().err
    run.status_path.write_text(json.dumps(status | {"status": "stopped"}))
    assert linchain("reproduce", run.path) == 2
    assert "only a finished run can be compared" in capsys.readouterr().err
    run.status_path.write_text(json.dumps(status | {"imported": {}}))
    assert linchain("reproduce", run.path) == 2
    assert "was imported" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny-reproduced").exists()
    run.status_path.write_text(json.dumps(status))
    shutil.copytree(run.path, "runs/tiny-reproduced")
    assert linchain("reproduce", run.path, "--overwrite") == 2
    assert "runs/tiny-reproduced exists and is left as it is: move it away" in capsys.readouterr().err


def test_from_another_directory_what_surrounds_a_run_is_told_when_it_changed(
    run, capsys, tmp_path, monkeypatch
):
    status = json.loads(run.status_path.read_text())
    status["versions"]["torch"] = "1.0"
    run.status_path.write_text(json.dumps(status))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from where the recipe's rows.json is not seen
    assert linchain("reproduce", tmp_path / run.path, "--output-dir", "again", "--json") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["reproduced"] == "again/tiny-reproduced"
    assert not (tmp_path / "runs" / "tiny-reproduced").exists()
    assert found["surroundings"]["torch"][0] == "1.0" and found["same"]
    assert "warning: torch is" in shown.err and "was 1.0: the last bits may differ" in shown.err


def test_runs_that_read_other_rows_or_lack_some_are_told(tmp_path):
    runs = [RunDirectory(tmp_path / name) for name in ("one", "two")]
    for run, rows in zip(runs, ([[1, 2], [3, 4], [5, 6]], [[1, 2], [4, 3]]), strict=True):
        run.adapter_dir.mkdir(parents=True)
        (run.adapter_dir / "chain.safetensors").write_bytes(b"same")
        steps = [{"step": step, "rows": each} for step, each in enumerate(rows, 1)]
        run.rows_path.write_bytes(jsonl_bytes(steps))
        logged = [{"step": step, "loss": 1.0, "step_seconds": len(rows)} for step in range(1, len(rows) + 1)]
        run.metrics_path.write_bytes(jsonl_bytes(logged))
    found = compare_runs(*runs, {})
    assert found.same and found.rows_from == 2
    assert (found.first.step, found.first.before, found.first.now) == (3, 1.0, None)
    runs[1].rows_path.write_bytes(jsonl_bytes([{"step": 1, "rows": [1, 2]}, {"step": 2, "rows": [3, 4]}]))
    assert compare_runs(*runs, {}).rows_from == 3


def test_the_recipe_of_the_second_run_says_what_the_first_found_out(run):
    from linchain_cli.recipe import load_recipe
    from linchain_cli.training.reproduction import recipe_again

    recipe = load_recipe(run.recipe_path)
    content = yaml.safe_load(recipe.to_yaml())
    content["model"]["dtype"] = "auto"
    content["training"]["micro_batch_size"] = "auto"
    recipe = type(recipe).model_validate(content)
    again = recipe_again(recipe, run.read_status(), run, run.path, run.path.parent)
    assert (again.model.dtype, again.training.micro_batch_size) == ("float32", 2)
    assert str(again.run_path) == "runs/tiny-reproduced" and again.model.path == recipe.model.path
