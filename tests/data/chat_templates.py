"""Conversations, and templates each of which is as short as shows one behaviour of those that models come
with."""

from __future__ import annotations

import copy
import re
from typing import Any

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.templates import get_template
from linchain_cli.recipe import ChatConfig


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(**arguments: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}]


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [user("one?"), assistant("ein end"), user("two?"), assistant("zwei")]
CONVERSATION = {"messages": [SYSTEM, *TURNS, user("dropped")]}
WITH_TOOL = {
    "messages": [
        user("Is it warm?"),
        assistant("", reasoning_content="look it up", tool_calls=call(city="Paris")),
        {"role": "tool", "content": "22 C"},
        assistant("It is."),
    ]
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim "
    "}}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}<<{{ m.content }}>>{% elif m.role == 'user' %}"
    "<s>[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)
# Closes the conversation with more than a turn (Phi-3).
CLOSED_TWICE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
# Ends the last answer with another token than the earlier ones (gpt-oss).
RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Writes a block in front of the answer to the last question, and earlier answers without it (Qwen3).
REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Closes no turn: the next one's first token does (GLM-4.5).
OPENS_ONLY = (
    "{% for m in messages %}<|{{ {'tool': 'observation'}.get(m.role, m.role) }}|>\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}</call>{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Asks with a word that it writes in front of no answer (DeepSeek-R1).
DEPARTS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Drops a call's reasoning once its result is answered (gpt-oss).
FORGETS = (
    "{% for m in messages %}"
    "{% set later = messages[loop.index:] | selectattr('role', 'eq', 'assistant') | list %}"
    "{% if m.reasoning_content and not later %}<|start|>assistant<|think|>{{ m.reasoning_content }}<|end|>"
    "{% endif %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Reads texts as lists of parts alone (LLaVA).
IN_PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


def template_of(tokenizer, source: str, turns: str = "all", **settings: Any) -> ChatTemplate:
    """The template with a tokenizer that has its control tokens, as where both come from one model."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(sorted(set(re.findall(r"<\|\w+\|>", source))), special_tokens=True)
    tokenizer.chat_template = source
    return get_template("chat", tokenizer, ChatConfig(**settings), turns)


def learned(template: ChatTemplate, row: dict[str, Any]) -> list[list[str]]:
    """What is supervised of each training row that `row` becomes."""
    return [[rendered.text[start:end] for start, end in rendered.spans] for rendered in template.render(row)]
