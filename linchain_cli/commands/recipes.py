"""linchain recipes: the recipes that come with the tool."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from linchain_cli import console, storage
from linchain_cli.commands.options import Json
from linchain_cli.errors import InputError, did_you_mean
from linchain_cli.shipped import recipe_purposes, shipped_recipes


def list_recipes(json: Json = False) -> None:
    """List the shipped recipes."""
    purposes = dict(recipe_purposes())
    if json:
        console.print_json([{"name": name, "purpose": purpose} for name, purpose in purposes.items()])
        return
    width = max(map(len, purposes), default=0)
    for name, purpose in purposes.items():
        print(f"{name:<{width}}  {purpose}")


def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name out of `linchain recipes list`.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where it goes; left out, ./NAME.yaml.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a shipped recipe here, to be changed."""
    shipped = shipped_recipes()
    if name not in shipped:
        known = f" There are: {', '.join(shipped)}."
        raise InputError(f"no shipped recipe is named '{name}'.{did_you_mean(name, shipped) or known}")
    target = storage.expand(out) if out else Path(f"{name}.yaml")
    if target.is_dir():
        target /= f"{name}.yaml"
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        raise InputError(
            f"{target} exists and is left as it is: name another place with --out, or replace it with"
            " --overwrite."
        )
    if not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a directory.")
    try:
        storage.write_atomic(target, shipped[name].read_bytes())
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}. Name another place with --out."
        ) from error
    print(f"{target} written. Train with: linchain train {target}")


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Axolotl's, LLaMA-Factory's or TRL's YAML; - is the standard input."
        ),
    ],
) -> None:
    """Print a configuration of another tool as a recipe."""
    from linchain_cli.recipe import convert_recipe

    print(convert_recipe("/dev/stdin" if str(file) == "-" else file), end="")


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from linchain_cli.recipe import json_schema

    console.print_json(json_schema())
