"""Published chat templates: every one trains, and what is learned is what others mark as the assistant's.

TRL brings the templates of many model families, and of most a variant that marks what the assistant writes
with {% generation %}: a reference made by other people and another method. $LINCHAIN_CHAT_TEMPLATES names a
directory with NAME.jinja and NAME_training.jinja to take instead.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.rows import Rendered, RowError

Message = dict[str, Any]


def _directory() -> Path | None:
    if named := os.environ.get("LINCHAIN_CHAT_TEMPLATES"):
        return Path(named)
    spec = importlib.util.find_spec("trl")
    return Path(spec.submodule_search_locations[0]) / "chat_templates" if spec else None


DIRECTORY = _directory()
FILES = sorted(DIRECTORY.glob("*.jinja")) if DIRECTORY else []
NAMES = [file.stem for file in FILES if not file.stem.endswith("_training")]

pytestmark = pytest.mark.skipif(not NAMES, reason="needs TRL, or LINCHAIN_CHAT_TEMPLATES")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def three(**last: Any) -> list[Message]:
    """Three questions and answers; `last` goes into the last answer."""
    return [
        user("one?"),
        assistant("eins"),
        user("two?"),
        assistant("zwei"),
        user("three?"),
        assistant("drei", **last),
    ]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
        },
    },
}
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "get_weather", "arguments": {"city": "Paris"}},
}
RESULT = {"role": "tool", "content": "22 C", "name": "get_weather", "tool_call_id": "abcdefghi"}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": three()[:2]},
    "three turns": {"messages": three()},
    "system prompt": {"messages": [{"role": "system", "content": "Be brief."}, *three()]},
    "thinking in the last": {"messages": three(reasoning_content="one more")},
    "thinking in each": {
        "messages": [
            {**message, "reasoning_content": f"thought {turn}"} if message["role"] == "assistant" else message
            for turn, message in enumerate(three())
        ]
    },
    "thinking in the text": {
        "messages": [
            {**message, "content": f"<think>\nthought {turn}\n</think>\n\n{message['content']}"}
            if message["role"] == "assistant"
            else message
            for turn, message in enumerate(three())
        ]
    },
    "white space": {
        "messages": [user("  one? \n"), assistant("\n eins \n"), user("two?"), assistant("  zwei  ")]
    },
    "tool": {
        "messages": [user("Warm?"), assistant("", tool_calls=[CALL]), RESULT, assistant("It is.")],
        "tools": [TOOL],
    },
}

# What other people's variants mark and ours does not, or the other way, on purpose.
MARKED_OTHERWISE = {
    # After a tool's result it asks without the header that it writes in front of the answer, and a call ends
    # in the token that opens the result: the model writes both itself.
    ("diffusion_gemma", "tool"),
}


def template_of(tokenizer, name: str) -> ChatTemplate:
    """The template with a tokenizer that has its control tokens, as where both come from one model."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
    marks = re.findall(r"<[^<>\s{}'\"]+>|\[/?[A-Z_]+\]", tokenizer.chat_template)
    tokenizer.add_tokens(sorted(set(marks)), special_tokens=True)
    return ChatTemplate(tokenizer)


def marked(
    tokenizer, name: str, template: ChatTemplate, messages: list[Message], tools
) -> tuple[str, set[int]]:
    """(the text of the variant with marks, the positions of the characters that it marks)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (DIRECTORY / f"{name}_training.jinja").read_text(encoding="utf-8")
    source = re.sub(r"strftime_now\((['\"]).*?\1\)", "'2024-07-26'", source)
    texts, blocks = render_jinja_template(
        [[template._write._as_read(message) for message in messages]],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], {position for start, end in blocks[0] for position in range(start, end)}


def behind(text: str, message: Message) -> int:
    """Where `text` goes on after what `message` says: from there on it asks for the answer to it."""
    said = message["content"].strip()
    return text.rindex(said) + len(said)


def last_word(message: Message) -> str:
    return message["content"].split()[-1] if message["content"] else "get_weather"


def turn_of(messages: list[Message], written: str) -> int:
    """Which assistant turn is written there."""
    return next(
        turn
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and last_word(message) in written
    )


def compare(
    tokenizer, name: str, template: ChatTemplate, row: Rendered, messages: list[Message], tools
) -> None:
    """`row` ends with the answer that ends `messages`; the reference has to mark the same of it."""
    text, marks = marked(tokenizer, name, template, messages, tools)
    own = {position for start, end in row.spans for position in range(start, end)}
    if text.startswith(row.text):
        asking = set()
        for start, end in row.spans:
            turn = turn_of(messages, text[start:end])
            asking |= set(range(behind(text[:start], messages[turn - 1]), start))
        earlier = {p for p in marks if p < row.spans[0][0]} if len(row.spans) == 1 else set()
        differ = {p for p in (own ^ marks) - asking - earlier if not text[p].isspace()}
        assert not differ, "".join(text[p] for p in sorted(differ))
    else:  # the variant writes the turns before otherwise; the answer itself has to be the same
        said = behind(text[: text.rindex(last_word(messages[-1]))], messages[-2])
        theirs = "".join(text[p] for p in sorted(marks) if p >= said).strip()
        ours = row.text[row.spans[-1][0] :].strip()
        assert theirs.endswith(ours)
        assert row.text[: row.spans[-1][0]].rstrip().endswith(theirs.removesuffix(ours).rstrip())


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_is_what_others_mark(byte_level, name, conversation):
    template = template_of(byte_level, name)
    found = CONVERSATIONS[conversation]
    messages, tools = found["messages"], found.get("tools")
    try:
        rows = template.render(found)
    except RowError as error:
        refused_rightly(template, found, str(error))
        return
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    assert sum(len(row.spans) for row in rows) == len(answers), "each answer is learned once"
    if (DIRECTORY / f"{name}_training.jinja").exists() and (name, conversation) not in MARKED_OTHERWISE:
        for row in rows:
            last = turn_of(messages, row.text[row.spans[-1][0] :])
            compare(byte_level, name, template, row, messages[: last + 1], tools)


def refused_rightly(template: ChatTemplate, conversation: dict[str, Any], said: str) -> None:
    """The template refuses the conversation itself, or its text lacks what was found missing."""
    try:
        text = template._write(conversation["messages"], conversation.get("tools"))
    except RowError:
        return
    if "leaves the reasoning out" in said:
        turn = int(re.search(r"turn (\d+)", said).group(1))
        text = template._write(conversation["messages"][:turn], conversation.get("tools"))
        assert conversation["messages"][turn - 1]["reasoning_content"] not in text
    elif "leaves 'thought" in said:
        assert re.search(r"'(thought \d)'", said).group(1) not in text
    elif "leaves the call of get_weather out" in said:
        assert "Paris" not in text
    elif "leaves out `tools`" in said:
        assert "The weather of a city" not in text
    else:
        raise AssertionError(said)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_that_end_a_turn_are_known(byte_level, name):
    marks = template_of(byte_level, name).end_marks()
    assert marks and all(" " not in mark for mark in marks)
    known = {
        "glm4moe": ["<|user|>", "<|observation|>"],
        "gptoss": ["<|return|>", "<|call|>"],
        "qwen3": ["<|im_end|>"],
        "llama3_1": ["<|eot_id|>"],
        "cohere2": ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"],
        "phi3": ["<|end|>", byte_level.eos_token],
    }
    assert marks == known.get(name, marks)
