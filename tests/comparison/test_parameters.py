"""Ranks at which arms train as many parameters."""

from __future__ import annotations

import pytest

from linchain_cli.chain import ChainConfig, inject, parameter_count
from linchain_cli.comparison.grid import expand
from linchain_cli.comparison.parameters import closest_rank, with_equal_parameters
from linchain_cli.model.loading import load_model

SHAPES = [(576, 576), (576, 192), (1536, 576)]


@pytest.mark.parametrize("depth", [0, 1, 3, 8])
@pytest.mark.parametrize("rank", [1, 4, 16, 64])
def test_no_other_rank_comes_closer(depth, rank):
    wanted = parameter_count(SHAPES, rank, 0)
    found = closest_rank(SHAPES, depth, wanted)
    gaps = {r: abs(parameter_count(SHAPES, r, depth) - wanted) for r in range(1, 100)}
    assert gaps[found] == min(gaps.values())
    assert depth or found == rank


def test_the_count_is_what_a_model_trains(tiny_llama_dir):
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    layers = inject(model, ChainConfig(rank=4, depth=3, target_modules=["q_proj", "k_proj", "down_proj"]))
    shapes = [(layer.A.shape[1], layer.B.shape[0]) for layer in layers.values()]
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count == parameter_count(shapes, 4, 3)


def test_arms_get_ranks_and_keep_their_scale(recipe_path, tiny_llama_dir):
    grid = expand(recipe_path, ["adapter.depth=0,1,8", "adapter.rank=16"])
    recipes = with_equal_parameters([arm.recipe for arm in grid.arms], grid.base, tiny_llama_dir)
    adapters = [recipe.adapter for recipe in recipes]
    assert [adapter.depth for adapter in adapters] == [0, 1, 8]
    assert adapters[0].rank == 16 > adapters[1].rank > adapters[2].rank
    assert all(adapter.alpha / adapter.rank == pytest.approx(8 / 16) for adapter in adapters)
    assert [recipe.training for recipe in recipes] == [grid.base.training] * 3
