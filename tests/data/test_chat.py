"""Chat templates: what is learned of a conversation, over the ways in which templates write one.

Each template here is as short as shows one behaviour of those that models come with; test_chat_published.py
takes published ones.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.rows import RowError
from linchain_cli.data.templates import end_tokens, get_template
from linchain_cli.errors import InputError
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
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return get_template("chat", tokenizer, ChatConfig(**settings), turns)


def learned(template: ChatTemplate, row: dict[str, Any]) -> list[list[str]]:
    """What is supervised of each training row that `row` becomes."""
    return [[rendered.text[start:end] for start, end in rendered.spans] for rendered in template.render(row)]


@pytest.mark.parametrize(
    "source, rows",
    [
        (CHATML, [["ein end<|im_end|>", "zwei<|im_end|>"]]),
        (LLAMA3, [["ein end<|eot|>", "zwei<|eot|>"]]),
        (LLAMA2, [[" ein end </s>", " zwei </s>"]]),
        (CLOSED_TWICE, [["ein end<|end|>", "zwei<|end|>\n<|endoftext|>"]]),
        (RETURNS, [["<|message|>ein end<|return|>"], ["<|message|>zwei<|return|>"]]),
        (
            REASONING,
            [["<think>\n\n</think>\n\nein end<|end|>"], ["<think>\n\n</think>\n\nzwei<|end|>"]],
        ),
        (OPENS_ONLY, [["ein end<|user|>", "zwei<|user|>"]]),
        (UNCLOSED, [["ein end", "zwei"]]),
        (DEPARTS, [["ein end<|im_end|>", "zwei<|im_end|>"]]),
        (IN_PARTS, [["ein end<|im_end|>", "zwei<|im_end|>"]]),
    ],
)
def test_what_the_assistant_writes_is_learned_and_how_it_ends(byte_level, source, rows):
    template = template_of(byte_level, source)
    assert learned(template, CONVERSATION) == rows
    for rendered in template.render(CONVERSATION):
        assert rendered.text.endswith(rows[-1][-1]) or len(rows) > 1
        assert rendered.spans[-1][1] == len(rendered.text)
        assert "dropped" not in rendered.text
        assert rendered.ends == (source == UNCLOSED), "EOS belongs where the template ends no answer itself"


ALL = [CHATML, LLAMA3, LLAMA2, CLOSED_TWICE, RETURNS, REASONING, OPENS_ONLY, UNCLOSED, DEPARTS, IN_PARTS]


@pytest.mark.parametrize("source", ALL)
def test_what_is_trained_on_begins_with_what_is_asked(byte_level, source):
    template = template_of(byte_level, source)
    messages = {"messages": CONVERSATION["messages"][:5]}
    last = template.render(messages)[-1]
    prompt = template.prompt(messages)
    assert last.text[: last.spans[-1][0]] == prompt
    completed = template.complete(messages, "drei")
    assert completed.text.startswith(prompt) and completed.text.endswith("drei")
    assert template.prompt({"messages": CONVERSATION["messages"][:4]}) == prompt


def test_each_row_of_a_conversation_reads_what_the_model_will_read(byte_level):
    template = template_of(byte_level, REASONING)
    turns = [user("one?"), assistant("eins", reasoning_content="1"), user("two?"), assistant("zwei")]
    first, second = template.render({"messages": turns})
    assert first.text == template.prompt({"messages": turns[:1]}) + "<think>\n1\n</think>\n\neins<|end|>"
    assert second.text == template.prompt({"messages": turns[:3]}) + "<think>\n\n</think>\n\nzwei<|end|>"
    assert "<|assistant|>\neins<|end|>" in second.text


def test_answers_that_stand_as_they_were_asked_for_share_a_row(byte_level):
    """A call and the answer to its result: both are written with their reasoning, no question between."""
    (row,) = learned(template_of(byte_level, REASONING), WITH_TOOL)
    assert row == [
        '<think>\nlook it up\n</think>\n\n<call>weather{"city": "Paris"}</call><|end|>',
        "<think>\n\n</think>\n\nIt is.<|end|>",
    ]
    first, second = learned(
        template_of(byte_level, REASONING),
        {"messages": [*WITH_TOOL["messages"], user("Thanks"), assistant("Welcome")]},
    )
    assert first == row and second == ["<think>\n\n</think>\n\nWelcome<|end|>"]


def test_where_no_turn_is_closed_the_next_one_s_first_token_ends_it(byte_level):
    rows = learned(template_of(byte_level, OPENS_ONLY), {"messages": [
        user("Warm?"), assistant("", tool_calls=call(city="Paris")), {"role": "tool", "content": "22 C"},
        assistant("It is.")]})  # fmt: skip
    assert rows == [["<call>weather<city>Paris</call><|observation|>", "It is.<|user|>"]]


def test_what_was_asked_is_kept_where_the_template_rewrites_it(byte_level):
    (row,) = template_of(byte_level, FORGETS).render(WITH_TOOL)
    assert [row.text[start:end] for start, end in row.spans] == [
        '<|think|>look it up<|end|><|start|>assistant<|message|>weather{"city": "Paris"}<|end|>',
        "<|message|>It is.<|end|>",
    ]
    assert "look it up" in row.text[: row.spans[1][0]], "the model reads its reasoning when it answers"


def test_a_template_that_asks_otherwise_than_it_writes_says_so(byte_level):
    (row,) = template_of(byte_level, DEPARTS).render(CONVERSATION)
    (remark,) = row.remarks
    assert "asks for answers with '<think>\\n'" in remark
    for source in (CHATML, REASONING):
        assert not any(row.remarks for row in template_of(byte_level, source).render(CONVERSATION))


def test_instruction_rows_are_one_turn_each(byte_level):
    template = template_of(byte_level, LLAMA3)
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    same = {"messages": [user("Add.\n\n2 2"), assistant("4")]}
    assert template.render(row) == template.render(same)
    assert template.prompt({"instruction": "Add."}) == template.prompt(
        {"instruction": "Add.", "input": "", "output": "4"}
    )
    assert template.response(row) == template.response(same) == "4"


def test_what_looks_like_the_closing_may_occur_in_an_answer(byte_level):
    for source, before in (
        (REASONING, "<think>\n\n</think>\n\n"),
        (RETURNS, "<|message|>"),
        (CLOSED_TWICE, ""),
    ):
        row = {"messages": [user("x"), assistant("end <|end|> think end"), user("y"), assistant("z")]}
        first = learned(template_of(byte_level, source), row)[0][0]
        assert first.startswith(f"{before}end <|end|> think end<|")


def test_which_turns_are_learned(byte_level):
    marked = {"messages": [*TURNS[:3], {**TURNS[3], "train": False}, user("three?"), assistant("drei")]}
    template = template_of(byte_level, CHATML)
    assert learned(template, marked) == [["ein end<|im_end|>", "drei<|im_end|>"]]
    assert "zwei" in template.render(marked)[0].text
    assert learned(template_of(byte_level, CHATML, "last"), marked) == [["drei<|im_end|>"]]
    only = {"messages": [user("x"), assistant("y", train=False)]}
    with pytest.raises(RowError, match="no assistant turn is to be learned"):
        template.render(only)
    with pytest.raises(RowError, match="no assistant turn is to be learned"):
        template_of(byte_level, CHATML, "last").render({"messages": [*TURNS[:2], *only["messages"]]})


def test_the_mark_of_a_turn_is_not_shown_to_the_template(byte_level):
    seen = template_of(byte_level, CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.train }}"))
    assert "False" not in seen.render({"messages": [user("x"), assistant("y", train=False), *TURNS]})[0].text


def test_who_speaks_before_being_asked_is_only_read(byte_level):
    greeted = {"messages": [assistant("Hello!"), *TURNS]}
    template = template_of(byte_level, CHATML)
    assert learned(template, greeted) == [["ein end<|im_end|>", "zwei<|im_end|>"]]
    assert "Hello!" in template.render(greeted)[0].text
    for messages in ([assistant("Hello!")], [SYSTEM, assistant("Hello!")], [user("x")]):
        with pytest.raises(RowError, match="no assistant turn follows a user's"):
            template.render({"messages": messages})
    alternating = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('must start with user') }}{% endif %}"
    )
    with pytest.raises(RowError, match="refuses the conversation: must start with user"):
        template_of(byte_level, alternating + CHATML).render(greeted)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_teaches_nothing(byte_level, answer):
    with pytest.raises(RowError, match="turn 2, the assistant's, is empty"):
        template_of(byte_level, LLAMA3).render({"messages": [user("a"), assistant(answer)]})


DELETES = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
WITHOUT_CALLS = CHATML
PARTLY = CHATML.replace(
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
        (PARTLY, assistant("", tool_calls=call(city="Paris")), "leaves 'Paris', of the call of weather, out"),
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
    ],
)
def test_what_the_model_should_read_is_not_left_out_unseen(byte_level, source, row, said):
    with pytest.raises(RowError, match=said):
        template_of(byte_level, source).render(row)


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


def test_turns_that_are_rewritten_beyond_recognition_are_refused_by_row(byte_level):
    shouting = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    with pytest.raises((RowError, InputError), match="cannot be located"):
        template_of(byte_level, shouting).render(CONVERSATION)


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


def test_the_fingerprint_is_the_chat_template_s(byte_level):
    assert template_of(byte_level, LLAMA3).fingerprint != template_of(byte_level, LLAMA2).fingerprint
    assert template_of(byte_level, LLAMA3).fingerprint == template_of(byte_level, LLAMA3).fingerprint
    assert template_of(byte_level, LLAMA3).fingerprint != template_of(byte_level, LLAMA3, "last").fingerprint
    other = copy.deepcopy(byte_level)
    other.bos_token = "<b>"
    assert template_of(byte_level, LLAMA3).fingerprint != template_of(other, LLAMA3).fingerprint


@pytest.mark.parametrize(
    "source, marks",
    [
        (CHATML, ["<|im_end|>"]),
        (CLOSED_TWICE, ["<|end|>", "<|endoftext|>"]),
        (RETURNS, ["<|return|>"]),
        (OPENS_ONLY, ["<|user|>", "<|observation|>"]),
        (UNCLOSED, []),
        (
            RETURNS.replace("if loop.last and", "if loop.last and not m.tool_calls and"),
            ["<|return|>", "<|end|>"],
        ),
    ],
)
def test_the_tokens_that_end_an_answer_are_known(byte_level, source, marks):
    template = template_of(byte_level, source)
    assert template.end_marks() == marks
    tokenizer = copy.deepcopy(byte_level)
    assert end_tokens(template, tokenizer) == [tokenizer.eos_token_id], "what is no token ends nothing"
    tokenizer.add_tokens(
        ["<|im_end|>", "<|endoftext|>", "<|return|>", "<|user|>", "<|observation|>", "<|end|>"]
    )
    ids = tokenizer.convert_tokens_to_ids(marks)
    assert end_tokens(template, tokenizer) == [tokenizer.eos_token_id, *ids]
    assert end_tokens(get_template("alpaca", tokenizer), tokenizer) == [tokenizer.eos_token_id]
