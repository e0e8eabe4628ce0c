"""Whether a chat template writes all that a conversation holds: what it drops must not be dropped unseen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from linchain_cli.data.conversation import Message
from linchain_cli.data.rows import RowError

_THINKING = re.compile(r"</?think>")
_REASONING = "the reasoning"
_REMEDY = "give a template that writes it (data.chat.template)"


def check_answer(message: Message, written: str, turn: int) -> bool:
    """Whether the template trims the white space around an answer; raises RowError if it leaves more out.

    `written` is what it writes for `message`, which is turn number `turn` of its conversation.
    """
    who = f"turn {turn}, the assistant's"
    missing = next(_missing(message, written), None)
    if missing is not None:
        or_write = "write it into the content (<think>...</think>), " if missing == _REASONING else ""
        raise RowError(
            f"the chat template leaves {missing} out of {who}. Take it out of the row, {or_write}or {_REMEDY}"
        )
    content = message["content"]
    if not content or content in written or _THINKING.search(content):
        return False
    body = content.strip()
    indent = content[: content.index(body)].rpartition("\n")[2]
    others = [line for line in body.splitlines()[1:] if line.strip()]
    if indent and others and all(line.startswith(indent) for line in others) and indent + body not in written:
        raise RowError(
            f"the chat template trims the indentation of {who}, in its first line alone. Take it out of all "
            f"lines, or {_REMEDY}"
        )
    return True


def check_read(messages: Sequence[Message], text: str) -> None:
    """Raises RowError if something that the model should read, and not answer, is not in `text`."""
    for message in messages:
        if not _stands_in(message["content"], text):
            what = f"what the {message['role']} says ({_shown(message['content'])})"
            raise RowError(f"the chat template leaves out {what}. Take it out of the row, or {_REMEDY}")


def check_tools(tools: Sequence[Mapping[str, Any]], text: str, without: str) -> None:
    """Raises RowError if a tool's name does not stand in `text` more often than in the text `without` tools:
    calls and questions name it, too."""
    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if text.count(name) <= without.count(name):
            raise RowError(f"the chat template leaves out `tools`. Take them out of the row, or {_REMEDY}")


def _missing(message: Message, written: str) -> Iterator[str]:
    """What of an answer does not stand in `written`, white space around it aside."""
    if message.get("reasoning_content", "").strip() not in written:
        yield _REASONING
    body = message["content"].strip()
    if body not in written:
        # Templates that know reasoning set it apart, with white space of their own.
        yield from (_shown(part.strip()) for part in _THINKING.split(body) if part.strip() not in written)
    for call in message.get("tool_calls", ()):
        function = call["function"]
        if function["name"] not in written:
            yield f"the call of {function['name']}"
        for value in _values(function["arguments"]):
            if not _stands_in(value, written):
                yield f"{_shown(str(value))}, of the call of {function['name']},"


def _values(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list):
        for item in arguments:
            yield from _values(item)
    elif arguments is not None:
        yield arguments


def _stands_in(value: Any, text: str) -> bool:
    """Whether a value stands there as it is or as JSON."""
    return str(value).strip() in text or any(
        json.dumps(value, ensure_ascii=ascii_only).strip('"') in text for ascii_only in (False, True)
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
