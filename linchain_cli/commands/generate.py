"""linchain generate"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli import console
from linchain_cli.commands.options import (
    AllowOtherBase,
    Base,
    Json,
    MaxNewTokens,
    ModelDtype,
    PromptTemplate,
    Temperature,
    TopP,
)
from linchain_cli.commands.subject import (
    choose_template,
    find_subject,
    is_model,
    load_subject,
    refuse_classifier,
    subject_tokenizer,
)
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from linchain_cli.data.rows import Row, Template


def run(
    model_and_prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar='[MODEL] "PROMPT"',
            help="The prompt, or - to read it from the standard input; before it a run directory, a "
            "checkpoint directory or a hub id, left out the newest finished run under ./runs.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A column of the template, where it asks for others than instruction; may be repeated. "
            "With --column alone no prompt is needed.",
            show_default=False,
        ),
    ] = None,
    template: PromptTemplate = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be repeated.", show_default=False),
    ] = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    dtype: ModelDtype = None,
    json: Json = False,
) -> None:
    """Answer one prompt, through the template of its training."""
    columns = _columns(column or ())
    model, prompt = _model_and_prompt(model_and_prompt or [], bool(columns))
    subject = find_subject(model, base, allow_other_base)
    from linchain_cli.evaluation.speaking import Sampling, Speaker

    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, beams=beams, stop=stop or ()
    )
    refuse_classifier(subject)
    tokenizer = subject_tokenizer(subject)
    asked = choose_template(subject, tokenizer, template)
    row = _row(asked.template, prompt, columns)
    loaded = load_subject(subject, dtype, tokenizer)
    console.note(f"{subject.name}: template {asked.template.name}, {asked.why}")
    speaker = Speaker(loaded.model, loaded.tokenizer, asked.template, asked.straddles, warn=console.warn)
    said = speaker.say(row, sampling, show=lambda piece: None if json else print(piece, end="", flush=True))
    if json:
        reasoning, answer = said.parts or (None, said.text)
        console.print_json(
            {
                "model": subject.name,
                "template": asked.template.name,
                "row": row,
                "prompt": asked.template.prompt(row),
                "reasoning": reasoning,
                "answer": answer,
                "stop_reason": said.stop_reason,
                "tokens": {"prompt": said.prompt_tokens, "answer": said.tokens},
            }
        )
    else:
        print()


def _columns(assignments: Sequence[str]) -> dict[str, str]:
    columns = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise InputError(f"--column {assignment}: expected NAME=VALUE, such as --column question='Why?'")
        columns[name.strip()] = value
    return columns


def _model_and_prompt(words: Sequence[str], has_columns: bool) -> tuple[str | None, str | None]:
    """The model, if one is named, and the prompt; None where columns stand for it."""
    if len(words) > 2:
        raise InputError(f"expected [MODEL] PROMPT, got {len(words)} words: put the prompt in quotes.")
    if len(words) == 2:
        return words[0], _text(words[1])
    if words and is_model(words[0]):
        if has_columns:
            return words[0], None
        if sys.stdin.isatty():
            raise InputError(
                f'{words[0]} is a model, and the prompt is missing: linchain generate {words[0]} "PROMPT"'
            )
        return words[0], _text("-", f"{words[0]} is a model, and the prompt is missing")
    if words:
        return None, _text(words[0])
    if has_columns:
        return None, None
    if sys.stdin.isatty():
        raise InputError('the prompt is missing: linchain generate [MODEL] "PROMPT"')
    return None, _text("-")


def _text(word: str, complaint: str = "the prompt is empty") -> str:
    """The prompt itself, or for - what the standard input holds, without the line break at its end."""
    if word == "-":
        try:
            word = sys.stdin.read().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{complaint}, and the standard input cannot be read: {error}") from None
    if not word.strip():
        raise InputError(f'{complaint}: linchain generate [MODEL] "PROMPT"')
    return word


def _row(template: Template, prompt: str | None, columns: dict[str, str]) -> Row:
    """What is asked. Names a column that the template's prompt needs and that was not given, or does not
    know."""
    from linchain_cli.data.asking import question

    known = [name for layout in template.layouts for name in (*layout.required, *layout.optional)]
    for name in columns:
        if name not in known:
            raise InputError(
                f"--column {name}: the template has no such column.{did_you_mean(name, known)} It has"
                f" {', '.join(dict.fromkeys(known))}."
            )
    if prompt is None:
        row = {"input": "", **columns}
    elif columns:
        row = {"instruction": prompt, "input": "", **columns}
    else:
        row = question(template, prompt)
    try:
        template.prompt(row)
    except KeyError as error:
        name = error.args[0]
        raise InputError(
            f"the template asks for a column '{name}': give it with --column {name}=VALUE"
        ) from None
    return row
