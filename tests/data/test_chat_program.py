"""Chat templates as programs: tools, arguments, dates, options, and what goes wrong in one."""

from __future__ import annotations

import copy
import json

import pytest

from linchain_cli.data.rows import RowError
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

from .chat_templates import (
    CHATML,
    CONVERSATION,
    LLAMA3,
    REASONING,
    TOOLS,
    TURNS,
    WITH_TOOL,
    assistant,
    call,
    learned,
    template_of,
    user,
)


def test_tools_are_the_template_s_to_write(byte_level):
    template = template_of(byte_level, "{% if tools %}{{ tools | tojson }}{% endif %}" + REASONING)
    (rendered,) = template.render({**WITH_TOOL, "tools": TOOLS})
    assert rendered.text.startswith(json.dumps(TOOLS))
    assert template.prompt({**WITH_TOOL, "tools": TOOLS}).startswith(json.dumps(TOOLS))


@pytest.mark.parametrize(
    "written, expected",
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "München"}'),
        ("{{ c.function.name + '(' + c.function.arguments + ')' }}", 'weather({"city": "München"})'),
        ("{{ c.function.arguments }}", '{"city": "München"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=München"),
        ("{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
         "{{ c.function.arguments | tojson }}{% endif %}", '{"city": "München"}'),
    ],
)  # fmt: skip
def test_arguments_are_never_encoded_twice_nor_as_python(byte_level, written, expected):
    calls = f"weather {{% for c in m.tool_calls or [] %}}{written}{{% endfor %}}"
    source = CHATML.replace("{{ m.content }}", "{{ m.content }}" + calls)
    row = {"messages": [user("x"), assistant("", tool_calls=call(city="München"))]}
    assert learned(template_of(byte_level, source), row) == [[f"weather {expected}<|im_end|>"]]


def test_a_template_that_writes_no_answer_is_refused_before_any_row(byte_level):
    with pytest.raises(InputError, match="writes no answers.*Use another template"):
        template_of(byte_level, "{{ messages[0].content }}")
    with pytest.raises(InputError, match="refuses the conversation: never"):
        template_of(byte_level, "{{ raise_exception('never') }}")


def test_a_tokenizer_without_a_chat_template_is_refused(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template.*data.chat.template"):
        get_template("chat", tokenizer)


@pytest.mark.parametrize(
    "trouble",
    [
        "raise_exception('no')",
        "1 / 0",
        "messages[9].content",
        "none + 1",
        "messages.nothing()",
        "'x' | first[3]",
    ],
)
def test_whatever_a_template_runs_into_is_a_row_error(byte_level, trouble):
    source = f"{{% if messages[0].role == 'system' %}}{{{{ {trouble} }}}}{{% endif %}}" + CHATML
    try:
        template = template_of(byte_level, source)
    except InputError as error:
        assert "data.template: the model's chat template, line 1: " in str(error)
        return
    with pytest.raises(RowError, match="refuses the conversation: ."):
        template.render(CONVERSATION)


def test_a_template_may_differ_for_rows_with_tools(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = {
        "default": CHATML,
        "tool_use": "tools: {{ tools[0].function.name }}\n" + REASONING,
    }
    template = get_template("chat", tokenizer)
    assert template.render({"messages": TURNS})[0].text.startswith("<|im_start|>")
    assert template.render({**WITH_TOOL, "tools": TOOLS})[0].text.startswith("tools: weather\n<|user|>")


def test_a_date_in_the_template_is_held_still(byte_level):
    dated = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "{{ date_string }}"
    )
    asked = {"instruction": "x"}
    assert template_of(byte_level, dated + CHATML).prompt(asked).startswith("26 Jul 2024<")
    now = template_of(byte_level, "{{ strftime_now('%Y-%m-%d %H:%M') }}" + CHATML)
    assert now.prompt(asked).startswith("2024-07-26 00:00<")
    other = template_of(byte_level, dated + CHATML, options={"date_string": "1 May 2026"})
    assert other.prompt(asked).startswith("1 May 2026<")
    assert other.fingerprint != template_of(byte_level, dated + CHATML).fingerprint


def test_the_text_is_what_transformers_writes(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    for source in (CHATML, LLAMA3, REASONING, "{{ tools | tojson(indent=2) }}" + REASONING):
        tokenizer.chat_template = source
        theirs = tokenizer.apply_chat_template(WITH_TOOL["messages"], tools=TOOLS, tokenize=False)
        program = get_template("chat", tokenizer)._write
        assert program(WITH_TOOL["messages"], TOOLS) == theirs


def test_a_template_file_options_and_a_system_prompt_of_ones_own(byte_level, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% if not enable_thinking %}/no{% endif %}" + CHATML)
    template = template_of(
        byte_level, LLAMA3, template=str(file), options={"enable_thinking": False}, system="Hi."
    )
    assert template.prompt({"instruction": "x"}).startswith("/no<|im_start|>system\nHi.<|im_end|>")
    assert "Hi." not in template.prompt(CONVERSATION), "a conversation keeps its own"
    fingerprints = {
        template_of(byte_level, CHATML, **settings).fingerprint
        for settings in (
            {},
            {"options": {"a": 1}},
            {"system": "Hi."},
            {"system": ""},
            {"template": str(file)},
        )
    }
    assert len(fingerprints) == 5


def test_where_a_template_of_ones_own_is_wrong_is_said(byte_level):
    with pytest.raises(InputError, match="data.chat.template, line 3: "):
        template_of(byte_level, CHATML, template="a\n{% for m in messages %}\n{{ m.content }")
    with pytest.raises(InputError, match=r"No filter named 'shout'\.$"):
        template_of(byte_level, CHATML, template="{% for m in messages %}{{ m.content | shout }}{% endfor %}")
