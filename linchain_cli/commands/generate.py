"""linchain generate"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from linchain_cli.commands.options import AllowOtherBase, Base, Dtype, PromptTemplate
from linchain_cli.commands.subject import choose_template, find_subject, is_model, load_subject
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from linchain_cli.data.rows import Template


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
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Draw the answer, the more freely the higher; 0: the likeliest."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="With --temperature: draw from the likeliest tokens of this probability."
        ),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be repeated.", show_default=False),
    ] = None,
    base: Base = None,
    allow_other_base: AllowOtherBase = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Left out, float32 on a CPU and the recipe's elsewhere.", show_default=False),
    ] = None,
) -> None:
    """Answer one prompt, through the template of its training."""
    columns = _columns(column or ())
    model, prompt = _model_and_prompt(model_and_prompt or [], bool(columns))
    if beams > 1 and temperature > 0:
        raise InputError("--beams searches for the likeliest answer and --temperature draws one: give one.")
    if top_p < 1 and temperature == 0:
        raise InputError("--top-p goes with --temperature, such as --temperature 0.7 --top-p 0.9.")
    row = {"instruction": prompt, "input": "", **columns} if prompt is not None else {"input": "", **columns}
    subject = find_subject(model, base, allow_other_base)
    from linchain_cli.evaluation.evaluate import answer

    loaded = load_subject(subject, dtype)
    asked = choose_template(subject, loaded.tokenizer, template)
    print(f"template {asked.template.name}, {asked.why}", file=sys.stderr)
    _check_columns(asked.template, row, columns)
    text = answer(
        loaded.model,
        loaded.tokenizer,
        asked.template,
        row,
        beams=beams,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop or (),
        straddles=asked.straddles,
    )
    print(text)


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


def _check_columns(template: Template, row: dict[str, str], given: dict[str, str]) -> None:
    """Names a column that the template's prompt needs and that was not given, or does not know."""
    known = [name for layout in template.layouts for name in (*layout.required, *layout.optional)]
    for name in given:
        if name not in known:
            raise InputError(
                f"--column {name}: the template has no such column.{did_you_mean(name, known)} It has"
                f" {', '.join(dict.fromkeys(known))}."
            )
    try:
        template.prompt(row)
    except KeyError as error:
        name = error.args[0]
        raise InputError(
            f"the template asks for a column '{name}': give it with --column {name}=VALUE"
        ) from None
