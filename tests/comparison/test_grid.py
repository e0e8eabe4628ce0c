"""Which arms a command line makes: their values, names and labels, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from linchain_cli.comparison.grid import Grid, arm_name, expand, identity, labels, split_values
from linchain_cli.errors import InputError
from linchain_cli.recipe import load_recipe


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,3", ["0", "1", "3"]),
        ("16", ["16"]),
        ("", [""]),
        ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("{A: 1, links: 2},{A: 3}", ["{A: 1, links: 2}", "{A: 3}"]),
        (r".*layers\.(1|2,3)\.q,all-linear", [r".*layers\.(1|2,3)\.q", "all-linear"]),
        ("[a, ']'],b", ["[a, ']']", "b"]),
        ("it's,one", ["it's", "one"]),
        ("[[1,2],3],4", ["[[1,2],3]", "4"]),
    ],
)
def test_commas_within_brackets_and_quotes_part_nothing(text, values):
    assert split_values(text) == values


def names(grid: Grid) -> list[str]:
    return [arm.name for arm in grid.arms]


def test_every_combination_once(recipe_path):
    grid = expand(
        recipe_path,
        ["adapter.depth=0,1,3", "adapter.init=orthogonal,kaiming", "training.learning_rate=3e-3,1e-2"],
    )
    # The scheme of links means nothing at depth 0: 12 combinations are 10 arms.
    assert len(grid.arms) == 10
    assert len({arm.identity for arm in grid.arms}) == len(set(names(grid))) == 10
    assert names(grid)[:3] == ["depth-0", "depth-0_learning_rate-0.01", "depth-1-orthogonal"]
    assert [arm.recipe.adapter.depth for arm in grid.arms] == [0, 0] + [1] * 4 + [3] * 4
    assert {arm.recipe.training.learning_rate for arm in grid.arms} == {3e-3, 1e-2}
    assert all(arm.recipe.data == grid.base.data and arm.recipe.seed == grid.base.seed for arm in grid.arms)


def test_one_value_changes_all_arms_and_the_base(recipe_path):
    grid = expand(
        recipe_path, ["adapter.depth=0,3", "training.max_steps=4", "adapter.target_modules=[q_proj,v_proj]"]
    )
    assert grid.base.training.max_steps == 4
    assert {tuple(arm.recipe.adapter.target_modules) for arm in grid.arms} == {("q_proj", "v_proj")}
    assert grid.words == ("adapter.depth=0,3",)


def test_a_key_can_be_changed_and_varied(recipe_path):
    grid = expand(recipe_path, ["adapter.init=orthogonal", "adapter.init=identity,orthogonal"])
    assert grid.base.adapter.init == "orthogonal"
    assert [arm.recipe.adapter.init for arm in grid.arms] == ["identity", "orthogonal"]


def test_a_value_that_stands_twice_is_one_arm(recipe_path):
    """So an arm can be added to a comparison whose own recipe stays as it is."""
    grid = expand(recipe_path, ["adapter.depth=1,1", "training.learning_rate=1e-2,0.01"])
    (arm,) = grid.arms
    assert (arm.recipe.adapter.depth, arm.recipe.training.learning_rate) == (1, 0.01)
    assert (grid.base.adapter.depth, grid.base.training.learning_rate) == (3, 0.003)


def test_lists_and_sections_are_values(recipe_path):
    grid = expand(recipe_path, ["adapter.target_modules=[q_proj,v_proj],all-linear"])
    assert [arm.recipe.adapter.target_modules for arm in grid.arms] == [["q_proj", "v_proj"], "all-linear"]
    grid = expand(recipe_path, ["adapter={depth: 0},{depth: 3, init: kaiming},{depth: 3, init: orthogonal}"])
    assert [arm.recipe.adapter.depth for arm in grid.arms] == [0, 3, 3]


def test_a_multiplier_of_links_means_nothing_without_links(recipe_path):
    grid = expand(recipe_path, ["adapter.depth=0,3", "training.lr_multiplier.links=1,10"])
    assert names(grid) == ["depth-0", "depth-3-kaiming", "depth-3-kaiming_lr_multiplier.links-10"]
    assert labels([arm.recipe for arm in grid.arms], grid.base) == [
        "LoRA",
        "depth 3, kaiming",
        "depth 3, kaiming, lr_multiplier.links 10",
    ]


def test_names_do_not_depend_on_the_other_arms(recipe_path):
    wide = expand(recipe_path, ["adapter.depth=0,1,3", "adapter.init=orthogonal,kaiming"])
    narrow = expand(recipe_path, ["adapter.depth=0,3"])
    assert set(names(narrow)) < set(names(wide))


def test_labels_leave_the_learning_rate_to_its_column(recipe_path):
    grid = expand(recipe_path, ["adapter.depth=0,1,3", "training.learning_rate=1e-3,3e-3"])
    found = labels([arm.recipe for arm in grid.arms], grid.base)
    assert found == ["LoRA"] * 2 + ["MoSLoRA, kaiming"] * 2 + ["depth 3, kaiming"] * 2


def test_long_values_make_short_and_distinct_names(recipe_path):
    long = [f".*({'|'.join(f'layers_{i}' for i in range(40))}).{end}" for end in ("q_proj", "v_proj")]
    grid = expand(recipe_path, [f"adapter.target_modules={','.join(long)}"])
    assert len(set(names(grid))) == 2 and all(len(name) < 200 for name in names(grid))
    for arm in grid.arms:  # each is a run's name as the recipe wants it
        load_recipe(recipe_path, [f"name={arm.name}_seed-1"])


def test_identity_follows_what_matters_alone(recipe_path):
    base = load_recipe(recipe_path)
    same = load_recipe(recipe_path, ["name=other", "seed=7", "training.save_every=3", "evaluation.limit=5"])
    other = load_recipe(recipe_path, ["training.warmup_steps=2"])
    assert identity(base) == identity(same) != identity(other)
    flat0 = [
        load_recipe(recipe_path, ["adapter.depth=0", f"adapter.init={init}"])
        for init in ("identity", "kaiming")
    ]
    assert identity(flat0[0]) == identity(flat0[1])
    assert arm_name(flat0[0], base) == "depth-0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is varied"),
        (["adapter.depth=3"], "nothing is varied"),
        (["adapter.depth=0,"], "a value is missing"),
        (["adapter.depth=0,,3"], "a value is missing"),
        (["adapter.depth=0,1", "adapter.depth=2,3"], "varied twice"),
        (["adapter.dept=0,1"], "Did you mean"),
        (["adapter.depth=0,x"], "adapter.depth"),
        (["seed=1,2"], "--seeds"),
        (["data.train_on_inputs=true,false"], "data.train_on_inputs cannot be varied"),
        (["training.max_steps=2,4"], "training.max_steps cannot be varied"),
        (["model.path=a,b"], "model.path cannot be varied"),
        (["training={max_steps: 6},{max_steps: 9}"], "cannot be varied"),
        (["adapter.depth=0,1", "data.validation=0", "training.keep=last"], "data.validation is 0"),
        (["adapter.depth=0,1", "training.early_stopping=2"], "early_stopping"),
    ],
)
def test_what_is_refused(recipe_path, words, message):
    with pytest.raises(InputError) as error:
        expand(recipe_path, words)
    assert message in str(error.value)


def test_the_recipe_of_an_arm_can_be_written_and_read(recipe_path, tmp_path):
    arm = expand(recipe_path, ["training.learning_rate=1e-3,3e-3"]).arms[0]
    path = tmp_path / "arm.yaml"
    path.write_text(arm.recipe.to_yaml())
    assert load_recipe(path) == arm.recipe
    assert yaml.safe_load(path.read_text())["training"]["learning_rate"] == 1e-3
