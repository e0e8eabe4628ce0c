"""The `chat` template: rows rendered through the tokenizer's chat template, assistant turns supervised.

A chat template is a program, so where a turn begins and ends is found by rendering: what the template
writes up to an answer (with its generation prompt) must be a prefix of what it writes with the answer.
A template that breaks this cannot be segmented, and is refused rather than guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linchain_cli.data.rows import Layout, Rendered, Row, RowError
from linchain_cli.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[dict[str, Any]]

# Some templates write today's date unless one is given; a row must not change from one day to the next.
_DATE = "26 Jul 2024"
_VERSION = 1
_CANNOT_SEGMENT = (
    "the model's chat template writes a conversation differently once an answer follows, so answers "
    "cannot be located"
)
_OTHER_TEMPLATE = "Use another template: alpaca, plain or your own."


class ChatTemplate:
    """Conversations (`messages`), or instruction rows taken as one user turn and one assistant turn.

    An assistant turn's supervised span is its content and what the template closes it with (its
    end-of-turn token), without the white space that follows. Text after the last answer is dropped.
    """

    name = "chat"
    layouts = (Layout(("messages",)), Layout(("instruction", "output"), ("input",)))
    adds_bos = False  # a chat template writes its own

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                "data.template: the model's tokenizer has no chat template. Use another template (alpaca, "
                "plain or your own), or a model that was tuned for chat."
            ) from None
        self._options = {"date_string": _DATE} if "date_string" in self._source else {}
        self._closing = self._probe()

    @property
    def fingerprint(self) -> str:
        parts = ["chat", _VERSION, self._source, self._options]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def prompt(self, row: Row) -> str:
        return self._text(_before_answer(_conversation(row)), add_generation_prompt=True)

    def response(self, row: Row) -> str | None:
        if "messages" not in row:
            return row.get("output")
        last = _conversation(row)[-1]
        return last["content"] if last["role"] == "assistant" else None

    def complete(self, row: Row, response: str) -> Rendered:
        messages = [*_before_answer(_conversation(row)), {"role": "assistant", "content": response}]
        text = self._text(messages)
        start, end = self._answer(messages, text, last=True)
        return Rendered(text[:end], [(start, end)])

    def render(self, row: Row) -> list[Rendered]:
        messages = _conversation(row)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or not all(messages[i]["content"].strip() for i in turns):
            raise RowError("an assistant turn is missing or empty: there is nothing to learn from this row")
        text = self._text(messages[: turns[-1] + 1])
        answers = [self._answer(messages[: i + 1], text, last=i == turns[-1]) for i in turns]
        closing = self._closing.rstrip()
        spans = [(start, end + len(closing)) for start, end in answers]
        # A template that closes no turn leaves that to the end-of-sequence token.
        return [Rendered(text[: spans[-1][1]], spans, ends=not closing)]

    def _answer(self, messages: Messages, text: str, last: bool) -> tuple[int, int]:
        """(start, end) in `text`, all of the conversation, of the answer that ends `messages`; no closing."""
        before = self._text(messages[:-1], add_generation_prompt=True)
        upto = text if last else self._text(messages)
        if not upto.startswith(before) or not upto.endswith(self._closing):
            raise RowError(f"{_CANNOT_SEGMENT} ({_difference(before, upto)})")
        if text.startswith(upto):
            return len(before), len(upto) - len(self._closing)
        # Earlier answers may be written in another form than the last one (without their reasoning): then
        # the content itself has to follow the prompt.
        content = messages[-1]["content"].strip()
        if text.startswith(before) and text.startswith(content + self._closing, len(before)):
            return len(before), len(before) + len(content)
        raise RowError(
            f"{_CANNOT_SEGMENT} (earlier turns change once others follow); give one row per answer"
        )

    def _text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._options
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise RowError(f"the model's chat template refuses the conversation: {error}") from None

    def _probe(self) -> str:
        """What the template writes behind an answer. Refuses one that cannot be segmented, before any row."""
        answer = "4f1c9a"  # does not occur in a template
        asked = [{"role": "user", "content": "2 + 2"}]
        try:
            before = self._text(asked, add_generation_prompt=True)
            full = self._text([*asked, {"role": "assistant", "content": answer}])
        except RowError as error:
            raise InputError(f"data.template: {error}. {_OTHER_TEMPLATE}") from None
        if not full.startswith(before) or answer not in full[len(before) :]:
            raise InputError(
                f"data.template: {_CANNOT_SEGMENT} ({_difference(before, full)}). {_OTHER_TEMPLATE}"
            )
        return full[full.rindex(answer) + len(answer) :]


def _conversation(row: Row) -> list[dict[str, str]]:
    """The row's messages; an instruction row is a user turn (with its input below) and an answer."""
    if "messages" not in row:
        asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        answer = [{"role": "assistant", "content": row["output"]}] if row.get("output") is not None else []
        return [{"role": "user", "content": asked}, *answer]
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowError("'messages' is not a list of turns like {role: user, content: ...}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise RowError(f"turn {number} of 'messages' needs a role and a content, both strings")
    return messages


def _before_answer(messages: Messages) -> Messages:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _difference(before: str, full: str) -> str:
    """Where the text with an answer leaves the text that asks for it, in a few words."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, full, strict=False)) if a != b), min(len(before), len(full))
    )
    part = slice(max(0, same - 20), same + 20)
    return f"it asks with {before[part]!r} and writes {full[part]!r}"
