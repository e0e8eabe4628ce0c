"""linchain compare"""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.options import Json, RecipePath
from linchain_cli.errors import InputError

MAX_SEED = 2**32 - 1


def run(
    recipe: RecipePath,
    variations: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value,value",
            help="What to vary, such as adapter.depth=0,1,3; with one value, what to change for all arms.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, such as 1,2,3; left out, the recipe's.", show_default=False)
    ] = None,
    equal_parameters: Annotated[
        bool,
        typer.Option(
            "--equal-parameters", help="Choose ranks so that all arms train as many parameters as LoRA."
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", "--overwrite", help="Replace an existing comparison and all its arms.")
    ] = False,
    json: Json = False,
) -> None:
    """Train combinations of values on the same rows and compare them."""
    chosen = parse_seeds(seeds) if seeds is not None else None
    from linchain_cli.comparison.grid import expand

    grid = expand(recipe, variations or ())
    from linchain_cli.comparison.results import lines
    from linchain_cli.comparison.runner import run_comparison
    from linchain_cli.run import ComparisonDirectory

    results = run_comparison(grid, chosen or [grid.base.seed], equal_parameters=equal_parameters, fresh=fresh)
    if json:
        console.print_json(results)
        return
    print("\n".join(lines(results, shutil.get_terminal_size((100, 24)).columns)))
    directory = ComparisonDirectory(grid.base.run_path)
    print(
        f"written: {directory.table_path}, {directory.runs_table_path}, {directory.results_path},"
        f" {directory.plot_path}"
    )
    print(f"One page of it: linchain report {directory.path}")


def parse_seeds(text: str) -> list[int]:
    """`1,2,3` as numbers, each once.

    Raises:
        InputError: one is no seed, or there is none.
    """
    seeds = []
    for word in text.split(","):
        if not (word.strip().isdecimal() and int(word) <= MAX_SEED):
            raise InputError(f"--seeds: '{word.strip()}' is no seed; expected whole numbers such as 1,2,3")
        seeds.append(int(word))
    return list(dict.fromkeys(seeds))
