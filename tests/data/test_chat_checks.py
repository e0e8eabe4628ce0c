"""Chat templates that leave out, trim or rewrite what a conversation holds: refused, or said."""

from __future__ import annotations

import pytest

from linchain_cli.data.rows import RowError
from linchain_cli.errors import InputError

from .chat_templates import (
    CHATML,
    CONVERSATION,
    LLAMA3,
    TOOLS,
    TURNS,
    assistant,
    call,
    learned,
    template_of,
    user,
)

DELETES = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
CALLS_ALONE = CHATML.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
)


@pytest.mark.parametrize(
    "source, answer, said",
    [
        (DELETES, assistant("<think>because</think>4"), "leaves 'because' out of turn 2"),
        (
            CHATML,
            assistant("4", reasoning_content="because"),
            "leaves the reasoning out of turn 2.*write it into the content",
        ),
        (CHATML, assistant("", tool_calls=call(city="Paris")), "leaves the call of weather out of turn 2"),
        (
            CALLS_ALONE,
            assistant("", tool_calls=call(city="Paris")),
            "leaves 'Paris', of the call of weather, out",
        ),
        (LLAMA3, assistant("    if x:\n        return 1"), "trims the indentation of turn 2"),
        (CHATML.replace("m.content }}", "m.content[:9] }}"), assistant("a long answer"), "leaves 'a long"),
    ],
)
def test_an_answer_that_is_not_written_whole_is_refused(byte_level, source, answer, said):
    with pytest.raises(RowError, match=said):
        template_of(byte_level, source).render({"messages": [user("2 + 2"), answer]})


def test_white_space_around_an_answer_may_be_trimmed_and_is_said(byte_level):
    row = {"messages": [user(" one? "), assistant("\n ein \n"), user("two?"), assistant("zwei")]}
    (rendered,) = template_of(byte_level, LLAMA3).render(row)
    assert [rendered.text[s:e] for s, e in rendered.spans] == ["ein<|eot|>", "zwei<|eot|>"]
    assert rendered.remarks == ("the chat template trims the white space around answers",)
    assert template_of(byte_level, CHATML).render(row)[0].remarks == ()
    for harmless in ("\n\nfirst\n  second\n", " Sure:\n\n- one\n  - two", "    return 1"):
        (rendered,) = template_of(byte_level, LLAMA3).render({"messages": [user("x"), assistant(harmless)]})
        assert rendered.remarks


def test_reasoning_in_the_content_may_be_set_apart(byte_level):
    apart = CHATML.replace(
        "{{ m.content }}",
        "{% set parts = m.content.split('</think>') %}{% if parts | length > 1 %}<think>\n"
        "{{ parts[0].split('<think>')[-1] | trim }}\n</think>\n\n{% endif %}{{ parts[-1] | trim }}",
    )
    row = {"messages": [user("x"), assistant("<think>because</think>4")]}
    assert learned(template_of(byte_level, apart), row) == [["<think>\nbecause\n</think>\n\n4<|im_end|>"]]


@pytest.mark.parametrize(
    "source, row, said",
    [
        (
            CHATML.replace("%}<|im", "if m.role != 'system' %}<|im", 1),
            CONVERSATION,
            "leaves out what the system says",
        ),
        (CHATML, {"messages": TURNS, "tools": TOOLS}, "leaves out `tools`"),
        # A call, too, names the tool.
        (
            CALLS_ALONE,
            {
                "messages": [user("x"), assistant("", tool_calls=call()), user("weather?"), assistant("y")],
                "tools": TOOLS,
            },
            "leaves out `tools`",
        ),
    ],
)
def test_what_the_model_should_read_is_not_left_out_unseen(byte_level, source, row, said):
    with pytest.raises(RowError, match=said):
        template_of(byte_level, source).render(row)


def test_turns_that_are_rewritten_beyond_recognition_are_refused_by_row(byte_level):
    shouting = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    with pytest.raises((RowError, InputError), match="cannot be located"):
        template_of(byte_level, shouting).render(CONVERSATION)
