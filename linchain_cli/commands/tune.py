"""linchain tune"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.options import Json, Overrides, RecipePath

if TYPE_CHECKING:
    from linchain_cli.comparison.tuning import Tuning


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", "--overwrite", help="Replace an earlier tuning of this recipe.")
    ] = False,
    json: Json = False,
) -> None:
    """Find a recipe's learning rate, in about the time of one run."""
    from linchain_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from linchain_cli.comparison.tuning import tune

    directory, found = tune(loaded, fresh=fresh)
    if json:
        from dataclasses import asdict

        console.print_json({"path": str(directory.path), **asdict(found)})
        return
    print("\n".join(lines(found)))
    print(f"the curve: {directory.curve_path}; all numbers: {directory.tuning_path}")
    key = "training.learning_rate="
    others = [word for word in overrides or () if not word.startswith(key)]
    words = [str(recipe), *others, f"{key}{found.rate:g}"]
    print(f"Train with it: linchain train {shlex.join(words)}")
    print(f"Or with the copy of the recipe that has it: linchain train {directory.recipe_path}")


def lines(found: Tuning) -> list[str]:
    """The range test, thinned out, and the rates that were tried."""
    from linchain_cli.comparison.tuning import alike

    lowest = min(point.loss for point in found.range_test)
    every = max(1, len(found.range_test) // 12)
    shown = ["Range test: loss of some validation rows after a step at the rate"]
    for point in found.range_test[::every]:
        shown.append(f"  {point.rate:<9.2g}{point.loss:>9.4f}{'  lowest' if point.loss == lowest else ''}")
    shown += ["", f"Runs of {found.steps} steps: validation loss at the end"]
    for rate, loss in zip(found.rates, found.losses, strict=True):
        shown.append(f"  {rate:<9.2g}" + ("   failed" if loss is None else f"{loss:>9.4f}"))
    if alike(found.tried):
        shown += [
            "",
            f"These losses lie within 2 % of each other: in {found.steps} steps the rates can hardly be told"
            " apart. Tune a longer recipe, or take training.learning_rate=auto.",
        ]
    end = " (the end of what was tried: a better one may lie beyond)" if found.edge else ""
    return [*shown, "", f"learning rate: {found.rate:g}{end}"]
