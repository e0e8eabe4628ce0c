"""The model's chat template as a function: a conversation in, its text out, today and on every other day."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linchain_cli.data.conversation import Message
from linchain_cli.data.rows import RowError
from linchain_cli.errors import first_line

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

# Templates that write a date would write another one each day; this is the one that Llama 3.1 falls back on.
_DATE = datetime.datetime(2024, 7, 26)
_DATE_STRING = _DATE.strftime("%d %b %Y")
_WORD = "5e0b7d"  # no template writes it


class ChatProgram:
    """A compiled chat template with its options.

    It is rendered in transformers' own sandbox and with the variables that `apply_chat_template` passes;
    only `strftime_now` and `date_string` stand still. A tokenizer may have another template for rows with
    tools. Templates read texts as they are or as parts ({type: text, text: ...}), a call's arguments as an
    object or as JSON text: each gets what it can write.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template.
        ValueError: the tokenizer has no template, and none was given.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None, options: Mapping[str, Any]):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self.source = tokenizer.get_chat_template() if source is None else source
        self._source_with_tools = tokenizer.get_chat_template(tools=[{}]) if source is None else source
        self._program: jinja2.Template = _compile_jinja_template(self.source)
        self._program_with_tools: jinja2.Template = _compile_jinja_template(self._source_with_tools)
        self._variables = {
            **tokenizer.special_tokens_map,
            "documents": None,
            "strftime_now": _DATE.strftime,
            "date_string": _DATE_STRING,
            **options,
        }
        self._arguments_as_text: bool | None = None  # unknown before the first call
        self._texts_in_parts = False
        self._texts_in_parts = not self._writes(_said()) and self._writes_parts()

    def with_options(self, options: Mapping[str, Any]) -> ChatProgram:
        """The same template, with these variables beside or in place of its own."""
        other = copy.copy(self)
        other._variables = {**self._variables, **options}
        other._arguments_as_text = None
        return other

    @property
    def fingerprint(self) -> list[Any]:
        """All that a conversation's text depends on, as JSON."""
        variables = {**self._variables, "strftime_now": _DATE.isoformat()}
        return [self.source, self._source_with_tools, variables]

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, ask: bool = False
    ) -> str:
        """The conversation's text; `ask` adds what invites an answer. Raises RowError for what it refuses."""
        program = self._program_with_tools if tools else self._program
        try:
            return program.render(
                messages=[self._as_read(message) for message in messages],
                tools=tools or None,
                add_generation_prompt=ask,
                **self._variables,
            )
        except Exception as error:  # a template is anybody's program and fails in any way
            raise RowError(f"the chat template refuses the conversation: {first_line(error)}") from None

    def _as_read(self, message: Message) -> dict[str, Any]:
        """A message as templates expect it: reasoning under either name, calls' arguments in their form."""
        if len(message) == 2 and not self._texts_in_parts:
            return message
        read = {key: value for key, value in message.items() if key != "train"}
        if "reasoning_content" in read:
            read["thinking"] = read["reasoning_content"]
        if "tool_calls" in read and self._wants_text():
            read["tool_calls"] = [_with_text_arguments(call) for call in read["tool_calls"]]
        if self._texts_in_parts:
            read["content"] = [{"type": "text", "text": read["content"]}]
        return read

    def _writes(self, messages: Sequence[Message], text: str = _WORD) -> bool:
        try:
            return text in self(messages)
        except RowError:
            return False

    def _writes_parts(self) -> bool:
        self._texts_in_parts = True
        return self._writes(_said())

    def _wants_text(self) -> bool:
        """Whether the template joins a call's arguments to its text as they are: then they must be JSON."""
        if self._arguments_as_text is None:
            conversation = called("f", {_WORD: "x"})
            self._arguments_as_text = False
            if not self._writes(conversation) or self._writes(conversation, f"{{'{_WORD}'"):  # Python's form
                self._arguments_as_text = True
                self._arguments_as_text = self._writes(conversation)
        return self._arguments_as_text


def _said() -> list[Message]:
    return [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": _WORD}]


def called(name: str, arguments: dict[str, Any]) -> list[Message]:
    """A conversation that ends in a call of the function `name`."""
    call = {"type": "function", "id": "000000000", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": "2 + 2"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
