"""linchain eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from linchain_cli.commands.options import Dtype, ModelName, not_available


def run(
    model: ModelName = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Task names, such as boolq,piqa; left out, those of the run's recipe.", show_default=False
        ),
    ] = None,
    protocol: Annotated[
        Literal["likelihood", "generate"],
        typer.Option(help="likelihood compares the options' probabilities; generate lets the model write."),
    ] = "likelihood",
    beams: Annotated[int, typer.Option(min=1, help="Beams of the generate protocol; 1 is greedy.")] = 4,
    template: Annotated[
        str | None,
        typer.Option(help="Prompt template; left out, the run's own, or alpaca.", show_default=False),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Left out, float32 on a CPU and the recipe's elsewhere.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first rows of each task.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="LINCHAIN_DATA_DIR",
            help="Local test files, DIR/<task>/test.json in the LLM-Adapters format.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Second model, evaluated on the same rows and compared.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the JSON goes; left out, the run's eval/<protocol>.json or ./eval-<model name>.json.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure a model's accuracy on benchmark tasks."""
    raise not_available("eval")
