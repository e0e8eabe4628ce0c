"""`linchain tune` on the tiny Llama: what it tries and writes, how it goes on, and what it refuses."""

from __future__ import annotations

import json

import pytest

from linchain_cli.cli import main
from linchain_cli.comparison import tuning
from linchain_cli.comparison.tuning import (
    TuningDirectory,
    best_rate,
    centre,
    place_of,
    rate_at,
    refined_rate,
    tune,
)
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.recipe import Recipe, load_recipe
from linchain_cli.run import RunDirectory
from linchain_cli.training import loop
from linchain_cli.training.range_test import RangePoint, rising_rates

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


def test_what_was_tuned_is_kept_with_a_number(tuned):
    """So that it can be read again whatever the task: a classifier's recipe cannot say `auto`."""
    assert Recipe.model_validate(tuned[2].recipe).training.learning_rate == 3e-4


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
        return step(job, rows, rate, stop)._replace(signum=15 if len(steps) == 20 else 0)

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
        (["training.optimizer=adamw_8bit"], "training.optimizer: adamw_8bit is no longer there"),
        (["adapter.depht=1"], "Did you mean 'depth'?"),
    ],
)
def test_wrong_input_is_one_message(recipe_path, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["tune", str(recipe_path), *words])
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and "Traceback" not in shown


def test_what_it_shows(tuned, capsys):
    path, directory, found = tuned
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            main(["tune", str(path), *WORDS, *words])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        if words:
            assert json.loads(shown)["rate"] == found.rate
        else:
            assert f"learning rate: {found.rate:g}" in shown and str(directory.curve_path) in shown
            assert f"training.learning_rate={found.rate:g}" in shown


def test_rates_come_from_a_series_of_half_decades():
    assert [rate_at(place) for place in range(-8, -2)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert [place_of(rate) for rate in (1e-4, 3e-4, 5e-4, 1e-3, 2e-3)] == [-8, -7, -7, -6, -5]
    assert rising_rates(1e-5, 1e-1, 5) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])


def test_the_rate_lies_at_the_parabolas_lowest_point():
    rates = (1e-3, 3e-3, 1e-2)
    assert refined_rate(list(zip(rates, (2.0, 1.0, 2.0), strict=True))) == pytest.approx(3e-3, rel=0.1)
    assert 1.5e-3 < refined_rate(list(zip(rates, (1.1, 1.0, 2.0), strict=True))) < 3e-3
    assert 3e-3 < refined_rate(list(zip(rates, (2.0, 1.0, 1.1), strict=True))) < 6e-3
    # Of an end nothing is known beyond it; equal losses have no lowest point.
    assert refined_rate(list(zip(rates, (1.0, 2.0, 3.0), strict=True))) == 1e-3
    assert refined_rate([(1e-3, 1.0), (3e-3, 1.0), (1e-2, 1.0)]) == best_rate([(1e-3, 1.0), (3e-3, 1.0)])


@pytest.mark.parametrize(
    ("losses", "turned"),
    [
        ((3.0, 2.5, 1.0, 5.0, 9.0), 1e-2),
        # What comes after nearly all was learnt, a little lower by chance, says no more.
        ((3.0, 1.1, 1.3, 1.0, 9.0), 1e-3),
        # Nothing was learnt, so that all it could say is noise: twice the published rate, halved.
        ((3.0, 2.99, 3.01, 4.0, 9.0), 6e-3),
        ((3.0, 4.0, 5.0, 6.0, 9.0), 6e-3),
    ],
)
def test_the_centre_is_half_the_rate_where_the_loss_had_nearly_turned(losses, turned):
    points = [
        RangePoint(rate, 0.0, loss) for rate, loss in zip(rising_rates(1e-4, 1, 5), losses, strict=True)
    ]
    assert centre(points, published=3e-3) == pytest.approx(turned / 2)
