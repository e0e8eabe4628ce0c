"""Chat templates: what is learned of a conversation, over the ways in which templates write one.

test_chat_published.py takes published templates.
"""

from __future__ import annotations

import copy

import pytest

from linchain_cli.data.rows import RowError
from linchain_cli.data.templates import end_tokens, get_template
from linchain_cli.recipe import ChatConfig

from .chat_templates import (
    CHATML,
    CLOSED_TWICE,
    CONVERSATION,
    DEPARTS,
    FORGETS,
    IN_PARTS,
    LLAMA2,
    LLAMA3,
    OPENS_ONLY,
    REASONING,
    RETURNS,
    SYSTEM,
    TURNS,
    UNCLOSED,
    WITH_TOOL,
    assistant,
    call,
    learned,
    template_of,
    user,
)


def test_an_end_in_letters_is_followed_by_the_end_of_sequence(byte_level):
    """Another model's template: nobody would stop at its letters."""
    template = get_template("chat", byte_level, ChatConfig(template=CHATML))
    rows = template.render(CONVERSATION)
    assert [[row.text[start:end] for start, end in row.spans] for row in rows] == [
        ["ein end<|im_end|>"],
        ["zwei<|im_end|>"],
    ], "each as it is asked for, since behind the first nothing would end"
    assert all(row.ends for row in rows)
    (remark,) = {remark for row in rows for remark in row.remarks}
    assert remark.startswith("the chat template ends answers with '<|im_end|>', which is no token of this")
    assert end_tokens(template, byte_level) == [byte_level.eos_token_id]
    known = template_of(byte_level, CHATML).render(CONVERSATION)
    assert len(known) == 1 and not known[0].ends and not known[0].remarks


def test_variables_of_a_row_go_before_those_of_the_recipe(byte_level):
    source = CHATML.replace("{% for", "{% if thinks %}<think>{% endif %}{% for", 1)
    template = template_of(byte_level, source)
    rows = [{**CONVERSATION, "options": {"thinks": thinks}} for thinks in (True, False)]
    texts = [template.render(row)[0].text for row in (*rows, CONVERSATION)]
    assert texts == ["<think>" + texts[2], texts[2], texts[2]]
    assert template.prompt(rows[0]) == "<think>" + template.prompt(CONVERSATION)
    assert template.complete(rows[0], "x").text.startswith("<think>")
    assert learned(template, rows[0]) == learned(template, CONVERSATION)


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
