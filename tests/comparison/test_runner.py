"""Comparisons run for real on the tiny Llama: alike, continued, grown, refused."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

from linchain_cli.comparison import runner
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.halves import halves_path, read_halves
from linchain_cli.comparison.runner import run_comparison, with_rates
from linchain_cli.data.dataset import prepare_data
from linchain_cli.errors import InputError
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import load_recipe
from linchain_cli.run import (
    ComparisonDirectory,
    KeptAdapter,
    RunDirectory,
    newest_finished_run,
)
from linchain_cli.training.runner import run_training

from .conftest import WORDS, metrics, runs_of


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


def test_an_arm_that_does_not_fit_is_told_before_another_is_trained(recipe_path, tmp_path):
    with pytest.raises(InputError, match=r"target_modules-nothere: adapter.target_modules: 'nothere' match"):
        run_comparison(expand(recipe_path, ["adapter.target_modules=[q_proj],[nothere]"]), [1])
    assert not (tmp_path / "tiny").exists()
