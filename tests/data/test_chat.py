"""Chat templates: which characters are supervised, over several kinds of templates, and which are refused."""

from __future__ import annotations

import copy

import pytest

from linchain_cli.data.chat import ChatTemplate
from linchain_cli.data.rows import RowError
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "ein end"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "zwei"},
        {"role": "user", "content": "dropped"},
    ]
}

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim "
    "}}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} "
    "[/INST]{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
# Earlier answers are written without the block that opens the last one.
REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content "
    "}}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def template_of(tokenizer, source: str) -> ChatTemplate:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return get_template("chat", tokenizer)


def supervised(rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize(
    "source, answers",
    [
        (LLAMA3, ["ein end<|eot|>", "zwei<|eot|>"]),
        (LLAMA2, [" ein end </s>", " zwei </s>"]),
        (REASONING, ["ein end<|end|>", "<think>\n\n</think>\n\nzwei<|end|>"]),
    ],
)
def test_assistant_turns_and_their_endings_are_supervised(byte_level, source, answers):
    template = template_of(byte_level, source)
    (rendered,) = template.render(CONVERSATION)
    assert supervised(rendered) == answers
    assert not rendered.ends  # the template's own closing ends the answer
    assert rendered.text.endswith(answers[-1])
    assert "dropped" not in rendered.text


def test_a_template_that_closes_no_turn_leaves_the_end_to_eos(byte_level):
    template = template_of(byte_level, UNCLOSED)
    (rendered,) = template.render(CONVERSATION)
    assert supervised(rendered) == ["ein end", "zwei"]
    assert rendered.ends


def test_prompt_and_training_text_agree(byte_level):
    for source in (LLAMA3, LLAMA2, REASONING, UNCLOSED):
        template = template_of(byte_level, source)
        messages = {"messages": CONVERSATION["messages"][:5]}
        (rendered,) = template.render(messages)
        assert rendered.text.startswith(template.prompt(messages))
        assert rendered.spans[-1][0] == len(template.prompt(messages))
        completed = template.complete(messages, "drei")
        assert completed.text.endswith("drei") and completed.text.startswith(template.prompt(messages))
        asked = {"messages": CONVERSATION["messages"][:4]}
        assert template.prompt(asked) == template.prompt(messages)


def test_instruction_rows_are_one_turn_each(byte_level):
    template = template_of(byte_level, LLAMA3)
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    same = {"messages": [{"role": "user", "content": "Add.\n\n2 2"}, {"role": "assistant", "content": "4"}]}
    assert template.render(row) == template.render(same)
    assert template.prompt({"instruction": "Add."}) == template.prompt(
        {"instruction": "Add.", "input": "", "output": "4"}
    )
    assert template.response(row) == template.response(same) == "4"


def test_what_looks_like_the_closing_may_occur_in_an_answer(byte_level):
    template = template_of(byte_level, REASONING)
    row = {"instruction": "x", "output": "end <|end|> think end"}
    assert supervised(template.render(row)[0]) == ["<think>\n\n</think>\n\nend <|end|> think end<|end|>"]


def test_a_template_that_cannot_be_segmented_is_refused(byte_level):
    opens_otherwise = REASONING.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<reason>{% endif %}")
    with pytest.raises(InputError, match="cannot be located.*<reason>.*Use another template"):
        template_of(byte_level, opens_otherwise)
    with pytest.raises(InputError, match="cannot be located"):
        template_of(byte_level, "{{ messages[0].content }}")  # writes no answer at all


def test_earlier_turns_that_change_are_refused_by_row(byte_level):
    shouting = "{% for m in messages %}{{ m.content if loop.last else m.content | upper }}|{% endfor %}"
    template = template_of(byte_level, shouting)
    with pytest.raises(RowError, match="one row per answer|cannot be located"):
        template.render(CONVERSATION)


def test_a_tokenizer_without_a_chat_template_is_refused(byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        get_template("chat", tokenizer)


@pytest.mark.parametrize(
    "messages, said",
    [
        ("hello", "not a list"),
        ([], "not a list"),
        ([{"role": "user"}], "turn 1"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "turn 2"),
        ([{"role": "user", "content": "a"}, "b"], "turn 2"),
        ([{"role": "user", "content": "a"}], "missing or empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "missing or empty"),
    ],
)
def test_bad_conversations_are_row_errors(byte_level, messages, said):
    with pytest.raises(RowError, match=said):
        template_of(byte_level, LLAMA3).render({"messages": messages})


def test_what_the_template_refuses_is_a_row_error(byte_level):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + LLAMA3
    )
    with pytest.raises(RowError, match="refuses the conversation: no system role"):
        template_of(byte_level, strict).render(CONVERSATION)


def test_a_date_in_the_template_is_held_still(byte_level):
    dated = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}"
        "{{ date_string }}"
    )
    template = template_of(byte_level, dated + LLAMA3)
    assert template.prompt({"instruction": "x"}).startswith("26 Jul 2024")


def test_the_fingerprint_is_the_chat_template_s(byte_level):
    assert template_of(byte_level, LLAMA3).fingerprint != template_of(byte_level, LLAMA2).fingerprint
    assert template_of(byte_level, LLAMA3).fingerprint == template_of(byte_level, LLAMA3).fingerprint
