"""`linchain tune` on the tiny Llama: what it tries and writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import numpy as np
import pytest

from linchain_cli.commands.tune import lines
from linchain_cli.comparison import tuning
from linchain_cli.comparison.tuning import (
    TuningDirectory,
    best_rate,
    centre,
    place_of,
    rate_at,
    refined_rate,
    share_of_rows,
    tune,
)
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.recipe import Recipe, load_recipe
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training import loop, range_test
from linchain_cli.training.range_test import RangePoint, rising_rates

from ..classifiers import KINDS, make_checkpoint, pair_rows, write_rows
from ..command_line import linchain

# Of 60 steps each part takes 12: the tiny model learns something, and a rate of 0.3 is too high for it.
WORDS = ["training.max_steps=60", "training.learning_rate=auto"]


@pytest.fixture(scope="session")
def tuned(write_recipe, tmp_path_factory):
    """(recipe file, directory, result) of one tuning; tests only read it."""
    path = write_recipe(tmp_path_factory.mktemp("tuning"))
    directory, found = tune(load_recipe(path, WORDS))
    return path, directory, found


def test_a_range_test_and_a_few_runs_lead_to_a_rate(tuned):
    path, directory, found = tuned
    rates = [point.rate for point in found.range_test]
    assert rates == sorted(rates) and 4 < len(rates) <= found.steps == 12
    assert 3 <= len(found.rates) <= 4 and found.rates == sorted(found.rates)
    assert found.rates[0] <= found.rate <= found.rates[-1]
    assert found.edge == (found.rate in (found.rates[0], found.rates[-1]))
    # Everything but length and rate is the recipe's, and all runs saw the same rows.
    runs = [RunDirectory(run) for run in sorted(directory.arms_dir.glob("[!.]*"))]
    assert len(runs) == len(found.rates)
    trained = [load_recipe(run.recipe_path) for run in runs]
    assert sorted(one.training.learning_rate for one in trained) == found.rates
    assert {one.training.max_steps for one in trained} == {12}
    assert len({run.rows_path.read_text() for run in runs}) == 1
    # 60 steps of 4 rows go five times over 48, 12 steps as often over a fifth of them.
    assert {one.data.train[0].weight for one in trained} == {0.2}
    assert all(read_jsonl(run.metrics_path)[-1]["epoch"] >= 4 for run in runs)
    kept = load_recipe(path, WORDS).adapter
    assert all(one.adapter == kept for one in trained)


def test_the_copy_of_the_recipe_differs_in_its_rate_alone(tuned):
    path, directory, found = tuned
    before, after = load_recipe(path, WORDS), load_recipe(directory.recipe_path)
    assert after.training.learning_rate == found.rate
    assert after == before.model_copy(update={"training": after.training})
    changed = before.training.model_copy(update={"learning_rate": found.rate})
    assert after.training == changed and path.read_text().count("learning_rate: 3.0e-3") == 1
    assert directory.curve_path.read_bytes()[:4] == b"\x89PNG"


def test_called_again_it_is_done(tuned, monkeypatch, capsys):
    path, directory, found = tuned
    monkeypatch.setattr(tuning, "load_base", None)
    _, again = tune(load_recipe(path, [*WORDS, "training.learning_rate=0.1"]))
    assert again == found
    assert "is finished already; --fresh tunes anew" in capsys.readouterr().err


def test_another_recipe_is_not_mixed_into_it(tuned):
    path, _, _ = tuned
    with pytest.raises(InputError, match=r"another recipe; it differs in adapter.rank"):
        tune(load_recipe(path, [*WORDS, "adapter.rank=2"]))


def test_a_stopped_tuning_keeps_what_is_done(recipe_path, monkeypatch):
    recipe = load_recipe(recipe_path, WORDS)
    directory = TuningDirectory(recipe.run_path.with_name("tiny-tune"))
    steps, step = [], loop.optimizer_step

    def counted(job, rows, rate, stop):
        steps.append(rate)
        if len(steps) == 20:
            stop.signum = signal.SIGTERM
        return step(job, rows, rate, stop)

    monkeypatch.setattr(loop, "optimizer_step", counted)
    with pytest.raises(Stopped):
        tune(recipe)
    assert directory.tuning_path.is_file() and not directory.recipe_path.exists()
    tested = json.loads(directory.tuning_path.read_text())["range_test"]
    before = len(steps)
    _, found = tune(recipe)
    assert found.rate and json.loads(directory.tuning_path.read_text())["range_test"] == tested
    # The run that was stopped went on from where it was.
    assert len(steps) == 12 * len(found.rates) and before == 20


def test_a_rate_that_fails_has_no_loss(recipe_path, monkeypatch):
    step = loop.optimizer_step

    def failing(job, rows, rate, stop):
        if job.recipe.training.learning_rate > 0.02:
            raise LinchainError("step 1: the loss is nan")
        return step(job, rows, rate, stop)

    monkeypatch.setattr(loop, "optimizer_step", failing)
    monkeypatch.setattr(tuning, "centre", lambda *_: 0.01)
    _, found = tune(load_recipe(recipe_path, WORDS))
    assert found.rates == [3e-3, 1e-2, 3e-2] and found.losses[2] is None
    assert found.rate in (3e-3, 1e-2) or 3e-3 < found.rate < 1e-2
    monkeypatch.setattr(loop, "optimizer_step", lambda *_: (_ for _ in ()).throw(LinchainError("all fail")))
    with pytest.raises(LinchainError, match="3 of 3 runs failed"):
        tune(load_recipe(recipe_path, [*WORDS, "name=other"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.validation=0", "training.keep=last"], "data.validation is 0"),
        (["training.early_stopping=1"], "training.early_stopping"),
        (["training.optimizer=adamw_8bit"], "expected adamw, got 'adamw_8bit'. Did you mean 'adamw'?"),
        (["adapter.depht=1"], "Did you mean 'depth'?"),
    ],
)
def test_wrong_input_is_one_message(recipe_path, words, message, capsys):
    assert linchain("tune", recipe_path, *words) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_what_it_shows(tuned, capsys):
    path, directory, found = tuned
    for words in ([], ["--json"]):
        assert linchain("tune", path, *WORDS, *words) == 0
        shown = capsys.readouterr().out
        if words:
            assert json.loads(shown)["rate"] == found.rate
        else:
            assert f"learning rate: {found.rate:g}" in shown and str(directory.curve_path) in shown
            assert f"training.max_steps=60 training.learning_rate={found.rate:g}\n" in shown


def test_a_short_run_goes_over_its_rows_as_often_as_the_whole_one():
    assert share_of_rows(steps=60, total=300, rows=1727, batch=16) == 0.2
    assert share_of_rows(steps=16, total=80, rows=1280, batch=16) == 1  # no row comes twice
    assert share_of_rows(steps=200, total=3900, rows=2490, batch=32) == 0.2
    assert share_of_rows(steps=12, total=20, rows=40, batch=4) == 0.6
    assert share_of_rows(steps=12, total=60, rows=40, batch=32) == 0.8
    assert share_of_rows(steps=12, total=10, rows=40, batch=8) == 1


def test_rates_that_the_runs_cannot_tell_apart_are_said_to_be_alike(tuned):
    found = replace(tuned[2], rates=[1e-3, 3e-3, 1e-2], losses=[0.6931, 0.6925, 0.6950], rate=2e-3)
    assert "in 12 steps the rates can hardly be told apart" in "\n".join(lines(found))
    found = replace(found, losses=[0.6931, 0.6725, None])
    assert "told apart" not in "\n".join(lines(found))


def test_rates_come_from_a_series_of_half_decades():
    assert [rate_at(place) for place in range(-8, -2)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [place_of(rate) for rate in (1e-4, 3e-4, 5e-4, 1e-3, 2e-3)] == [-8, -7, -7, -6, -5]
    assert rising_rates(1e-5, 1e-1, 5) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_the_rate_lies_at_the_parabolas_lowest_point():
    def refined(*losses, rates=(1e-3, 3e-3, 1e-2)):
        return refined_rate(list(zip(rates, losses, strict=False)), start=3.0)

    assert refined(2.0, 1.0, 2.0) == pytest.approx(3e-3, rel=0.1)
    assert 1.5e-3 < refined(1.1, 1.0, 2.0) < 3e-3
    assert 3e-3 < refined(2.0, 1.0, 1.1) < 6e-3
    # Of an end nothing is known beyond it; equal losses have no lowest point.
    assert refined(1.0, 2.0, 3.0) == refined(1.0, 1.0, 1.0) == 1e-3


def test_of_rates_that_learn_as_much_the_lowest_is_taken():
    """By a loss over responses, say, in which every rate comes to what guessing costs."""
    tried = list(zip((3e-4, 1e-3, 3e-3, 1e-2), (0.1882, 0.1617, 0.1564, 0.1510), strict=True))
    assert best_rate(tried, start=2.75) == refined_rate(tried, start=2.75) == 1e-3
    assert best_rate(tried, start=0.2) == 1e-2  # where so little is learnt that it is a difference
    assert best_rate(tried, start=0.1) == 1e-2  # nothing is learnt


@pytest.mark.parametrize(
    ("losses", "held"),
    [
        ((3.0, 2.5, 1.0, 5.0, 9.0), 1e-2),
        # Where nearly all is learnt, a little up and down is noise.
        ((3.0, 2.5, 1.0, 1.15, 9.0), 1e-1),
        # Behind a rate that was too high anything may come, a lower loss, too.
        ((0.69, 0.66, 0.71, 0.95, 0.6), 1e-3),
        # Nothing was learnt, and still some rate is too high.
        ((0.69, 0.69, 0.692, 0.71, 0.69), 1e-2),
        ((3.0, 2.0, float("nan")), 1e-3),
        # It fell to the end, which was the highest rate or the last one with a finite loss.
        ((3.0, 2.5, 2.0), 1e-2),
        # It neither fell nor rose: twice the published rate, halved.
        ((0.69, 0.685, 0.695, 0.69, 0.69), 1e-2),
        # Never further than ten times from the published rate.
        ((3.0, 3.5, 4.0), 1e-3),
        ((3.0, 2.0, 1.0, 0.5, 0.2), 1e-1),
    ],
)
def test_the_centre_is_half_the_last_rate_that_the_loss_could_bear(losses, held):
    points = [
        RangePoint(rate, 0.0, loss) for rate, loss in zip(rising_rates(1e-4, 1, 5), losses, strict=False)
    ]
    assert centre(points, published=5e-3) == pytest.approx(held / 2)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_classifiers_rate_is_found_with_its_heads_own(tmp_path, monkeypatch, task):
    rows = pair_rows(69)
    if task == "regression":
        rows = [row | {"label": float(row["label"] == "good")} for row in rows]
    values = {
        "task": task,
        "name": "labels",
        "output_dir": str(tmp_path / "runs"),
        "model.path": str(make_checkpoint("bert", tmp_path / "bert")),
        "adapter.rank": 4,
        "adapter.target_modules": KINDS["bert"][1],
        "data.train": str(write_rows(tmp_path / "train.jsonl", rows)),
        "data.validation": 21,
        "training.max_steps": 60,
        "training.global_batch_size": 8,
        "training.learning_rate": "auto",
        "training.lr_multiplier.head": 0.5,
    }
    taken, step = [], loop.optimizer_step

    def seen(job, rows, rate, stop):
        result = step(job, rows, rate, stop)
        taken.append([group["lr"] / rate for group in job.optimizer.param_groups])
        return result

    for module in (loop, range_test):
        monkeypatch.setattr(module, "optimizer_step", seen)
    recipe = Recipe.from_flat(values)
    directory, found = tune(recipe)
    # A hundredth of what LoRA's authors take and up; half of it for the head, in every part.
    assert found.range_test[0].rate == pytest.approx(2.5e-6) and found.steps == 12
    assert found.rates[0] <= found.rate <= found.rates[-1] and None not in found.losses
    assert np.allclose(taken, [[1, 1, 1, 0.5, 0.5]]) and len(taken) > 4 * 12
    copied = load_recipe(directory.recipe_path)
    assert copied.training.learning_rate == found.rate and copied.training.lr_multiplier.head == 0.5
    runs = [RunDirectory(run) for run in sorted(directory.arms_dir.glob("[!.]*"))]
    metric = {"classification": "eval_accuracy", "regression": "eval_pearson"}[task]
    assert len(runs) == len(found.rates) and metric in runs[0].metrics_path.read_text()
