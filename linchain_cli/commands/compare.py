"""linchain compare"""

from __future__ import annotations

from typing import Annotated

import typer

from linchain_cli.commands.options import RecipePath, not_available


def run(
    recipe: RecipePath,
    variations: Annotated[
        list[str],
        typer.Argument(
            metavar="key=value,value", help="What to vary, such as adapter.depth=0,1,3.", show_default=False
        ),
    ],
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, such as 1,2,3; left out, the recipe's.", show_default=False)
    ] = None,
) -> None:
    """Train combinations of values and compare them."""
    raise not_available("compare")
