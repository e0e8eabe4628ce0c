"""A conversation, as every format of rows hands it over and as the chat template is given it."""

from __future__ import annotations

from typing import Any, Required, TypedDict


class ToolCall(TypedDict, total=False):
    """One call, in OpenAI's form: `arguments` is the object itself, never its JSON text."""

    id: str
    type: Required[str]  # "function"
    function: Required[dict[str, Any]]  # {"name": str, "arguments": dict}


class Message(TypedDict, total=False):
    """One turn. A key without a value is absent, never null: templates ask whether it is there.

    Other keys that a row has (`name`, `refusal`, ...) go to the template as they are.
    """

    role: Required[str]  # "system", "developer", "user", "assistant" or "tool"
    content: Required[str]  # "" where a message is only tool calls
    reasoning_content: str  # what an assistant thought before it answered, under whatever name it came
    tool_calls: list[ToolCall]  # not empty
    tool_call_id: str
    train: bool  # False: an assistant's turn that is read and not learned; nothing else is ever written


class Conversation(TypedDict, total=False):
    """A row of the `chat` template; `tools` are JSON schemas in OpenAI's form, `options` variables of the
    template that this row has of its own. Both are absent if there are none."""

    messages: Required[list[Message]]
    tools: list[dict[str, Any]]
    options: dict[str, Any]
