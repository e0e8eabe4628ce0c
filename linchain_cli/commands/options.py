"""Arguments that several commands share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from linchain_cli.errors import InputError, did_you_mean


def _template_name(name: str | None) -> str | None:
    """A template's name; told here if there is none of it, before anything is loaded."""
    from linchain_cli.data.templates import TEMPLATE_NAMES

    if name is not None and name not in TEMPLATE_NAMES:
        raise InputError(
            f"--template {name}: there is no such template.{did_you_mean(name, TEMPLATE_NAMES)} Templates:"
            f" {', '.join(TEMPLATE_NAMES)}; left out, that of the model's training."
        )
    return name


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe file. `linchain recipes list` shows shipped ones.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value",
        help="Values in place of the recipe's, such as adapter.depth=1.",
        show_default=False,
    ),
]
RunPath = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        help="A run directory, or one of its checkpoints; left out, the newest finished run under ./runs.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, one of its checkpoints, a model's directory or a hub id; left out, the newest "
        "finished run under ./runs.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The run's base model, where it is not where the run found it.",
        show_default=False,
    ),
]
AllowOtherBase = Annotated[
    bool,
    typer.Option("--allow-other-base", help="Take a base whose weights are not those that were trained on."),
]
PromptTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        callback=_template_name,
        help="Prompt template; left out, that of the model's training, else its chat template, else alpaca.",
        show_default=False,
    ),
]
Dtype = Literal["float32", "bfloat16", "float16"]
ModelDtype = Annotated[
    Dtype | None,
    typer.Option(help="Left out, float32 on a CPU and the recipe's elsewhere.", show_default=False),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Draw the answer, the more freely the higher; 0: the likeliest.")
]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="With --temperature: draw from the likeliest tokens of this probability."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Length of the answer at most.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on stdout.")]
