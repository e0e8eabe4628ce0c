"""Which template rows go through by their columns, and what is said of rows that go through none."""

from __future__ import annotations

import json

import pytest

from linchain_cli.data.choosing import choose_template
from linchain_cli.data.sources import resolve_source
from linchain_cli.errors import InputError

ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "rows, name",
    [
        ([{"messages": [ASKED, ANSWERED], "text": "x", "instruction": "a", "output": "b"}], "chat"),
        ([{"conversations": []}], "chat"),
        ([{"instruction": "a", "output": "b", "text": "whole"}], "alpaca"),
        ([{"instruction": "a", "output": "b", "history": [], "system": ""}], "alpaca"),
        ([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "system": "s"}], "chat"),
        ([{"prompt": "a", "completion": "b"}], "prompt-completion"),
        ([{"prompt": [ASKED], "completion": [ANSWERED]}], "chat"),
        ([{"text": "a", "label": 3}], "text"),
        ([{"prompt": "Whom?", "completion": '[{"name": "Bob"}]'}], "prompt-completion"),
        ([{"prompt": '[{"id": 1}] How many?', "completion": "1"}], "prompt-completion"),
        ([{"prompt": "a", "completion": json.dumps([ANSWERED], indent=1)}], "chat"),
    ],
)
def test_auto_goes_by_the_columns(write, source, rows, name):
    path = write("x.json", json.dumps(rows))
    assert choose_template(resolve_source(source(path)), chats=True).name == name
    without = "alpaca" if "instruction" in rows[0] and "messages" not in rows[0] else name
    assert choose_template(resolve_source(source(path)), chats=False).name == without


def test_auto_goes_by_the_columns_of_the_recipe(write, source):
    path = write("x.json", json.dumps([{"q": "a", "a": "b"}]))
    columns = {"instruction": "q", "output": "a"}
    assert choose_template(resolve_source(source(path, columns=columns)), chats=True).name == "alpaca"


@pytest.mark.parametrize(
    "columns, remedy",
    [
        (("q", "a"), "{instruction: NAME, output: NAME}"),
        (("id", "question", "answer"), "{instruction: question, output: answer}"),
        (("mesages", "id"), "{messages: mesages}"),
        (("version", "test"), "{instruction: NAME, output: NAME}"),
        (("Instruction", "Output"), "{instruction: Instruction, output: Output}"),
        (("instruction", " output"), '{output: " output"}'),
        (("prompt", "response"), "{completion: response}"),
        (("prompt", "generation"), "{completion: generation}"),
        (("article", "summary"), "{instruction: article, output: summary}"),
        (("instruction", "context", "response"), "{output: response, input: context}"),
        (
            ("system_prompt", "question", "response"),
            "{instruction: question, output: response, system: system_prompt}",
        ),
    ],
)
def test_columns_of_no_format_are_told_with_a_mapping(write, source, columns, remedy):
    path = write("y.json", json.dumps([dict.fromkeys(columns, "x")]))
    with pytest.raises(InputError) as caught:
        choose_template(resolve_source(source(path)), chats=True)
    said = str(caught.value)
    assert f"y.json:1 (row 1): the columns ({', '.join(columns)}) are those of no format: `messages`" in said
    assert f"data.columns: {remedy}, or write a data.template of your own." in said


@pytest.mark.parametrize(
    "row, remedy",
    [
        (PAIR, "preference training, .* data.columns: {completion: chosen}."),
        ({**PAIR, "chosen": [ASKED, ANSWERED]}, "preference .*: {messages: chosen}."),
        ({**PAIR, "prompt": [ASKED], "chosen": [ANSWERED]}, "preference .*: {completion: chosen}."),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "{prompt: question, completion: chosen}."),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "preference .*: {output: chosen}."),
        ({"input": {}, "preferred_output": [ANSWERED], "non_preferred_output": []}, "in OpenAI's form"),
        ({"prompt": "a", "completion": "b", "label": False}, r"KTO\), .* Keep the rows whose label is true"),
        ({"prompt": [ASKED], "completion": [ANSWERED], "label": True}, "rejected ones would be learned"),
        ({"data": [{"instruction": "a", "output": "b"}]}, "If 'data' holds the rows, write that list alone"),
        ({"version": 1, "rows": {"7": {"text": "a"}}}, "If 'rows' holds the rows"),
        (
            {"conversations": SAID, "kto_tag": False},
            r"judged by a `kto_tag` .*KTO\), .* whose kto_tag is true",
        ),
        ({"messages": [ASKED, ANSWERED], "label": True}, "rejected ones would be learned"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "rejected ones would be learned"),
        (
            {"conversations": SAID[:1], "chosen": SAID[1], "rejected": SAID[1]},
            "pairs for preference .* write it behind the other turns",
        ),
        (
            {"messages": [ASKED, ANSWERED], "images": ["a.png"]},
            "hold `images`, and linchain learns text alone",
        ),
        ({"instruction": "a", "output": "b", "video": "a.mp4"}, "hold `video`, and linchain learns text"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "They are tokens already"),
        (
            {"segments": [{"label": True, "text": "a"}]},
            "whether it is learned. Write what is not .* as `prompt`",
        ),
        (ASKED, "Each of them is one turn"),
        ({"items": SAID}, "seem to be in 'items': set data.columns: {conversations: items}."),
        ({"items": json.dumps([ASKED])}, "seem to be in 'items': set data.columns: {messages: items}."),
    ],
)
def test_what_other_tools_take_is_told_with_what_to_do(write, source, row, remedy):
    path = write("y.json", json.dumps([row]))
    with pytest.raises(InputError, match=remedy):
        choose_template(resolve_source(source(path)), chats=True)


def test_an_unlearned_or_empty_column_beside_a_conversation_is_no_reason_to_refuse_it(write, source):
    turns = [ASKED, ANSWERED]
    beside = {"images": [], "chosen": turns, "rejected": turns, "label": 3}
    path = write("y.json", json.dumps([{"messages": turns, **beside}]))
    assert choose_template(resolve_source(source(path)), chats=True).name == "chat"


def test_a_judgement_that_is_the_answer_is_one(write, source):
    path = write("y.json", json.dumps([{"prompt": "a", "label": False}]))
    columns = {"completion": "label"}
    assert choose_template(resolve_source(source(path, columns=columns)), True).name == "prompt-completion"


def test_a_mapping_to_no_column_is_told(write, source):
    path = write("y.json", json.dumps([{"instruction": "a", "output": "b"}]))
    with pytest.raises(InputError, match="no column 'instr', which data.columns takes for `instruction`"):
        choose_template(resolve_source(source(path, columns={"instruction": "instr"})), chats=True)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "y.jsonl",
            '{"text": "a"},\n' * 2,
            r"none of 2 rows .*y.jsonl:1 \(row 1\): not JSON: Extra data at",
        ),
        ("y.jsonl", '{\n"text": "a"\n}\n', "none of 3 rows can be read; the first is .*at column 2"),
        ("y.json", '["a", "b"]', "none of 2 rows can be read; the first is .*the row is a text"),
        ("y.csv", "instruction,input,output\na,b\n", "none of 1 rows .*has 2 cells"),
        ("y.jsonl", "\n\n", "y.jsonl has no rows."),
    ],
)
def test_why_no_row_can_be_read_is_told(write, source, name, content, said):
    with pytest.raises(InputError, match=said):
        choose_template(resolve_source(source(write(name, content))), chats=True)
