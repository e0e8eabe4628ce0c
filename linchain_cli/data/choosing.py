"""Which template rows are for, told by their columns; and what to do about columns that none is for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linchain_cli.data import messages, readers
from linchain_cli.data.reading import RawRows
from linchain_cli.data.rows import RowError
from linchain_cli.data.sources import Source
from linchain_cli.errors import InputError, did_you_mean, nearest

_LOOKED_AT = 100  # rows from which `template: auto` tells the format

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A template by its name, and what rows hold that it is for."""

    name: str
    holds: str


# Looked for in this order. A chat data set may carry the same rows as plain text, too.
_CHOICES = (
    (("messages",), Choice("chat", "conversations (`messages`)")),
    (("conversations",), Choice("chat", "conversations (`conversations`)")),
    (("instruction", "output"), Choice("alpaca", "instructions (`instruction`, `output`)")),
    (("prompt", "completion"), Choice("prompt-completion", "prompts with their `completion`")),
    (("text",), Choice("text", "documents (`text`)")),
)
_TOLD = Choice("chat", "prompts and completions written as messages")
_EARLIER = Choice("chat", "instructions with `system` or `history`")


def template_for(found: Iterable[str], columns: Mapping[str, str]) -> Choice | None:
    """The template for rows with these columns; `columns` are names of ours to theirs."""
    found = set(found)
    for names, choice in _CHOICES:
        if all(columns.get(name, name) in found for name in names):
            return choice
    return None


def choose_template(source: Source, chats: bool) -> Choice:
    """What `data.template: auto` takes for a source, by its first rows. `chats` says that the tokenizer has
    a chat template, without which instructions with a `system` or `history` go through alpaca.

    Raises InputError if they have the columns of no format, or none can be read.
    """
    rows = RawRows(source, set())
    found: Choice | None = None
    looked_at, unreadable, bad = 0, 0, ""
    for raw in rows:
        if isinstance(raw, RowError):
            unreadable += 1
            bad = bad or f"{rows.place()}: {raw}"
            continue
        found = found or template_for(raw, source.columns)
        if found is None:
            raise InputError(f"{rows.place()}: {no_format(raw, source.columns)}")

        def cell(name: str, raw: Cells = raw) -> Any:
            return raw.get(source.columns.get(name, name))

        if refused := _not_for_learning(raw, found, source.columns):
            raise InputError(f"{rows.place()}: {refused}")
        if found.name == "prompt-completion":
            return _TOLD if any(map(messages.is_messages, map(cell, ("prompt", "completion")))) else found
        if found.name != "alpaca" or not chats:
            return found
        if cell("system") or cell("history"):
            return _EARLIER
        looked_at += 1
        if looked_at == _LOOKED_AT:
            break
    if found is None:
        reason = f": none of {unreadable:,} rows can be read; the first is {bad}" if bad else " has no rows"
        raise InputError(f"{source.name}{reason}{'' if reason.endswith('.') else '.'}")
    return found


# What people call the columns, beside our own names.
_SYNONYMS = {
    "messages": ("conversation", "dialog", "dialogue", "chat"),
    "conversations": ("conversation",),
    "instruction": ("question", "query", "problem", "input", "text", "source", "article", "document"),
    "output": ("answer", "response", "solution", "target", "label", "labels", "summary"),
    "completion": ("response", "answer", "output", "generation"),
}
# What may stand beside them, and would be left out of the prompt if it were not mapped.
_BESIDE = {"input": ("input", "context", "passage"), "system": ("system", "system_prompt")}
_ALIKE = 0.8  # of 1: closer than `version` is to `conversations`, as far as a slip of the pen goes
_PLAIN = re.compile(r"[A-Za-z_](?:[\w .-]*\w)?")
_JUDGEMENTS = ("label", "kto_tag")  # TRL's and LLaMA-Factory's
_TRUE_OR_FALSE = ("true", "false")  # in a .csv as text
PICTURES = frozenset(("image", "images", "video", "videos", "audio", "audios"))


def _not_for_learning(row: Cells, choice: Choice, columns: Mapping[str, str]) -> str | None:
    """Why rows of a format that is known are not learned unless the recipe names a template for them."""
    beside = {name: value for name, value in row.items() if name not in columns.values()}
    for name in _JUDGEMENTS:
        if str(beside.get(name)).lower() in _TRUE_OR_FALSE and choice.name in ("chat", "prompt-completion"):
            return (
                f"answers judged by a `{name}` are for preference training (KTO), which linchain does not "
                "do: rejected ones would be learned like the others. Keep the rows whose "
                f"{name} is true, without that column, or name a data.template to learn all."
            )
    turns = next((_turns(row[name]) for name in ("messages", "conversations") if name in row), [])
    if turns and {"chosen", "rejected"} <= beside.keys() and _speaker(turns[-1]) not in _ANSWERING:
        return _of_a_pair(row)
    if seen := next((name for name in beside if name in PICTURES and beside[name]), None):
        return (
            f"the rows hold `{seen}`, and linchain learns text alone. Take that column out, or name a "
            "data.template to learn the text without what it speaks of."
        )
    return None


def no_format(row: Cells, columns: Mapping[str, str]) -> str:
    """What to do about a row whose columns are those of no format."""
    shown = ", ".join(readers.shown(name) for name in list(row)[:20]) or "none"
    what = f"the columns ({shown}) are those of no format: {_FORMATS}."
    for ours, theirs in columns.items():
        if theirs not in row:
            return (
                f"there is no column '{theirs}', which data.columns takes for `{ours}` (columns: {shown})."
                f"{did_you_mean(theirs, list(row))} Mend data.columns, or take it out."
            )
    if remedy := _of_a_pair(row) or _of_tokens(row) or _of_turns(row) or _of_wrapped_rows(row):
        return f"{what} {remedy}"
    mapping = _mapping(_meant(list(row), columns))
    return f"{what} Map them with data.columns: {mapping}, or write a data.template of your own."


_FORMATS = "; ".join(", ".join(f"`{name}`" for name in format_names) for format_names, _ in _CHOICES)


def _of_a_pair(row: Cells) -> str | None:
    """Of rows that preference training takes, the better answer can be learned."""
    if {"preferred_output", "non_preferred_output"} <= row.keys():
        return "The rows are pairs for preference training, in OpenAI's form, which linchain does not do."
    if not {"chosen", "rejected"} <= row.keys():
        return None
    asked = next((name for name in ("prompt", *_SYNONYMS["instruction"]) if name in row), None)
    turns = _turns(row["chosen"])
    if turns and _speaker(turns[0]) not in _ANSWERING:
        mapping = {"messages": "chosen"}  # the whole conversation, whatever stands beside it
    elif "instruction" in row:
        mapping = {"output": "chosen"}
    elif asked:
        mapping = {"prompt": asked, "completion": "chosen"}
    else:
        mapping = None  # the answer stands in another column than the turns before it
    how = f"map it with data.columns: {_mapping(mapping)}" if mapping else "write it behind the other turns"
    return (
        f"The rows are pairs for preference training, which linchain does not do. To learn `chosen`, {how}."
    )


_ANSWERING = ("assistant", "gpt")


def _speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role") or turn.get("from")


def _of_tokens(row: Cells) -> str | None:
    """Rows that were prepared for one tool or one tokenizer."""
    if "input_ids" in row:
        return "They are tokens already, of some tokenizer: give the text, linchain makes the tokens."
    segments = row.get("segments")
    if isinstance(segments, list) and segments and isinstance(segments[0], dict) and "label" in segments[0]:
        return (
            "They say of each segment whether it is learned. Write what is not learned as `prompt` and what "
            "is as `completion`, or `messages` with `train: false` on some."
        )
    if {"role", "content"} <= row.keys():
        return 'Each of them is one turn: write the turns of a conversation as one row, {"messages": [...]}.'
    return None


def _of_turns(row: Cells) -> str | None:
    """Conversations in a column of another name."""
    for name, value in row.items():
        if turns := _turns(value):
            mapping = _mapping({"conversations" if "from" in turns[0] else "messages": name})
            return f"The turns of a conversation seem to be in {name!r}: set data.columns: {mapping}."
    return None


def _turns(value: Any) -> list[Mapping[str, Any]]:
    """The turns in a cell, or none."""
    if isinstance(value, str) and messages.is_messages(value):
        value = messages.parsed(value, "")
    return value if messages.are_turns(value) else []


def _of_wrapped_rows(row: Cells) -> str | None:
    """A file that is one object around its rows."""
    for name, value in row.items():
        items = list(value.values()) if isinstance(value, dict) else value
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items[:10]):
            return f"If {name!r} holds the rows, write that list alone into a file."
    return None


def _meant(found: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Our names of the format that comes closest, with their names that are probably meant."""
    best: dict[str, str | None] = {"instruction": None, "output": None}
    for names, _ in _CHOICES:
        meant = {name: columns.get(name) or _alike(name, found) for name in names}
        if sum(map(bool, meant.values())) * len(best) > sum(map(bool, best.values())) * len(meant):
            best = meant
    if "instruction" in best:
        plain = {name.strip().lower(): name for name in found if name not in best.values()}
        for ours, names in _BESIDE.items():
            best[ours] = next((plain[name] for name in names if name in plain), ours)
    return {ours: theirs or "NAME" for ours, theirs in best.items() if ours != theirs}


def _alike(ours: str, found: Sequence[str]) -> str | None:
    plain = {name.strip().lower(): name for name in found}
    known = next((plain[name] for name in (ours, *_SYNONYMS.get(ours, ())) if name in plain), None)
    return known or nearest(ours, found, _ALIKE)


def _mapping(columns: Mapping[str, str]) -> str:
    """As it is written in a recipe."""
    pairs = (
        f"{ours}: {theirs if _PLAIN.fullmatch(theirs) else json.dumps(theirs, ensure_ascii=False)}"
        for ours, theirs in columns.items()
        if ours != theirs
    )
    return f"{{{', '.join(pairs)}}}"
