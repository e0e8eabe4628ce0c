"""linchain train"""

from __future__ import annotations

from typing import Annotated

import typer

from linchain_cli.commands.options import Overrides, RecipePath, not_available
from linchain_cli.errors import InputError


def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run from its newest checkpoint.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace an existing run directory.")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Number of processes; left out, one per visible GPU.", show_default=False)
    ] = None,
) -> None:
    """Fine-tune a model as a recipe says."""
    if resume and fresh:
        raise InputError("--resume continues the run and --fresh replaces it: give one of them.")
    raise not_available("train")
