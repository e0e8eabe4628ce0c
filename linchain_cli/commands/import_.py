"""linchain import"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linchain_cli.commands.options import not_available


def run(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="An adapter of PEFT LoRA, MoSLoRA or the LinChain authors' code."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the adapter goes.")],
) -> None:
    """Read an adapter that another tool wrote."""
    raise not_available("import")
