"""Templates: how a row becomes text, and which characters of it the model has to learn.

The same object builds what is trained on and what is asked at evaluation, so that the two cannot drift
apart: the text of `render(row)` starts with `prompt(row)`. A template knows nothing of tokens, except that
`chat` renders through the tokenizer's own chat template.

    alpaca          Stanford Alpaca's prompt and a line break behind it, as Alpaca-LoRA and most tools have it
    llm-adapters    what LLM-Adapters' and the LinChain authors' finetune.py train on, byte for byte
    chat            the tokenizer's chat template; only assistant turns are supervised
    plain           the instruction, the input and a line break
    text            documents, all of which is learned
    prompt-completion  a prompt and its completion with nothing between them
    a mapping       {prompt: "...", prompt_no_input: "...", response: "..."} with {column} placeholders
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from linchain_cli.data.as_written import CompletionTemplate, DocumentTemplate
from linchain_cli.data.rows import Layout, Rendered, Row, RowError, Template
from linchain_cli.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.recipe import ChatConfig, DataConfig


def _fields(pattern: str, key: str) -> tuple[str, ...]:
    """The column names of a pattern, in order; refuses what is not a plain {column}."""
    names: list[str] = []
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise InputError(
            f"data.template.{key}: {error}. Write {{{{ and }}}} for a brace that is not a placeholder."
        ) from None
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            wrong = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise InputError(
                f"data.template.{key}: '{{{wrong}}}' is no placeholder: a word in braces, a column or "
                "what data.columns calls one ({review: text of it}). Write {{ and }} for braces."
            )
        if name not in names:
            names.append(name)
    return tuple(names)


def _around_columns(pattern: str) -> tuple[str, str]:
    """The pattern's text in front of its first column and behind its last one."""
    texts = [""]
    for text, name, _, _ in string.Formatter().parse(pattern):
        texts[-1] += text
        if name is not None:
            texts.append("")
    return texts[0], texts[-1]


_BLANK_END = (
    "data.template: the prompt ends in white space, which tokenizers join with the word that an answer begins"
    " with, but not with a digit or a sign: end it with a line break, or begin the response with the blank"
)


class PromptTemplate:
    """A template made of patterns with {column} placeholders.

    `prompt_no_input` is taken for rows whose columns that only `prompt` mentions are empty or absent.
    """

    adds_bos = True
    thinking = None

    def __init__(self, name: str, prompt: str, response: str, prompt_no_input: str | None = None):
        self.name = name
        self._prompt, self._response, self._prompt_no_input = prompt, response, prompt_no_input
        in_prompt, self._answer = _fields(prompt, "prompt"), _fields(response, "response")
        if not self._answer:
            raise InputError(
                "data.template.response: it names no column, so every row would teach the same answer."
            )
        always = in_prompt if prompt_no_input is None else _fields(prompt_no_input, "prompt_no_input")
        self._optional = tuple(name for name in in_prompt if name not in always)
        self.layouts = (Layout(tuple(dict.fromkeys(always + self._answer)), self._optional, self._answer),)
        self.frame = _around_columns(response)
        endings = [pattern for pattern in (prompt, prompt_no_input) if pattern]
        # LLM-Adapters' own prompt is what it is.
        blank = name == "custom" and any(
            pattern[-1].isspace() and pattern[-1] not in "\r\n" for pattern in endings
        )
        self._remarks = (_BLANK_END,) if blank else ()

    @property
    def fingerprint(self) -> str:
        parts = ["prompt", self._prompt, self._prompt_no_input, self._response]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def prompt(self, row: Row) -> str:
        with_input = self._prompt_no_input is None or any(row.get(name) for name in self._optional)
        if not with_input:
            return self._prompt_no_input.format_map(row)
        absent = {name: "" for name in self._optional if name not in row}
        return self._prompt.format_map({**row, **absent} if absent else row)

    def response(self, row: Row) -> str | None:
        if any(row.get(name) is None for name in self._answer):
            return None
        return self._response.format_map(row)

    def complete(self, row: Row, response: str) -> Rendered:
        return Rendered.answered(self.prompt(row), response)

    def end_marks(self) -> list[str]:
        return []

    def render(self, row: Row) -> list[Rendered]:
        response = self.response(row)
        if not response or not response.strip():
            raise RowError(f"{_quoted(self._answer)} is empty: there is nothing to learn from this row")
        return [replace(self.complete(row, response), remarks=self._remarks)]


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(f"'{name}'" for name in names)


_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def _alpaca() -> PromptTemplate:
    """Stanford's own ends in "### Response:" without the line break; Alpaca-LoRA put it there."""
    return PromptTemplate(
        "alpaca",
        prompt=f"{_WITH_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n"
        "### Response:\n",
        prompt_no_input=f"{_WITHOUT_INPUT}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
        response="{output}",
    )


def _llm_adapters() -> PromptTemplate:
    """The prompt of `generate_prompt` in LLM-Adapters' finetune.py, which indents it as the code around it.

    One blank ends the first line of the form with an input, two that of the form without. Its evaluation
    asks with other white space than it trains with; this is the one it trains with.
    """
    indent = "\n" + " " * 16
    gap = indent + indent
    asked, answer = f"### Instruction:{indent}{{instruction}}{gap}", f"### Response:{indent}"
    return PromptTemplate(
        "llm-adapters",
        prompt=f"{_WITH_INPUT} \n{indent}{asked}### Input:{indent}{{input}}{gap}{answer}",
        prompt_no_input=f"{_WITHOUT_INPUT}  \n{indent}{asked}{answer}",
        response="{output}",
    )


def _plain() -> PromptTemplate:
    return PromptTemplate(
        "plain",
        prompt="{instruction}\n{input}\n",
        prompt_no_input="{instruction}\n",
        response="{output}",
    )


_NAMED = {
    "alpaca": _alpaca,
    "llm-adapters": _llm_adapters,
    "plain": _plain,
    "text": lambda: DocumentTemplate(_plain()),
    "prompt-completion": lambda: CompletionTemplate(_plain()),
}
TEMPLATE_NAMES = (*_NAMED, "chat")


def template_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a recipe's data section; see `get_template`."""
    return get_template(data.template, tokenizer, data.chat, data.turns)


def get_template(
    template: str | Mapping[str, str | None] | Any,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatConfig | None = None,
    turns: Literal["all", "last"] = "all",
) -> Template:
    """The template of that name, or one made from a mapping with `prompt`, `response` and `prompt_no_input`.

    `auto`, which the rows of a run settle, is alpaca here: what instructions get. `tokenizer`, `chat` and
    `turns` are only asked by the template `chat`. Raises InputError for an unknown name, a pattern with
    anything but {column} placeholders, and a chat template that is missing or writes no answer.
    """
    if isinstance(template, str):
        if template == "auto":
            template = "alpaca"
        if template in _NAMED:
            return _NAMED[template]()
        if template == "chat":
            from linchain_cli.data.chat import ChatTemplate

            return ChatTemplate(tokenizer, chat, turns)
        raise InputError(
            f"data.template: there is no template '{template}'.{did_you_mean(template, TEMPLATE_NAMES)} "
            f"Templates: {', '.join(TEMPLATE_NAMES)}, or a mapping with prompt and response."
        )
    values = template if isinstance(template, Mapping) else template.model_dump()
    return PromptTemplate("custom", values["prompt"], values["response"], values.get("prompt_no_input"))


def end_tokens(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer is over: the tokenizer's end of sequence and the template's own."""
    known = tokenizer.get_added_vocab()
    marks = [known[mark] for mark in template.end_marks() if mark in known]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys(own + marks))


def closing_token(template: Template, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that training puts behind an answer: the end of sequence, unless the template closes turns
    itself. None where neither is known.
    """
    known = tokenizer.get_added_vocab()
    marks = [known[mark] for mark in template.end_marks() if mark in known]
    return marks[0] if marks else tokenizer.eos_token_id
