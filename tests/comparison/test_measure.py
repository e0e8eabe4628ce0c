"""What is read from a run directory: curves, areas, tokens to a loss, speed, memory, accuracy."""

from __future__ import annotations

import json

import pytest

from linchain_cli.comparison.definition import arm_recipe
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.measure import Measurement, Point, measure
from linchain_cli.recipe.schema import EvaluationConfig
from linchain_cli.run import ComparisonDirectory, RunDirectory, jsonl_bytes


def curve(*losses: float) -> Measurement:
    points = tuple(Point(10 * i, 100.0 * i, loss) for i, loss in enumerate(losses, 1))
    return Measurement("arm", 1, "arms/arm_seed-1", "finished", validation=points)


def test_area_is_the_mean_loss_on_the_way():
    assert curve(2.0, 2.0, 2.0).area == pytest.approx(2.0)
    assert curve(3.0, 1.0, 1.0).area == pytest.approx(1.5)
    uneven = Measurement(
        "arm", 1, "", "finished", validation=(Point(1, 0, 4.0), Point(2, 100, 2.0), Point(3, 400, 2.0))
    )
    assert uneven.area == pytest.approx((100 * 3 + 300 * 2) / 400)
    assert curve(2.0).area is None


def test_tokens_to_a_loss_lie_on_the_line_between_validations():
    one = curve(3.0, 2.0, 1.0)
    assert one.tokens_to_reach(1.5) == pytest.approx(250)
    assert one.tokens_to_reach(1.0) == pytest.approx(300)
    assert one.tokens_to_reach(3.5) == 100  # at the first validation or before
    assert one.tokens_to_reach(0.9) is None
    # The first time counts, though the loss rises again.
    assert curve(3.0, 1.0, 2.0).tokens_to_reach(2.0) == pytest.approx(150)


def test_the_final_loss_is_the_last_one_not_the_best():
    assert curve(3.0, 1.0, 2.0).final_loss == 2.0


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run whose training rows are logged every second step and which is validated every third."""
    found = RunDirectory(tmp_path / "run")
    found.path.mkdir()
    found.update_status(
        status="finished", trainable_parameters=12, tokens_per_second=50.0, hashes={"data": "a", "base": "b"}
    )
    rows = [{"step": 3, "eval_loss": 2.0}, {"step": 6, "eval_loss": 1.0}]
    for step, seconds in ((2, 1.0), (4, 5.0), (6, 2.0)):
        rows.append(
            {
                "step": step,
                "loss": 3.0 - step / 6,
                "tokens": 10 * step,
                "step_seconds": seconds,
                "peak_memory_bytes": 7 + step,
            }
        )
    found.metrics_path.write_bytes(jsonl_bytes(rows))
    return found


def test_a_run_is_read(run):
    found = measure(run, "arm", 3, "arms/arm_seed-3", EvaluationConfig())
    assert found.finished and found.final_loss == 1.0
    # Step 3 was not logged itself: its tokens lie between those of steps 2 and 4.
    assert found.validation == (Point(3, 30.0, 2.0), Point(6, 60.0, 1.0))
    assert [step for step, _ in found.training] == [2, 4, 6]
    assert found.step_seconds == 2.0  # the median
    assert found.peak_memory_bytes == 13
    assert (found.trainable_parameters, found.tokens_per_second) == (12, 50.0)
    assert found.accuracy is None


def test_accuracies_are_those_of_the_protocol(run):
    run.eval_dir.mkdir()
    tasks = {"boolq": {"accuracy": 0.5}, "piqa": {"accuracy": 0.7}}
    (run.eval_dir / "likelihood.json").write_text(json.dumps({"protocol": "likelihood", "tasks": tasks}))
    found = measure(run, "arm", 3, "", EvaluationConfig())
    assert found.accuracy == pytest.approx(0.6)
    assert measure(run, "arm", 3, "", EvaluationConfig(protocol="generate")).accuracy is None


def test_accuracies_of_an_earlier_adapter_do_not_stand_beside_the_last_ones_loss(recipe_path, tmp_path):
    """No arm keeps one, whatever the recipe says."""
    (arm, _) = expand(recipe_path, ["training.keep=best", "adapter.depth=0,1"]).arms
    assert arm.recipe.training.keep == "best"
    assert arm_recipe(arm, 1, ComparisonDirectory(tmp_path)).training.keep == "last"


def test_a_peak_of_the_whole_process_is_not_the_arms(run):
    run.update_status(own_peak_memory=False)
    assert measure(run, "arm", 3, "", EvaluationConfig()).peak_memory_bytes is None


def test_what_has_not_finished_is_not_measured_as_if_it_had(run, tmp_path):
    run.update_status(status="failed", reason="the loss is nan")
    found = measure(run, "arm", 3, "", EvaluationConfig())
    assert not found.finished and found.reason == "the loss is nan"
    missing = measure(RunDirectory(tmp_path / "nothing"), "arm", 3, "", EvaluationConfig())
    assert missing.status == "missing" and not missing.finished
