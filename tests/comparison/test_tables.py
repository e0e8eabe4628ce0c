"""Tables from made-up measurements: references, pairing, verdicts, best rates."""

from __future__ import annotations

import math

import pytest

from linchain_cli.comparison.definition import Definition
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.measure import Measurement, Point
from linchain_cli.comparison.results import collect, lines, notes, write
from linchain_cli.comparison.tables import at_best_rate, at_recipe_rate, candidates
from linchain_cli.report.wording import difference, reached, table_cells, table_titles
from linchain_cli.run import ComparisonDirectory


def measurement(
    arm: str, seed: int, final: float, start: float = 3.0, status: str = "finished"
) -> Measurement:
    points = (Point(2, 100.0, start), Point(4, 200.0, final))
    return Measurement(
        arm,
        seed,
        f"arms/{arm}_seed-{seed}",
        status,
        validation=points,
        trainable_parameters=100,
        step_seconds=0.5,
    )


@pytest.fixture
def compared(recipe_path):
    """`compared(words, {arm name: losses by seed})` -> the candidates and the recipe's rate."""

    def make(words, losses):
        grid = expand(recipe_path, words)
        assert {arm.name for arm in grid.arms} >= set(losses), [arm.name for arm in grid.arms]
        definition = Definition(grid.base, False)
        definition.add(grid.arms, sorted({seed for one in losses.values() for seed in one}))
        found = [measurement(name, seed, loss) for name, one in losses.items() for seed, loss in one.items()]
        return candidates(definition, found), grid.base.training.learning_rate

    return make


def by_label(rows):
    return {row["label"]: row for row in rows}


def test_differences_are_paired_by_seed(compared):
    # The seeds lie far apart and the arms always 0.1: only pairing sees it.
    lora, chain = {1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.9, 2: 1.9, 3: 2.9 + 0.001}
    arms, rate = compared(["adapter.depth=0,3"], {"depth-0": lora, "depth-3-kaiming": chain})
    row = by_label(at_recipe_rate(arms, rate))["depth 3, kaiming"]
    found = row["difference"]["validation_loss"]
    assert found["mean"] == pytest.approx(-0.1 + 0.001 / 3)
    half = 4.302652729911275 * found["sd"] / math.sqrt(3)
    assert found["interval"] == pytest.approx([found["mean"] - half, found["mean"] + half])
    assert found["verdict"] == "lower"
    assert row["validation_loss"]["sd"] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.01, -0.01, 0.002), "within the spread"),
        ((0.10, 0.11, 0.09), "higher"),
        ((-0.10, -0.11, -0.09), "lower"),
        ((-0.1, -0.2, -0.001), "within the spread"),  # all lower, and too uneven to tell
        ((-0.1,), "one seed, no spread"),
        ((0.0, 0.0, 0.0), "within the spread"),
    ],
)
def test_a_difference_is_called_what_it_is(compared, differences, verdict):
    lora = {seed: 1.0 for seed, _ in enumerate(differences)}
    chain = {seed: 1.0 + value for seed, value in enumerate(differences)}
    arms, rate = compared(["adapter.depth=0,3"], {"depth-0": lora, "depth-3-kaiming": chain})
    rows = by_label(at_recipe_rate(arms, rate))
    assert rows["depth 3, kaiming"]["difference"]["validation_loss"]["verdict"] == verdict
    assert rows["LoRA"]["difference"]["validation_loss"] == {"verdict": "reference"}
    assert verdict in difference(rows["depth 3, kaiming"]["difference"]["validation_loss"])


def test_only_seeds_that_both_have_are_paired(compared):
    arms, rate = compared(
        ["adapter.depth=0,3"], {"depth-0": {1: 1.0, 2: 1.0}, "depth-3-kaiming": {2: 0.5, 3: 0.0}}
    )
    found = by_label(at_recipe_rate(arms, rate))["depth 3, kaiming"]["difference"]["validation_loss"]
    assert (found["n"], found["mean"]) == (1, -0.5)


def test_the_reference_is_the_lora_that_is_like_the_arm(compared):
    names = ["depth-0_rank-8", "depth-0", "depth-3-kaiming_rank-8", "depth-3-kaiming"]
    arms, rate = compared(["adapter.rank=8,4", "adapter.depth=0,3"], {name: {1: 1.0} for name in names})
    rows = by_label(at_recipe_rate(arms, rate))
    assert rows["depth 3, kaiming, rank 8"]["reference"] == "LoRA, rank 8"
    assert rows["depth 3, kaiming"]["reference"] == "LoRA"
    shown = table_cells(list(rows.values()), rates=False)
    assert shown[0]["reference"] == "LoRA, rank 8"  # two references: each line names its own


def test_without_lora_the_first_arm_is_the_reference(compared):
    arms, rate = compared(["adapter.depth=1,3"], {"depth-1-kaiming": {1: 1.0}, "depth-3-kaiming": {1: 0.5}})
    rows = at_recipe_rate(arms, rate)
    assert {row["reference"] for row in rows} == {"MoSLoRA, kaiming"}


def test_the_two_tables_are_kept_apart(compared):
    losses = {
        "depth-0": {1: 1.0, 2: 1.1},
        "depth-0_learning_rate-0.01": {1: 0.8, 2: 0.9},
        "depth-0_learning_rate-0.1": {1: 2.0, 2: 2.0},
        "depth-3-kaiming": {1: 0.9, 2: 1.0},
        "depth-3-kaiming_learning_rate-0.01": {1: 0.95, 2: 0.95},
        "depth-3-kaiming_learning_rate-0.1": {1: 0.7, 2: 0.7},
    }
    arms, rate = compared(["adapter.depth=0,3", "training.learning_rate=3e-3,1e-2,1e-1"], losses)
    at_recipe, best = by_label(at_recipe_rate(arms, rate)), by_label(at_best_rate(arms))
    assert {row["learning_rate"] for row in at_recipe.values()} == {rate}
    assert at_recipe["depth 3, kaiming"]["difference"]["validation_loss"]["mean"] == pytest.approx(-0.1)
    assert (best["LoRA"]["learning_rate"], best["LoRA"]["edge"]) == (0.01, False)
    assert (best["depth 3, kaiming"]["learning_rate"], best["depth 3, kaiming"]["edge"]) == (0.1, True)
    assert best["depth 3, kaiming"]["difference"]["validation_loss"]["mean"] == pytest.approx(-0.15)


def test_a_rate_with_fewer_finished_seeds_is_no_best_rate(compared):
    losses = {
        "depth-0": {1: 1.0, 2: 1.1},
        "depth-0_learning_rate-0.01": {1: 0.1},
        "depth-3-kaiming": {1: 1.0, 2: 1.0},
    }
    arms, _ = compared(["adapter.depth=0,3", "training.learning_rate=3e-3,1e-2"], losses)
    assert by_label(at_best_rate(arms))["LoRA"]["learning_rate"] == 3e-3


def test_arms_that_were_added_from_elsewhere_are_still_the_same_arms(recipe_path):
    """A comparison that was moved, or continued with other tasks: nothing that its losses depend on."""
    definition = Definition(expand(recipe_path, ["adapter.depth=0,3"]).base, False)
    for words in (
        ["adapter.depth=0,3", "output_dir=elsewhere"],
        ["adapter.depth=0,3", "training.learning_rate=3e-3,1e-2", "evaluation.limit=7"],
    ):
        definition.add(expand(recipe_path, words).arms, [1])
    losses = {"depth-0": 1.0, "depth-3-kaiming": 0.9}
    found = [measurement(name, 1, loss) for name, loss in losses.items()]
    found += [measurement(f"{name}_learning_rate-0.01", 1, loss / 2) for name, loss in losses.items()]
    rows = at_best_rate(candidates(definition, found))
    assert [(row["label"], row["learning_rate"]) for row in rows] == [
        ("LoRA", 0.01),
        ("depth 3, kaiming", 0.01),
    ]
    assert all(row["rates_tried"] == 2 for row in rows)


def test_tokens_to_the_reference(compared):
    lora, chain = {1: 2.0, 2: 2.0}, {1: 1.0, 2: 2.5}
    arms, rate = compared(["adapter.depth=0,3"], {"depth-0": lora, "depth-3-kaiming": chain})
    rows = by_label(at_recipe_rate(arms, rate))
    assert rows["depth 3, kaiming"]["tokens_to_reference"] == {"mean": 150.0, "reached": 1, "of": 2}
    assert reached(rows["depth 3, kaiming"]["tokens_to_reference"]) == "150 (1 of 2 seeds)"
    assert reached(rows["LoRA"]["tokens_to_reference"]) == "200"
    assert reached({"mean": None, "reached": 0, "of": 2}) == "not reached"


def test_best_rates_are_no_table_when_one_rate_was_tried(compared):
    arms, rate = compared(["adapter.depth=0,3"], {"depth-0": {1: 1.0}, "depth-3-kaiming": {1: 0.5}})
    results = {
        "learning_rate": rate,
        "tables": {"recipe_rate": at_recipe_rate(arms, rate), "best_rate": at_best_rate(arms)},
        "runs": [{"learning_rate": rate}] * 2,
    }
    assert [title for title, _, _ in table_titles(results)] == ["At the recipe's learning rate (0.003)"]


def test_notes_say_what_is_missing(recipe_path):
    grid = expand(recipe_path, ["adapter.depth=0,3", "training.learning_rate=1e-2,1e-1"])
    definition = Definition(grid.base, False)
    definition.add(grid.arms, [1])
    found = [
        measurement("depth-0_learning_rate-0.01", 1, 1.0),
        measurement("depth-0_learning_rate-0.1", 1, 1.0, status="stopped"),
    ]
    text = "\n".join(notes(definition, found, candidates(definition, found)))
    assert "One seed: there is no spread" in text
    assert "No arm was trained at the recipe's learning rate 0.003" in text
    assert "a little too good" in text
    assert "Only 2 validation(s)" in text
    assert "arms/depth-0_learning_rate-0.1_seed-1: stopped" in text


def test_a_comparison_without_a_finished_run_has_no_tables(recipe_path, tmp_path):
    grid = expand(recipe_path, ["adapter.depth=0,3"])
    directory = ComparisonDirectory(tmp_path / "tiny")
    definition = Definition(grid.base, False)
    definition.add(grid.arms, [1, 2])
    definition.write(directory)
    results = collect(directory, definition)
    write(directory, results)
    assert results["tables"] == {"recipe_rate": [], "best_rate": []}
    assert len(results["runs"]) == 4 and {run["status"] for run in results["runs"]} == {"missing"}
    assert any("missing" in line for line in lines(results))
    assert directory.table_path.read_text().strip() == ""
