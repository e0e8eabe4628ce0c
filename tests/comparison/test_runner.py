"""Comparisons run for real on the tiny Llama: alike, interrupted, continued, grown, refused."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import torch

from linchain_cli.chain import detach
from linchain_cli.commands.compare import parse_seeds
from linchain_cli.comparison import runner
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.halves import halves_path, read_halves
from linchain_cli.comparison.results import lines
from linchain_cli.comparison.runner import run_comparison, with_rates
from linchain_cli.data.dataset import prepare_data
from linchain_cli.errors import InputError, InUse, LinchainError, Stopped
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import load_recipe
from linchain_cli.run import (
    ComparisonDirectory,
    KeptAdapter,
    RunDirectory,
    locked,
    newest_finished_run,
    read_jsonl,
)
from linchain_cli.training.display import Display
from linchain_cli.training.runner import run_training

from ..harness import write_task

WORDS = ["adapter.depth=0,3"]
TIMES = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


@pytest.fixture
def loads(monkeypatch):
    """The recipes a base model was loaded for."""
    seen, load = [], runner.load_base

    def counted(recipe, *others):
        seen.append(recipe.name)
        return load(recipe, *others)

    monkeypatch.setattr(runner, "load_base", counted)
    return seen


def metrics(run: RunDirectory) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in TIMES} for row in read_jsonl(run.metrics_path)
    ]


def runs_of(directory: ComparisonDirectory) -> dict[str, RunDirectory]:
    return {path.name: RunDirectory(path) for path in sorted(directory.arms_dir.iterdir()) if path.is_dir()}


def test_auto_is_each_arms_own_rate(recipe_path):
    """alpha 8 asks for four times the published rate, three kaiming links for √27 times as much again."""
    words = ["adapter.depth=0,3", "training.learning_rate=auto,1e-2"]
    grid = with_rates(expand(recipe_path, words))
    assert [arm.recipe.training.learning_rate for arm in grid.arms] == [4e-3, 1e-2, 0.021, 1e-2]
    assert grid.base.training.learning_rate == 3e-3


def test_every_arm_has_a_finished_run_with_every_seed(finished):
    _, directory, results = finished
    runs = runs_of(directory)
    assert set(runs) == {f"{arm}_seed-{seed}" for arm in ("depth-0", "depth-3-kaiming") for seed in (1, 2)}
    for name, run in runs.items():
        status = run.read_status()
        assert status.finished and status.comparison == "tiny"
        assert status.arm == name.partition("_seed")[0]
        assert not run.checkpoints_dir.exists()
        assert run.loss_plot_path.read_bytes()[:4] == b"\x89PNG"
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4
    assert len(results["tables"]["recipe_rate"]) == 2
    assert results == json.loads(directory.results_path.read_bytes())


def test_the_halves_make_up_the_loss_of_the_adapter_that_is_kept(finished, tiny_llama_dir):
    _, directory, results = finished
    recipe = load_recipe(finished[0])
    rows = prepare_data(recipe.data, load_tokenizer(tiny_llama_dir)).validation
    counts = [int(rows.supervised_counts[first::2].sum()) for first in (0, 1)]
    for name, run in runs_of(directory).items():
        assert run.read_status().adapter == KeptAdapter(step=6, kept="last")  # the recipe's keep is best
        both = read_halves(run).losses
        whole = sum(loss * count for loss, count in zip(both, counts, strict=True)) / sum(counts)
        (entry,) = (one for one in results["runs"] if one["directory"] == f"arms/{name}")
        assert whole == pytest.approx(entry["validation_loss"], rel=1e-5)
        assert entry["halves"] == list(both) and both[0] != both[1]


def test_halves_that_are_missing_are_measured_of_what_is_there(finished, loads):
    path, directory, results = finished
    run = RunDirectory(directory.arms_dir / "depth-0_seed-1")
    before = read_halves(run)
    halves_path(run).unlink()
    assert run_comparison(expand(path, WORDS), [1, 2]) == results
    assert read_halves(run) == before and len(loads) == 1


def test_arms_see_the_same_rows_in_the_same_order(finished):
    _, directory, _ = finished
    rows = {name: run.rows_path.read_bytes() for name, run in runs_of(directory).items()}
    assert rows["depth-0_seed-1"] == rows["depth-3-kaiming_seed-1"]
    assert rows["depth-0_seed-2"] == rows["depth-3-kaiming_seed-2"]
    assert rows["depth-0_seed-1"] != rows["depth-0_seed-2"]
    hashes = [run.read_status().hashes for run in runs_of(directory).values()]
    assert len({one["data"] for one in hashes}) == len({one["base"] for one in hashes}) == 1


def test_arms_are_no_newest_run(finished):
    _, directory, _ = finished
    for root in (directory.path.parent, directory.arms_dir):
        with pytest.raises(InputError, match="no finished run"):
            newest_finished_run(root)


def test_an_arm_is_what_its_recipe_gives_alone(finished, tmp_path):
    """The base model that arms share carries nothing over: the third run equals one in a directory of its
    own."""
    _, directory, _ = finished
    arm = RunDirectory(directory.arms_dir / "depth-3-kaiming_seed-2")
    recipe = load_recipe(arm.recipe_path, [f"output_dir={tmp_path}"])
    run_training(recipe, brief=True)
    alone = RunDirectory(recipe.run_path)
    assert metrics(alone) == metrics(arm)
    for name in ("chain.safetensors", "chain.json"):
        assert (alone.adapter_dir / name).read_bytes() == (arm.adapter_dir / name).read_bytes()


def test_tables_as_csv(finished):
    _, directory, results = finished
    lines = directory.table_path.read_text().splitlines()
    assert lines[0].startswith("table,arm,label,reference,depth,rank")
    assert len(lines) == 1 + 2 * 2  # both tables; the best rates are the recipe's here
    runs = directory.runs_table_path.read_text().splitlines()
    assert len(runs) == 5 and "validation_loss" in runs[0]
    assert directory.plot_path.read_bytes()[:4] == b"\x89PNG"


def test_the_base_is_loaded_once(recipe_path, loads):
    run_comparison(expand(recipe_path, ["adapter.depth=0,1", "training.max_steps=1"]), [1, 2])
    assert len(loads) == 1


def test_no_arm_starts_with_memory_that_the_one_before_has_freed(recipe_path, monkeypatch):
    """Chains and their groups refer to each other: they have to be looked for."""
    chains, left, collect = [], [], runner.collect_memory
    released, train = [], runner.run_training

    def count(device):
        left.append(sum(chain() is not None for chain in chains))
        return True

    def watched(recipe, *, base, **options):
        job = train(recipe, base=base, **options)
        chains.extend(map(weakref.ref, job.layers.values()))

    monkeypatch.setattr(runner, "collect_memory", lambda: released.append(collect()))
    monkeypatch.setattr(runner, "reset_peak_memory", count)
    monkeypatch.setattr(runner, "run_training", watched)
    gc.disable()
    try:
        run_comparison(expand(recipe_path, ["adapter.depth=0,1", "training.max_steps=1"]), [1])
    finally:
        gc.enable()
    assert chains and left == [0, 0] and len(released) >= 2


def test_the_old_base_is_gone_before_the_next_one_is_loaded(recipe_path, monkeypatch):
    models, load = [], runner.load_base

    def watched(*arguments):
        assert not [model for model in models if model() is not None]
        base = load(*arguments)
        models.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(runner, "load_base", watched)
    gc.disable()  # or circles would be found by chance
    try:
        run_comparison(expand(recipe_path, ["model.dtype=float32,bfloat16", "training.max_steps=1"]), [1])
    finally:
        gc.enable()
    assert len(models) == 2


def test_a_finished_comparison_is_read_again_not_run_again(recipe_path, loads, tmp_path):
    grid = expand(recipe_path, ["adapter.depth=0,1", "training.max_steps=1"])
    first = run_comparison(grid, [1])
    adapters = {
        run.path: run.adapter_dir.stat().st_mtime_ns
        for run in runs_of(ComparisonDirectory(tmp_path / "tiny")).values()
    }
    loads.clear()
    assert run_comparison(grid, [1]) == first
    assert loads == []
    # More seeds and arms join what is there.
    grown = run_comparison(expand(recipe_path, ["adapter.depth=0,3", "training.max_steps=1"]), [1, 2])
    assert [(run["arm"], run["seed"]) for run in grown["runs"]] == [
        ("depth-0", 1),
        ("depth-0", 2),
        ("depth-1-kaiming", 1),
        ("depth-3-kaiming", 1),
        ("depth-3-kaiming", 2),
    ]
    assert all(path.joinpath("adapter").stat().st_mtime_ns == time for path, time in adapters.items())
    assert grown["commands"] == [
        ["adapter.depth=0,1", "--seeds", "1"],
        ["adapter.depth=0,3", "--seeds", "1,2"],
    ]


def test_an_interrupted_comparison_continues(finished, write_recipe, tmp_path, monkeypatch):
    """A signal in the second run: it stops after a checkpoint, and the comparison ends as if nothing had
    been."""
    _, whole, _ = finished
    path = write_recipe(tmp_path)
    grid = expand(path, WORDS)
    show, steps = Display.step, []

    def interrupting(self, *shown):
        steps.append(shown)
        if len(steps) == 6 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        show(self, *shown)

    monkeypatch.setattr(Display, "step", interrupting)
    with pytest.raises(Stopped) as stop:
        run_comparison(grid, [1, 2])
    assert stop.value.exit_code == 143
    assert "stopped during depth-3-kaiming_seed-1" in str(stop.value)
    directory = ComparisonDirectory(tmp_path / "tiny")
    statuses = {name: run.read_status().status for name, run in runs_of(directory).items()}
    assert statuses == {"depth-0_seed-1": "finished", "depth-3-kaiming_seed-1": "stopped"}
    assert [run["status"] for run in json.loads(directory.results_path.read_bytes())["runs"]].count(
        "missing"
    ) == 2

    run_comparison(grid, [1, 2])
    assert len(steps) < 6 * 4 + 3  # the stopped run went on, it did not start over
    for name, run in runs_of(directory).items():
        other = RunDirectory(whole.arms_dir / name)
        assert metrics(run) == metrics(other)
        assert (run.adapter_dir / "chain.safetensors").read_bytes() == (
            other.adapter_dir / "chain.safetensors"
        ).read_bytes()


def test_an_arm_that_fails_does_not_end_the_others(recipe_path, tmp_path, monkeypatch):
    train = runner.run_training

    def failing(recipe, **options):
        if recipe.adapter.depth == 1:
            raise LinchainError("step 3: the loss is nan")
        return train(recipe, **options)

    def full(run):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runner, "run_training", failing)
    monkeypatch.setattr(runner, "loss_plot", full)  # a picture is no result
    with pytest.raises(
        LinchainError, match="1 of 3 runs failed:\ndepth-1-kaiming_seed-1: step 3: the loss is nan"
    ) as error:
        run_comparison(expand(recipe_path, ["adapter.depth=0,1,3", "training.max_steps=1"]), [1])
    assert error.value.exit_code == 1
    results = json.loads((tmp_path / "tiny" / "results.json").read_bytes())
    assert [row["label"] for row in results["tables"]["recipe_rate"]] == ["LoRA", "depth 3, kaiming"]


def test_a_comparison_whose_directory_is_removed_ends_with_its_run(recipe_path, tmp_path, monkeypatch):
    monkeypatch.setattr(Display, "step", lambda *shown: shutil.rmtree(tmp_path / "tiny"))
    with pytest.raises(LinchainError, match="depth-0_seed-1 was removed while the run was going on"):
        run_comparison(expand(recipe_path, ["adapter.depth=0,1"]), [1])
    assert not (tmp_path / "tiny").exists()


def test_a_signal_ends_the_comparison_also_if_its_run_then_fails(recipe_path, tmp_path, monkeypatch):
    """As on a full disk: what the signal asked for must not be lost with the run."""

    def failing(self, *shown):
        os.kill(os.getpid(), signal.SIGTERM)
        raise LinchainError("No space left on device")

    monkeypatch.setattr(Display, "step", failing)
    with pytest.raises(Stopped, match="depth-0_seed-1 had failed before: No space left") as stop:
        run_comparison(expand(recipe_path, ["adapter.depth=0,1"]), [1])
    assert stop.value.exit_code == 143
    assert set(runs_of(ComparisonDirectory(tmp_path / "tiny"))) == {"depth-0_seed-1"}


def test_fresh_starts_over(recipe_path, tmp_path, loads):
    grid = expand(recipe_path, ["adapter.depth=0,1", "training.max_steps=1"])
    run_comparison(grid, [1])
    again = expand(recipe_path, ["adapter.depth=0,1", "training.max_steps=2"])
    (tmp_path / "tiny" / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="also holds notes.md, which linchain did not write"):
        run_comparison(again, [1], fresh=True)
    (tmp_path / "tiny" / "notes.md").unlink()
    run_comparison(again, [1], fresh=True)
    assert len(loads) == 2
    runs = runs_of(ComparisonDirectory(tmp_path / "tiny"))
    assert {run.read_status().step for run in runs.values()} == {2}


def test_equal_parameters(recipe_path):
    results = run_comparison(
        expand(recipe_path, ["adapter.depth=0,8", "adapter.rank=8", "training.max_steps=1"]),
        [1],
        equal_parameters=True,
    )
    rows = {row["depth"]: row for row in results["tables"]["recipe_rate"]}
    assert rows[0]["rank"] == 8 > rows[8]["rank"]
    assert rows[8]["alpha"] / rows[8]["rank"] == rows[0]["alpha"] / 8
    low, high = sorted(row["trainable_parameters"] for row in rows.values())
    assert (high - low) / low < 0.15
    assert any(f"{low:,} to {high:,}" in note for note in results["notes"])


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


def test_an_arm_that_does_not_fit_is_told_before_another_is_trained(recipe_path, tmp_path):
    with pytest.raises(InputError, match=r"target_modules-nothere: adapter.target_modules: 'nothere' match"):
        run_comparison(expand(recipe_path, ["adapter.target_modules=[q_proj],[nothere]"]), [1])
    assert not (tmp_path / "tiny").exists()


def test_runs_that_another_process_is_at_are_left_to_it(recipe_path, tmp_path, capsys, loads):
    directory = ComparisonDirectory(tmp_path / "tiny")
    run_comparison(expand(recipe_path, ["adapter.depth=0,3"]), [1])
    grid = expand(recipe_path, ["adapter.depth=0,1,3"])
    drawn = directory.plot_path.stat().st_mtime_ns
    with locked(directory.arms_dir / "depth-1-kaiming_seed-1"):
        results = run_comparison(grid, [1])
        assert [row["label"] for row in results["tables"]["recipe_rate"]] == ["LoRA", "depth 3, kaiming"]
        assert "left to other processes that are at them: depth-1-kaiming_seed-1" in capsys.readouterr().err
        assert directory.plot_path.stat().st_mtime_ns == drawn, "whoever is last draws"
        with pytest.raises(InUse, match=r"depth-1-kaiming_seed-1 is being trained .* before --fresh"):
            run_comparison(grid, [1], fresh=True)
    assert len(loads) == 1, "nothing to load a base for"
    results = run_comparison(grid, [1])
    assert len(results["tables"]["recipe_rate"]) == 3


def test_a_run_that_another_process_ends_while_the_base_is_loaded_is_taken(recipe_path, monkeypatch):
    ended = []

    def late(recipe, **options):
        if not ended:
            ended.append(recipe.name)
            run_training(recipe, **options)
            detach(options["base"].model)
        return run_training(recipe, **options)

    monkeypatch.setattr(runner, "run_training", late)
    results = run_comparison(expand(recipe_path, WORDS), [1])
    assert ended and len(results["tables"]["recipe_rate"]) == 2


def test_two_processes_share_the_runs(finished, write_recipe, tmp_path):
    """Both are started with the same command at the same time; together they train each run once."""
    _, whole, expected = finished
    path = write_recipe(tmp_path)
    command = [sys.executable, "-m", "linchain_cli", "compare", str(path), *WORDS, "--seeds", "1,2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    messages = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], messages
    directory = ComparisonDirectory(tmp_path / "tiny")
    trained = [re.findall(r"run \d of 4: (\S+)", text) for text in messages]
    # Both may start for the same run; one gets it.
    assert set(trained[0] + trained[1]) == set(runs_of(directory))
    assert min(len(set(names)) for names in trained) < 4, "neither trained all"
    for name, run in runs_of(directory).items():
        assert metrics(run) == metrics(RunDirectory(whole.arms_dir / name))
    assert (
        json.loads(directory.results_path.read_bytes())["tables"]["recipe_rate"][1]["difference"]
        == (expected["tables"]["recipe_rate"][1]["difference"])
    )


def test_seeds():
    assert parse_seeds("1,2,3") == [1, 2, 3]
    assert parse_seeds("7, 7,4294967295") == [7, 4294967295]
    for text in ("", "1,", "1.5", "-1", "x", "4294967296"):
        with pytest.raises(InputError, match="--seeds"):
            parse_seeds(text)
