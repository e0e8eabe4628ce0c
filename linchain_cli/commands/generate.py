"""linchain generate"""

from __future__ import annotations

from typing import Annotated

import typer

from linchain_cli.commands.options import not_available
from linchain_cli.errors import InputError


def run(
    model_and_prompt: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="The prompt; before it a run directory, a checkpoint directory or a hub id, "
            "left out the newest finished run under ./runs.",
            show_default=False,
        ),
    ],
) -> None:
    """Answer one prompt, through the run's template."""
    if len(model_and_prompt) > 2:
        raise InputError(
            f"expected [MODEL] PROMPT, got {len(model_and_prompt)} words: put the prompt in quotes."
        )
    model = model_and_prompt[0] if len(model_and_prompt) == 2 else None
    generate(model, prompt=model_and_prompt[-1])


def generate(model: str | None, prompt: str) -> None:
    """Prints the answer to `prompt`; `model` None is the newest finished run."""
    raise not_available("generate")
