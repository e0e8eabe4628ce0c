"""Arms with the same number of trained parameters: the rank that comes closest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from linchain_cli.chain import MatrixShape, carriers, match_modules, parameter_count
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.config import empty_model, text_decoder_prefix
from linchain_cli.recipe import Recipe


def closest_rank(shapes: Sequence[MatrixShape], depth: int, wanted: int) -> int:
    """The rank at which chains have nearest to `wanted` parameters; of two equally near, the lower one."""
    rank = 1
    while parameter_count(shapes, rank + 1, depth) <= wanted:
        rank += 1
    below, above = (abs(parameter_count(shapes, r, depth) - wanted) for r in (rank, rank + 1))
    return rank if below <= above else rank + 1


def with_equal_parameters(recipes: Sequence[Recipe], base: Recipe, directory: Path) -> list[Recipe]:
    """The recipes with ranks at which each trains about as many parameters as LoRA at the base recipe's rank.

    alpha changes with the rank so that alpha / rank, the chain's scale, stays what the recipe says.

    Args:
        directory: the base model's checkpoint; only its configuration is read.
    """
    model = empty_model(directory, Outputs.unknown(base.task))
    prefix = text_decoder_prefix(model)
    shape_at = carriers(dict(model.named_modules()))

    def shapes(recipe: Recipe) -> list[MatrixShape]:
        paths = match_modules(model, recipe.adapter.target_modules, prefix).paths
        return [shape_at[path] for path in paths]

    wanted = parameter_count(shapes(base), base.adapter.rank, 0)
    adjusted = []
    for recipe in recipes:
        adapter = recipe.adapter
        rank = closest_rank(shapes(recipe), adapter.depth, wanted)
        changed = adapter.model_copy(update={"rank": rank, "alpha": adapter.alpha * rank / adapter.rank})
        adjusted.append(recipe.model_copy(update={"adapter": changed}))
    return adjusted
