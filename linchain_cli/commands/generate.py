"""linchain generate"""

from __future__ import annotations

from typing import Annotated

import typer

from linchain_cli.commands.options import AllowOtherBase, Base, Dtype
from linchain_cli.commands.subject import find_subject, is_model, load_subject
from linchain_cli.errors import InputError


def run(
    model_and_prompt: Annotated[
        list[str],
        typer.Argument(
            metavar='[MODEL] "PROMPT"',
            help="The prompt; before it a run directory, a checkpoint directory or a hub id, "
            "left out the newest finished run under ./runs.",
            show_default=False,
        ),
    ],
    template: Annotated[
        str | None,
        typer.Option(help="Prompt template; left out, the run's own, or alpaca.", show_default=False),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 256,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Left out, float32 on a CPU and the recipe's elsewhere.", show_default=False),
    ] = None,
) -> None:
    """Answer one prompt, through the run's template."""
    if len(model_and_prompt) > 2:
        raise InputError(
            f"expected [MODEL] PROMPT, got {len(model_and_prompt)} words: put the prompt in quotes."
        )
    prompt = model_and_prompt[-1]
    if not prompt.strip():
        raise InputError("the prompt is empty.")
    if len(model_and_prompt) == 1 and is_model(prompt):
        raise InputError(
            f'{prompt} is a model, and the prompt is missing: linchain generate {prompt} "PROMPT"'
        )
    subject = find_subject(
        model_and_prompt[0] if len(model_and_prompt) == 2 else None, base, allow_other_base
    )
    from linchain_cli.data.templates import get_template
    from linchain_cli.evaluation.evaluate import answer

    loaded = load_subject(subject, dtype)
    chosen = get_template(template or subject.template, loaded.tokenizer, subject.chat)
    print(answer(loaded.model, loaded.tokenizer, chosen, prompt, beams=beams, max_new_tokens=max_new_tokens))
