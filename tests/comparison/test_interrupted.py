"""Comparisons that a signal or a failure ends, and those that several processes share."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from linchain_cli.chain import detach
from linchain_cli.comparison import runner
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.runner import run_comparison
from linchain_cli.errors import InUse, LinchainError, Stopped
from linchain_cli.run import ComparisonDirectory, RunDirectory, locked
from linchain_cli.training.display import Display
from linchain_cli.training.runner import run_training

from .conftest import WORDS, metrics, runs_of


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
