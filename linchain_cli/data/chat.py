"""The `chat` template: rows rendered through a chat template, what the assistant says supervised.

A chat template is a program, so where an answer begins and ends is found by rendering. What it writes for
the turns before an answer, asking for one, is what the model is asked with; what it writes behind that once
the answer is there is what the model has to write, the token that ends its turn included.

Many templates write an earlier answer otherwise than it was asked for, without its reasoning for instance.
Such a conversation becomes several training rows, each of which ends with an answer as it is asked for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from linchain_cli.data.chat_checks import check_answer, check_read, check_tools
from linchain_cli.data.chat_program import ChatProgram, called
from linchain_cli.data.conversation import Conversation, Message
from linchain_cli.data.messages import ROLES, conversation_of
from linchain_cli.data.rows import Layout, Rendered, Row, RowError
from linchain_cli.errors import InputError
from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES, fitting_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from linchain_cli.recipe import ChatConfig

Tools = Sequence[Mapping[str, Any]] | None

_VERSION = 6
_MOST_VARIANTS = 1000
_WORD = "4f1c9a"  # stands for an answer; no template writes it
_THOUGHT = "9b2e71"  # stands for its reasoning
_QUESTION: Message = {"role": "user", "content": "2 + 2"}
_ANSWER: Message = {"role": "assistant", "content": _WORD}
# How templates write control tokens: <|im_end|>, </s>, <｜end▁of▁sentence｜>, [/INST].
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_MARK_AT_START = re.compile(r"\s*<[^<>\s]+>")
_LONGEST_MARK = 64
_OTHER_TEMPLATE = "Use another template: alpaca, plain or your own."
_KNOWN_ROLES = (*ROLES, "function", "function_response", "observation", "ipython")
_OTHER_ROLES = f"what turns of other roles than {', '.join(ROLES)} say is only read, never learned"


@dataclass(frozen=True)
class _Answer:
    """An answer as the template writes it when it is asked for: all of `text` from `start` on."""

    text: str
    start: int
    remarks: tuple[str, ...]


class ChatTemplate:
    """Conversations (`messages`), or instruction rows taken as one user turn and one assistant turn.

    Args:
        tokenizer: brings the chat template and its special tokens.
        settings: the recipe's `data.chat`.
        turns: which answers are learned; one with `train: False` never is.

    Raises:
        InputError: there is no chat template, or none that writes answers.
    """

    name = "chat"
    layouts = (
        Layout(("messages",), ("tools",)),
        Layout(("instruction", "output"), ("input", "system", "history")),
    )
    adds_bos = False  # a chat template writes its own
    frame = ("", "")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: ChatConfig | None = None,
        turns: Literal["all", "last"] = "all",
    ):
        source, options = (settings.template, settings.options) if settings else (None, {})
        self._write = _program(tokenizer, source, options)
        self._system = settings.system if settings else None
        self._turns = turns
        self._marks = list(tokenizer.get_added_vocab())
        self._openings: dict[str, str] = {}
        self._variants: dict[str, ChatTemplate] = {}
        self._probe()

    @property
    def source(self) -> str:
        """The chat template's Jinja text."""
        return self._write.source

    @property
    def fingerprint(self) -> str:
        parts = ["chat", _VERSION, self._write.fingerprint, self._system, self._turns]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prompt(self, row: Row) -> str:
        return self._with_options_of(row)._prompt(row)

    def _prompt(self, row: Row) -> str:
        conversation = self._conversation(row)
        asked, tools = _before_answer(conversation["messages"]), conversation.get("tools")
        if not self._departs:
            return self._write(asked, tools, ask=True)
        text, start, _ = self._answered(asked, tools, _ANSWER)
        return text[:start]

    def response(self, row: Row) -> str | None:
        if "messages" not in row:
            return row.get("output")
        last = row["messages"][-1]
        return last["content"] if last["role"] == "assistant" else None

    def complete(self, row: Row, response: str) -> Rendered:
        return self._with_options_of(row)._complete(row, response)

    def _complete(self, row: Row, response: str) -> Rendered:
        conversation = self._conversation(row)
        asked, tools = _before_answer(conversation["messages"]), conversation.get("tools")
        text, start, _ = self._answered(asked, tools, {"role": "assistant", "content": response})
        if not text.endswith(self._closing):
            raise RowError("the chat template closes this answer otherwise than others: its end is unknown")
        end = len(text) - len(self._closing)
        return Rendered(text[:end], [(start, end)])

    def render(self, row: Row) -> list[Rendered]:
        return self._with_options_of(row)._render(row)

    def _render(self, row: Row) -> list[Rendered]:
        conversation = self._conversation(row)
        messages, tools = conversation["messages"], conversation.get("tools")
        learned = self._learned(messages)
        answers = [self._answer(messages, tools, turn) for turn in learned]
        rows: list[Rendered] = []
        while answers:
            # One row for all that stand in the last one's text as they were asked for.
            last = answers.pop()
            spans, remarks, others = [(last.start, len(last.text))], last.remarks, []
            for answer in reversed(answers):
                end = None if self._ends_in_letters else self._end_within(last.text, answer)
                if end is None:
                    others.append(answer)
                else:
                    spans.append((answer.start, end))
                    remarks += answer.remarks
            unique = tuple(dict.fromkeys(remarks))
            rows.append(Rendered(last.text, spans[::-1], ends=self._eos_ends, remarks=unique))
            answers = others[::-1]
        read = [message for message in messages[: learned[-1]] if message["role"] != "assistant"]
        check_read(read, rows[0].text)
        if tools:
            asked = messages[: learned[-1]]
            check_tools(tools, self._write(asked, tools, ask=True), self._without_tools(asked))
        remarks = (self._letters,) if self._ends_in_letters else ()
        if any(message["role"] not in _KNOWN_ROLES for message in messages):
            remarks += (_OTHER_ROLES,)
        if remarks:
            rows = [replace(row, remarks=(*row.remarks, *remarks)) for row in rows]
        return rows[::-1]

    def end_marks(self) -> list[str]:
        if self._closes_nothing:
            return [mark.strip() for mark in map(self._opening, ("user", "tool")) if mark]
        try:
            behind_a_call = _MARK.findall(self._write(called(_WORD, {})))
        except RowError:
            behind_a_call = []
        return list(dict.fromkeys(_MARK.findall(self._closing) + behind_a_call[-1:]))

    def _with_options_of(self, row: Row) -> ChatTemplate:
        """This template with the variables that the row has of its own."""
        options = row.get("options") if "messages" in row else None
        if not options:
            return self
        name = json.dumps(options, sort_keys=True, default=str)
        if name not in self._variants:
            if len(self._variants) >= _MOST_VARIANTS:
                self._variants.clear()
            other = copy.copy(self)
            other._write = self._write.with_options(options)
            other._openings, other._variants = {}, {}
            try:
                other._probe()
            except InputError as error:
                raise RowError(f"with its chat_template_kwargs: {error}") from None
            self._variants[name] = other
        return self._variants[name]

    def _conversation(self, row: Row) -> Conversation:
        """The row's conversation, with the recipe's system prompt if it has none of its own."""
        conversation = conversation_of(row)
        messages = conversation["messages"]
        if self._system is not None and messages[0]["role"] not in ("system", "developer"):
            return {**conversation, "messages": [{"role": "system", "content": self._system}, *messages]}
        return conversation

    def _learned(self, messages: Sequence[Message]) -> list[int]:
        """The turns that are learned, from 0. What an assistant says before it is asked is only read."""
        roles = [message["role"] for message in messages]
        asked = roles.index("user") if "user" in roles else len(roles)
        answers = [turn for turn in range(asked, len(roles)) if roles[turn] == "assistant"]
        if not answers:
            raise RowError("no assistant turn follows a user's: there is nothing to learn from this row")
        if self._turns == "last":
            answers = answers[-1:]
        learned = [turn for turn in answers if messages[turn].get("train", True)]
        if not learned:
            raise RowError("no assistant turn is to be learned (`train: false`, `weight: 0` or data.turns)")
        for turn in learned:
            message = messages[turn]
            if not (message["content"].strip() or message.get("tool_calls")):
                raise RowError(
                    f"turn {turn + 1}, the assistant's, is empty: there is nothing to learn from it"
                )
        return learned

    def _answer(self, messages: Sequence[Message], tools: Tools, turn: int) -> _Answer:
        text, start, unwritten = self._answered(messages[:turn], tools, messages[turn])
        remarks = ()
        if unwritten:
            remarks += (
                f"the chat template asks for answers with {unwritten!r} and does not write that in front of "
                "them (data.chat.options may change how it asks)",
            )
        if check_answer(messages[turn], text[start:], turn + 1):
            remarks += ("the chat template trims the white space around answers",)
        if self._closes_nothing:
            text += self._opening(_role_after(messages, turn))
        return _Answer(text.rstrip(), start, remarks)

    def _answered(self, asked: Sequence[Message], tools: Tools, answer: Message) -> tuple[str, int, str]:
        """The text in which `answer` follows what it was asked with, where it begins, and what of the asking
        does not stand there."""
        before = self._write(asked, tools, ask=True)
        text = self._write([*asked, answer], tools)
        if text.startswith(before):
            return text, len(before), ""
        # Some ask with words (<think>) that they don't write in front of an answer: what is asked ends there.
        bare = self._write(asked, tools)
        same = _before_mark(text, _common(before, text))
        if same >= _before_mark(before, _common(before, bare)):
            return text, same, before[same:]
        # Some rewrite what was asked once it is answered (drop a call's reasoning): only the answer is taken.
        if before.startswith(bare) and before != bare:
            invitation = before[len(bare) :]
            at = text.rfind(invitation, 0, _common(text, self._write([*asked, _ANSWER], tools)))
            if at >= 0:
                return before + text[at + len(invitation) :], len(before), ""
        raise RowError(
            "the chat template writes a conversation differently once an answer follows, so answers cannot "
            f"be located ({_difference(before, text)})"
        )

    def _end_within(self, text: str, answer: _Answer) -> int | None:
        """Where an earlier answer ends in a later one's text; None if it is not there as it was asked for."""
        if text.startswith(answer.text):
            return len(answer.text)
        # The last turn may be closed with more than the others are.
        same = len(text[: _before_mark(text, _common(text, answer.text))].rstrip())
        closed = bool(self._end_mark) and text.endswith(self._end_mark, answer.start, same)
        return same if closed else None

    def _without_tools(self, asked: Sequence[Message]) -> str:
        try:
            return self._write(asked, ask=True)
        except RowError:  # what needs tools writes them
            return ""

    def _opening(self, role: str) -> str:
        """What opens a turn of `role`: where turns are not closed, a model ends its own by writing that."""
        if role not in self._openings:
            before = called(_WORD, {}) if role == "tool" else [_QUESTION, _ANSWER]
            try:
                text = self._write(before)
                after = self._write([*before, {"role": role, "content": "2"}])
            except RowError:
                text = after = ""
            found = _MARK_AT_START.match(after, len(text)) if after.startswith(text) else None
            self._openings[role] = found.group() if found else ""
        return self._openings[role]

    def _probe(self) -> None:
        """Learns how the template closes answers. Refuses one that writes none, before any row is read."""
        try:
            text, _, unwritten = self._answered([_QUESTION], None, _ANSWER)
        except RowError as error:
            raise InputError(f"data.template: {error}. {_OTHER_TEMPLATE}") from None
        if _WORD not in text:
            raise InputError(f"data.template: the chat template writes no answers. {_OTHER_TEMPLATE}")
        self._departs = bool(unwritten)
        self._closing = text[text.rindex(_WORD) + len(_WORD) :]
        mark = _MARK.search(self._closing)
        self._end_mark = mark.group() if mark else self._closing.strip()
        self._closes_nothing = not self._closing.strip()
        # Letters would be an end that no one stops at: the end of sequence goes behind each answer, too.
        self._ends_in_letters = not self._closes_nothing and not any(
            mark in self._closing for mark in self._marks
        )
        self._letters = (
            f"the chat template ends answers with {self._closing.strip()!r}, which is no token of this "
            "tokenizer: it is written in letters, and the end-of-sequence token is learned behind it"
        )
        self._eos_ends = self._ends_in_letters or self._closes_nothing and not self._opening("user")
        self.thinking = self._marks_of_reasoning()

    def _marks_of_reasoning(self) -> tuple[str, str] | None:
        """What the template writes around the reasoning of an answer, without white space; of what stands in
        front of the answer as much as also answers without reasoning have, if they have any."""
        try:
            text, start, _ = self._answered([_QUESTION], None, {**_ANSWER, "reasoning_content": _THOUGHT})
            plain, at, _ = self._answered([_QUESTION], None, _ANSWER)
        except RowError:
            return None
        before, found, behind = text[start:].partition(_THOUGHT)
        if not found or _WORD not in behind:
            return None
        begins = before.strip() or (_MARK.findall(text[:start]) or [""])[-1]
        ends, lead = behind[: behind.rindex(_WORD)].strip(), plain[at : plain.rindex(_WORD)].strip()
        if shared := _common(ends[::-1], lead[::-1]):
            ends = ends[-shared:]
        return (begins, ends) if begins and _MARK.search(ends) else None


def _program(
    tokenizer: PreTrainedTokenizerBase, source: str | None, options: Mapping[str, Any]
) -> ChatProgram:
    import jinja2

    try:
        return ChatProgram(tokenizer, source, options)
    except jinja2.TemplateSyntaxError as error:
        what = "data.chat.template" if source else "data.template: the model's chat template"
        raise InputError(f"{what}, line {error.lineno}: {str(error.message).rstrip('.')}.") from None
    except ValueError:
        fitting = fitting_template(tokenizer.get_vocab())
        named = f"{fitting}, whose marks this tokenizer knows" if fitting else ", ".join(CHAT_TEMPLATES)
        raise InputError(
            f"data.template: the model's tokenizer has no chat template. Give one with data.chat.template "
            f"({named}; a Jinja file; or the directory of the model that was tuned for chat), use another "
            "template (alpaca, plain or your own), or take a model that was tuned for chat."
        ) from None


def _before_answer(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def _role_after(messages: Sequence[Message], turn: int) -> str:
    if turn + 1 < len(messages) and messages[turn + 1]["role"] != "assistant":
        return messages[turn + 1]["role"]
    return "tool" if messages[turn].get("tool_calls") else "user"


def _before_mark(text: str, position: int) -> int:
    """`position`, or where the control token begins that it would cut in two."""
    for mark in _MARK.finditer(text, max(0, position - _LONGEST_MARK), position + _LONGEST_MARK):
        if mark.start() < position < mark.end():
            return mark.start()
    return position


def _common(first: str, second: str) -> int:
    """The number of characters at their beginning in which two texts agree."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first.startswith(second[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _difference(before: str, text: str) -> str:
    """Where the text with an answer leaves the text that asks for it, in a few words."""
    same = _common(before, text)
    part = slice(max(0, same - 20), same + 20)
    return f"it asks with {before[part]!r} and writes {text[part]!r}"
