"""linchain merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linchain_cli.commands.options import Dtype, Overwrite, RunPath, not_available


def run(
    run_path: RunPath = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The base model, where it is not where the run found it.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the checkpoint goes; left out, the run's merged/.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Left out, each tensor keeps its stored type.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Fold a run's adapter into its base checkpoint."""
    raise not_available("merge")
