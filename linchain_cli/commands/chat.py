"""linchain chat"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from linchain_cli.commands.cast import Cast
from linchain_cli.commands.options import (
    AllowOtherBase,
    Base,
    MaxNewTokens,
    ModelDtype,
    PromptTemplate,
    Temperature,
    TopP,
)
from linchain_cli.commands.subject import Subject, find_subject
from linchain_cli.errors import InputError


def run(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="A run directory, one of its checkpoints, a model's directory or a hub id; left out, the "
            "newest finished run under ./runs. Several runs of one base can be changed between with /use.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System prompt, in place of the training's.", show_default=False),
    ] = None,
    template: PromptTemplate = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 512,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    dtype: ModelDtype = None,
) -> None:
    """Talk with a model in the terminal."""
    from linchain_cli.evaluation.speaking import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    subjects = [find_subject(name, base, allow_other_base) for name in models or [None]]
    _refuse_several_models(subjects)
    cast = Cast(subjects, dtype, template)
    from linchain_cli.commands.chat_terminal import converse
    from linchain_cli.evaluation.dialogue import Dialogue

    dialogue = Dialogue(cast.use(cast.names[0]), system)
    converse(cast, dialogue, sampling, sys.stdin)


def _refuse_several_models(subjects: list[Subject]) -> None:
    for subject in subjects if len(subjects) > 1 else ():
        if subject.named is None:
            raise InputError(
                f"{subject.name} is no run: several can be named where each is a run (an adapter) of one base"
            )
