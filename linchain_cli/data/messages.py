"""Conversations as people store them, made into one form: see `conversation.Conversation`.

OpenAI's `messages`, ShareGPT's `conversations` (from/value), a prompt and its completion as messages; each as
lists of objects or as their JSON text, with tool calls, reasoning, and content in parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from linchain_cli.data.conversation import Conversation, Message, ToolCall
from linchain_cli.data.readers import WrittenNumber, shown
from linchain_cli.data.rows import Row, RowError
from linchain_cli.errors import nearest

# ShareGPT's names, those that LLaMA-Factory adds, and the usual ones.
_ROLES = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "bot", "model", "function_call")},
    **{name: "tool" for name in ("tool", "observation", "function_response", "function")},
    "system": "system",
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Of OpenAI's form, in which a role may also be one that a template knows (ipython, observation, ...).
_ROLE_NAMES = {name: name for name in ROLES} | {
    name: role for name, role in _ROLES.items() if role in ("user", "assistant")
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
# OpenAI's and Mistral's, Axolotl's two, ms-swift's, LLaMA-Factory's.
_LEARNED = ("weight", "train", "training", "loss", "loss_weight")
_IN_PART = ("train_detail", "training_detail")  # Axolotl's marks of parts of a turn
_LIKE_A_MARK = re.compile(r"(^|_)(loss|mask|masked|train|trained|trainable|weight|weights)(_|$)")
_TEXT_OF_PART = ("text", "content", "value")
_JSON_LIST = re.compile(r"\s*\[\s*\{")
_PYTHON_LIST = re.compile(r"\s*\[\s*\{\s*'")  # what pandas and csv write of one


def conversation(messages: list[Message], beside: Mapping[str, Any]) -> Conversation:
    """The row of the `chat` template. `beside` are the row's other columns, of which `tools` (`functions`, in
    OpenAI's older form), `system` and `chat_template_kwargs` are read."""
    made: Conversation = {"messages": with_system(messages, beside.get("system"))}
    if tools := tools_of(beside.get("tools")) or tools_of(beside.get("functions"), "functions"):
        made["tools"] = tools
    if options := _options_of(beside.get("chat_template_kwargs")):
        made["options"] = options
    return made


def messages_of(value: Any, column: str) -> list[Message]:
    """The turns in a cell, or the one: objects with role and content, or with from and value.

    Raises RowError, naming the turn, for what is no such list, has a part that is no text, or a tool call
    that cannot be read."""
    value = _columns_to_rows(parsed(value, column))
    if are_turns([value]):
        value = [value]
    if not isinstance(value, list) or not value:
        raise RowError(f"'{column}' is not a list of turns like {{role: user, content: ...}}")
    return [_message(turn, f"turn {number} of '{column}'") for number, turn in enumerate(value, start=1)]


def asked_and_answered(prompt: Any, completion: Any, names: tuple[str, str]) -> list[Message]:
    """The turns of a prompt and its completion, of which the completion's alone are learned."""
    asked = messages_of(prompt, names[0]) if is_messages(prompt) else [{"role": "user", "content": prompt}]
    if is_messages(completion):
        return [*_unlearned(asked), *messages_of(completion, names[1])]
    return [*_unlearned(asked), {"role": "assistant", "content": completion}]


def is_messages(value: Any) -> bool:
    """Whether a prompt or completion is written as turns, not as text, which may be JSON of another kind."""
    if isinstance(value, str) and _JSON_LIST.match(value):
        try:
            return are_turns(json.loads(value))
        except (ValueError, RecursionError):
            return False
    return isinstance(value, (list, dict))


def are_turns(value: Any) -> bool:
    """Whether a list begins with what somebody says."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def tools_of(value: Any, column: str = "tools") -> list[dict[str, Any]]:
    """The tools of a conversation as OpenAI writes them; a bare function is put into that form."""
    value = parsed(value, column) if value else None
    if not value:
        return []
    if not isinstance(value, list) or not all(map(_is_tool, value)):
        raise RowError(f"'{column}' is not a list of tools like {{type: function, function: {{name: ...}}}}")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
        for tool in map(_without_null, value)
    ]


def _is_tool(value: Any) -> bool:
    function = _without_null(value).get("function", value) if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name", ""), str)


def _options_of(value: Any) -> dict[str, Any]:
    """Variables of the chat template that a row has of its own, as TRL reads them."""
    value = parsed(value, "chat_template_kwargs") if value else {}
    if not isinstance(value, dict):
        raise RowError(
            f"'chat_template_kwargs' is {shown(value)}, not an object like {{enable_thinking: false}}"
        )
    return _without_null(value)


def conversation_of(row: Row) -> Conversation:
    """A row that is a conversation, or an instruction row as one: a user turn (with its input below) and an
    answer, behind what was said before."""
    if "messages" in row:
        return row
    asked = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    turns = [*row.get("history", ()), (asked, row.get("output"))]
    said = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text is not None
    ]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {"messages": [*system, *said]}


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The turns behind a system prompt that stands in a column of its own."""
    if not system or messages[0] == {"role": "system", "content": system}:
        return messages
    if not isinstance(system, str):
        raise RowError(f"'system' is {shown(system)}, where a text is expected")
    if messages[0]["role"] == "system":
        raise RowError("there is a system prompt in a column of its own and another among the turns")
    return [{"role": "system", "content": system}, *messages]


def pruned(value: Any) -> Any:
    """Without the nulls that a table writes for keys that other rows have, at any depth."""
    if isinstance(value, dict):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    return [pruned(item) for item in value] if isinstance(value, list) else value


def _unlearned(messages: Iterable[Message]) -> list[Message]:
    return [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in messages]


def parsed(value: Any, name: str) -> Any:
    """A list, or one out of its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_float=WrittenNumber)
    except (ValueError, RecursionError):
        pythons = "; it is Python's: write it with json.dumps" if _PYTHON_LIST.match(value) else ""
        raise RowError(
            f"'{name}' is {shown(value)}, which is neither a list nor the JSON text of one{pythons}"
        ) from None


def _columns_to_rows(value: Any) -> Any:
    """A list of objects that was stored as an object of lists."""
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        if len({len(cells) for cells in value.values()}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return value


def _without_null(turn: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if value is not None}


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(f"{place} is {shown(turn)}, not an object with role and content")
    turn = _without_null(turn)
    if "role" not in turn and "from" in turn or turn.get("role") == "function_call":
        turn = _of_share_gpt(turn, place)
    elif "value" in turn and "content" not in turn:
        turn["content"] = turn.pop("value")
    role, content = turn.get("role"), turn.get("content")
    if type(role) is str and type(content) is str and len(turn) == 2 and role in ROLES:
        return turn  # most are like this
    return _whole_message(turn, place)


def _whole_message(turn: dict[str, Any], place: str) -> Message:
    role = turn.pop("role", None)
    if not isinstance(role, str) or not role:
        found = f", it has {', '.join(map(shown, turn))}" if turn else ""
        raise RowError(f"{place} needs a role and a content (or from and value){found}")
    role = _ROLE_NAMES.get(role.lower(), role)
    if role not in ROLES and (meant := nearest(role, ROLES, 0.8)):
        raise RowError(f"{place} has the role {role!r}, where '{meant}' seems to be meant")
    parts = turn["content"] if isinstance(turn.get("content"), list) else None
    if parts is not None:
        turn |= _of_parts(parts, place)
    calls = _tool_calls(turn, place)
    learned = _learned(turn, place)
    if role == "assistant":
        _refuse_unknown_marks([turn, *(parts or ())], place)
    reasoning = [turn.pop(name) for name in _REASONING if turn.get(name)]
    if "content" not in turn and not calls and not reasoning:
        other = ", ".join(name for name in turn if name not in (*_REASONING, "tool_calls"))
        raise RowError(f"{place} has no content" + (f" (it has {other})" if other else ""))
    message: Message = {"role": role, "content": _text(turn.pop("content", ""), place)}
    if reasoning:
        message["reasoning_content"] = _text(reasoning[0], place)
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and not learned:
        message["train"] = False
    return {**message, **{key: value for key, value in turn.items() if key not in _REASONING}}


def _of_share_gpt(turn: dict[str, Any], place: str) -> dict[str, Any]:
    speaker = turn.pop("from", "") or turn.pop("role", "")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{place} is from {shown(speaker)}; known are {', '.join(_ROLES)}")
    content = turn.pop("value", turn.pop("content", None))
    if speaker == "function_call":
        calls = parsed(content, place)
        return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls], **turn}
    return {"role": role, **({} if content is None else {"content": content}), **turn}


def _of_parts(content: list[Any], place: str) -> dict[str, Any]:
    """What a content in parts says: its text, what is thought and called, and whether it is learned."""
    texts, thoughts, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "tool_call":
            calls.append(parsed(part.get("value", part), place))
        else:
            (thoughts if kind in _REASONING else texts).append(_part(part, place))
    marks = {bool(_learned(dict(part), place)) for part in content if isinstance(part, dict)}
    if len(marks) > 1:
        raise RowError(
            f"{place} has parts that are learned and others that are not: a turn is learned whole or not at "
            "all. Write them as turns of their own, or take the marks out"
        )
    found: dict[str, Any] = {"content": "".join(texts)}
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found | ({"train": False} if marks == {False} else {})


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    raise RowError(f"{place}: the content is {shown(content)}, where a text is expected")


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind == "text" or kind in _REASONING:
        names = (kind, *_TEXT_OF_PART)
        text = next((part[name] for name in names if isinstance(part.get(name), str)), None)
        if text is not None:
            return text
    raise RowError(f"{place} has a part of type {shown(kind)}: only text can be learned from")


def _tool_calls(turn: dict[str, Any], place: str) -> list[ToolCall]:
    calls = turn.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = parsed(calls, f"tool_calls of {place}")
    calls = _columns_to_rows(calls) or []
    if not isinstance(calls, list):
        raise RowError(f"{place}: tool_calls is {shown(calls)}, not a list")
    if call := turn.pop("function_call", None):  # OpenAI's older form, of one call
        calls = [*calls, call]
    return [_tool_call(call, place) for call in calls]


def _tool_call(call: Any, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{place}: a tool call needs a function with a name, it is {shown(call)}")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_float=WrittenNumber) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise RowError(
                f"{place}: the arguments of '{function['name']}' are no JSON: {shown(arguments)}"
            ) from None
    if arguments is not None and not isinstance(arguments, dict):
        raise RowError(f"{place}: the arguments of '{function['name']}' are no object: {shown(arguments)}")
    made: ToolCall = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or {}},
    }
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _learned(turn: dict[str, Any], place: str) -> bool:
    if part := next((name for name in _IN_PART if turn.get(name)), None):
        raise RowError(f"{place} has {part}: a turn is learned whole or not at all. Take {part} out of it")
    marks = [(name, turn.pop(name)) for name in _LEARNED if turn.get(name) is not None]
    for name, mark in marks:
        if mark not in (0, 1):
            raise RowError(
                f"{place}: {name} is {shown(repr(mark))}; it can be 1 or true (learned), or 0 or false (read "
                "alone)"
            )
    return all(mark for _, mark in marks)


def _refuse_unknown_marks(items: Iterable[Any], place: str) -> None:
    """Raises RowError for a key that seems to say what of an answer is learned, in words of another tool."""
    names = (name for item in items if isinstance(item, dict) for name in item if name not in _LEARNED)
    if unknown := next((name for name in names if _LIKE_A_MARK.search(name)), None):
        raise RowError(
            f"{place} has {shown(unknown)}, which is no mark that is known here: write `train: false` on "
            "what is not to be learned, or take it out"
        )
