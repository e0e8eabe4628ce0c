"""Tables from made-up measurements: references, pairing, verdicts, best rates."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from linchain_cli.comparison.definition import Definition, read_definition
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.measure import Measurement, Point
from linchain_cli.comparison.results import collect, lines, notes, write
from linchain_cli.comparison.tables import at_best_rate, at_recipe_rate, candidates
from linchain_cli.report.wording import difference, reached, table_cells, table_titles
from linchain_cli.run import ComparisonDirectory


def measurement(
    arm: str,
    seed: int,
    final: float,
    start: float = 3.0,
    status: str = "finished",
    halves: tuple[float, float] | None = None,
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
        halves=halves,
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


def equal_arms(recipe_path, rates: str = "3e-3") -> Definition:
    """A LoRA and seven others, with three seeds, at each of the rates."""
    words = ["adapter.depth=0,1,2,3,4,5,6,7", f"training.learning_rate={rates}"]
    grid = expand(recipe_path, words)
    definition = Definition(grid.base, False)
    definition.add(grid.arms, [1, 2, 3])
    return definition


def words_of(rows) -> set[str]:
    return {row["difference"]["validation_loss"]["verdict"] for row in rows}


def test_equal_arms_are_called_different_in_one_of_twenty_comparisons_at_most(recipe_path):
    """The seed moves all arms together, and each a little by itself; no arm is better than another."""
    arms, draw = candidates(equal_arms(recipe_path), []), random.Random(3)
    called = alone = 0
    for _ in range(1000):
        seeds = {seed: draw.gauss(1.0, 0.1) for seed in (1, 2, 3)}
        found = [
            replace(
                one,
                runs={s: measurement(one.arm.name, s, seeds[s] + draw.gauss(0, 0.01)) for s in seeds},
            )
            for one in arms
        ]
        words = words_of(at_recipe_rate(found, 3e-3))
        called += bool(words & {"lower", "higher"})
        alone += bool(words & {"lower", "higher", "may be chance"})
    assert called / 1000 <= 0.05
    assert alone / 1000 > 0.15  # what each arm for itself would have led to


def test_equal_arms_at_their_best_rates_are_no_more_often_called_different(recipe_path):
    """Every arm has the same rates, among which noise alone chooses: what of it belongs to the rows shows in
    one half, what belongs to the run in both."""
    arms, draw = candidates(equal_arms(recipe_path, "3e-3,1e-2"), []), random.Random(4)
    called = 0
    for _ in range(500):
        found = []
        for one in arms:
            runs = {}
            for seed in (1, 2, 3):
                run = 1.0 + draw.gauss(0, 0.01)
                halves = run + draw.gauss(0, 0.01), run + draw.gauss(0, 0.01)
                runs[seed] = measurement(one.arm.name, seed, sum(halves) / 2, halves=halves)
            found.append(replace(one, runs=runs))
        called += bool(words_of(at_best_rate(found)) & {"lower", "higher"})
    assert called / 500 <= 0.05


def test_a_clear_difference_is_called_among_many(recipe_path):
    definition = equal_arms(recipe_path)
    losses = {arm.name: (1.0, 1.01, 0.99) for arm in definition.arms}
    losses["depth-3-kaiming"] = (0.8, 0.811, 0.789)  # always about 0.2 lower
    losses["depth-2-kaiming"] = (0.88, 0.92, 0.9)  # 0.1 ± 0.01, clear only if it stood alone
    found = [
        measurement(name, seed, loss)
        for name, one in losses.items()
        for seed, loss in zip((1, 2, 3), one, strict=True)
    ]
    rows = by_label(at_recipe_rate(candidates(definition, found), 3e-3))
    clear, unclear = (rows[f"depth {n}, kaiming"]["difference"]["validation_loss"] for n in (3, 2))
    assert (clear["verdict"], unclear["verdict"]) == ("lower", "may be chance")
    for one in (clear, unclear):
        low, high = one["interval"]
        assert not low <= 0 <= high
        assert (abs(one["mean"]) >= one["smallest_telling"]) is (one is clear)
    cells = {line["arm"]: line for line in table_cells(list(rows.values()), rates=False)}
    telling = float(cells["depth 2, kaiming"]["smallest telling difference"])
    assert telling == pytest.approx(unclear["smallest_telling"], abs=1e-4)


def test_a_rate_is_chosen_on_one_half_and_reported_on_the_other(recipe_path):
    grid = expand(recipe_path, ["adapter.depth=0,3", "training.learning_rate=3e-3,1e-2"])
    definition = Definition(grid.base, False)
    definition.add(grid.arms, [1])
    halves = {
        "depth-0": (1.0, 1.5),
        "depth-0_learning_rate-0.01": (1.2, 0.5),  # better over all rows, and not on the first half
        "depth-3-kaiming": (0.9, 1.4),
        "depth-3-kaiming_learning_rate-0.01": (0.8, 1.6),
    }
    found = [measurement(name, 1, sum(each) / 2, halves=each) for name, each in halves.items()]
    rows = by_label(at_best_rate(candidates(definition, found)))
    assert (rows["LoRA"]["learning_rate"], rows["LoRA"]["validation_loss"]["mean"]) == (3e-3, 1.5)
    chain = rows["depth 3, kaiming"]
    assert (chain["learning_rate"], chain["validation_loss"]["mean"]) == (0.01, 1.6)
    assert chain["difference"]["validation_loss"]["mean"] == pytest.approx(0.1)
    text = "\n".join(notes(definition, found, candidates(definition, found)))
    assert "chosen by the loss on one half" in text and "too good" not in text
    # One run of which the halves are not known: all rates are chosen by the loss on all rows.
    found[0] = measurement("depth-0", 1, 1.25)
    rows = by_label(at_best_rate(candidates(definition, found)))
    assert rows["LoRA"]["validation_loss"]["mean"] == pytest.approx(0.85)


@pytest.mark.parametrize(("alpha", "rank", "chosen"), [(8, 12, 10), (32, 16, 15), (1, 3, 7), (0.1, 49, 47)])
def test_with_equal_parameters_an_arm_finds_the_lora_of_its_scale(recipe_path, tmp_path, alpha, rank, chosen):
    """alpha · r' / r / r' is not alpha / r in floating point, for one pair in ten."""
    grid = expand(recipe_path, ["adapter.depth=0,3", f"adapter.alpha={alpha},77", f"adapter.rank={rank}"])
    arms = [
        replace(arm, recipe=with_rank(arm.recipe, chosen)) if arm.recipe.adapter.depth else arm
        for arm in grid.arms
    ]
    definition = Definition(grid.base, True)
    definition.add(arms, [1])
    directory = ComparisonDirectory(tmp_path / "tiny")
    definition.write(directory)
    found = [measurement(arm.name, 1, 1.0) for arm in arms]
    for kept in (definition, read_definition(directory)):
        rows = at_recipe_rate(candidates(kept, found), 3e-3)
        own = {row["arm"]: row["reference"] for row in rows}
        arms_found = candidates(kept, found)
        loras = {one.arm.alpha: one.label for one in arms_found if one.recipe.adapter.depth == 0}
        for arm in arms:
            assert own[arm.name] == loras[arm.alpha]


def with_rank(recipe, rank: int):
    """The recipe as --equal-parameters changes it."""
    adapter = recipe.adapter
    changed = adapter.model_copy(update={"rank": rank, "alpha": adapter.alpha * rank / adapter.rank})
    return recipe.model_copy(update={"adapter": changed})


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


def test_what_was_not_measured_has_no_column(compared):
    arms, rate = compared(["adapter.depth=0,3"], {"depth-0": {1: 1.0}, "depth-3-kaiming": {1: 0.5}})
    rows = [row | {"area": None} for row in at_recipe_rate(arms, rate)]
    (columns,) = {tuple(line) for line in table_cells(rows, rates=False)}
    assert any(name.startswith("difference to LoRA") for name in columns)
    assert not [name for name in columns if "area" in name or "accurac" in name]


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
    assert "There is one arm" not in text
    definition = Definition(grid.base, False)
    definition.add(grid.arms[:1], [1])
    text = "\n".join(notes(definition, found[:1], candidates(definition, found[:1])))
    assert "There is one arm, and nothing to compare it with" in text


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
