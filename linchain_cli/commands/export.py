"""linchain export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from linchain_cli.commands.options import Overwrite, RunPath, not_available


def run(
    run_path: RunPath = None,
    format: Annotated[
        Literal["peft"], typer.Option(help="peft: a plain LoRA of the same rank in PEFT's file format.")
    ] = "peft",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the adapter goes; left out, the run's <format>/.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another tool's format."""
    raise not_available("export")
