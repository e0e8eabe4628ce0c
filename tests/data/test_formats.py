"""Rows in the formats that people have, and what a template is given of each."""

from __future__ import annotations

import copy
import json

import pytest

from linchain_cli.data.choosing import choose_template
from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.formats import FormattedRows
from linchain_cli.data.rows import Layout, RowError
from linchain_cli.data.sources import resolve_source
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError

CHAT = (
    Layout(("messages",), ("tools",)),
    Layout(("instruction", "output"), ("input", "system", "history")),
)
ASKED, ANSWERED = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@pytest.fixture
def read(write, source):
    """`read(*rows)`: what the chat template is given of rows of a .jsonl file; errors as text."""

    def rows_of(*rows, **fields):
        path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        formatted = FormattedRows(resolve_source(source(path, **fields)), CHAT)
        return [str(row) if isinstance(row, RowError) else row for row in formatted]

    return rows_of


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"messages": {"role": ["user", "assistant"], "content": ["2 + 2?", "4"]}},
        {"messages": [{**ASKED, "tool_calls": None}, {**ANSWERED, "weight": 1, "tool_calls": []}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + "}, "2?"]}, ANSWERED]},
        {
            "messages": [
                {**ASKED, "content": [{"type": "text", "value": "2 + 2?"}], "loss_weight": 0.0},
                ANSWERED,
            ]
        },
        {"messages": [ASKED, {**ANSWERED, "content": [{"type": "text", "text": "4", "train": True}, ""]}]},
        {"messages": [{"role": "user", "value": "2 + 2?"}, {"role": "assistant", "value": "4"}]},
        {"messages": [ASKED, {"role": "assistant", "content": 4}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [ASKED, ANSWERED], "system": ""},
        {"messages": [ASKED, ANSWERED], "system": None},
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": ASKED, "completion": {"from": "gpt", "value": "4"}},
        {"prompt": "2 + 2?", "completion": 4},
        {"prompt": json.dumps([ASKED]), "completion": "4"},
        {"prompt": "2 + 2?", "completion": [ANSWERED], "tools": "[]"},
        {"messages": [{**ASKED, "role": "human"}, {**ANSWERED, "role": "gpt"}]},
        {"messages": [{**ASKED, "role": "User"}, {**ANSWERED, "role": "Assistant"}]},
        {"conversations": [{"from": "Human", "value": "2 + 2?"}, {"from": "GPT", "value": "4"}]},
    ],
)
def test_one_conversation_in_many_forms(read, row):
    assert read(row) == [{"messages": [ASKED, ANSWERED]}]


def test_numbers_keep_the_digits_that_they_are_written_with(write, source):
    turns = '[{"role": "user", "content": 1.10}, {"role": "assistant", "content": 2.50}]'
    lines = ['{"instruction": 1.10, "output": 0.00001}', json.dumps({"messages": turns})]
    path = write("x.jsonl", "\n".join(lines))
    instruction, conversation = FormattedRows(resolve_source(source(path)), CHAT)
    assert instruction == {"instruction": "1.10", "output": "0.00001"}
    assert [turn["content"] for turn in conversation["messages"]] == ["1.10", "2.50"]


def test_a_system_prompt_may_stand_in_a_column_of_its_own(read):
    said = {"role": "system", "content": "Add."}
    for column in ("messages", "conversations"):
        assert read({column: [ASKED, ANSWERED], "system": "Add."}) == [{"messages": [said, ASKED, ANSWERED]}]
        assert read({column: [said, ASKED, ANSWERED], "system": "Add."}) == [
            {"messages": [said, ASKED, ANSWERED]}
        ]
        assert "another among the turns" in read({column: [said, ASKED, ANSWERED], "system": "Subtract."})[0]
        assert "'system' is 3, where a text" in read({column: [ASKED, ANSWERED], "system": 3})[0]


def test_a_conversation_with_tools(read):
    called = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1", "index": None}]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    expected = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
            result,
            ANSWERED,
        ],
        "tools": [TOOL],
    }
    as_text = copy.deepcopy(called)
    as_text["tool_calls"][0]["function"]["arguments"] = '{"a": 2, "b": 2}'
    for turn in (called, as_text):
        for tools in ([TOOL], json.dumps([TOOL]), [TOOL["function"]]):
            assert read({"messages": [ASKED, turn, result, ANSWERED], "tools": tools}) == [expected]
    share_gpt = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 2, "b": 2}})},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    named = {"role": "function_call", "content": share_gpt[1]["value"]}
    assert read({"messages": [ASKED, named]})[0]["messages"][1]["tool_calls"] == [CALL]
    (row,) = read({"conversations": share_gpt, "tools": json.dumps([TOOL["function"]]), "system": "Add."})
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["messages"][2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_arguments_of_json_keep_their_nulls(read):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    (row,) = read({"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert row["messages"][1]["tool_calls"] == [call]


def test_nulls_that_a_table_fills_in_are_taken_out(tmp_path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [ASKED, ANSWERED], "tools": None},
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "c"},
            ],
            "tools": [TOOL, {"type": "function", "function": {"name": "other", "description": "d"}}],
        },
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = FormattedRows(resolve_source(source(tmp_path / "x.parquet")), CHAT)
    assert first == {"messages": [ASKED, ANSWERED]}
    assert second["tools"] == rows[1]["tools"]
    assert second["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_what_was_thought_and_what_is_not_learned(read):
    for name in ("reasoning_content", "reasoning", "thinking"):
        (row,) = read({"messages": [ASKED, {**ANSWERED, name: "easy"}]})
        assert row["messages"][1] == {**ANSWERED, "reasoning_content": "easy"}
    for mark in (
        {"weight": 0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"loss": 0.0},
        {"loss_weight": 0.0},
        {"content": [{"type": "text", "text": "4", "train": False}, {"text": "", "weight": 0}]},
    ):
        (row,) = read({"messages": [ASKED, {**ANSWERED, **mark}]})
        assert row["messages"][1] == {**ANSWERED, "train": False}
    (row,) = read({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]})
    assert [turn.get("train") for turn in row["messages"]] == [None, False, None, None]


def test_what_is_thought_and_called_may_stand_in_parts(read):
    parts = [
        {"type": "reasoning", "value": "easy"},
        {"type": "tool_call", "value": json.dumps(CALL["function"])},
    ]
    (row,) = read({"messages": [ASKED, {"role": "assistant", "content": parts}]})
    said = {"role": "assistant", "content": "", "reasoning_content": "easy", "tool_calls": [CALL]}
    assert row["messages"][1] == said
    parts = [{"type": "thinking", "thinking": "easy"}, {"type": "text", "text": "4"}]
    (row,) = read({"messages": [ASKED, {"role": "assistant", "content": parts}]})
    assert row["messages"][1] == {**ANSWERED, "reasoning_content": "easy"}


def test_instructions_with_earlier_turns(read):
    row = {
        "instruction": "and 3?",
        "output": "7",
        "history": [["2 + 2?", "4"]],
        "system": "Add.",
        "input": None,
    }
    expected = {"instruction": "and 3?", "output": "7", "history": [("2 + 2?", "4")], "system": "Add."}
    assert read(row, {**row, "history": json.dumps(row["history"])}) == [expected] * 2
    assert "history" not in read({**row, "history": None})[0]
    assert "'history' is ['a'], not a list of pairs" in read({**row, "history": ["a"]})[0]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": []}, "'messages' is not a list of turns"),
        ({"messages": "hello"}, "neither a list nor the JSON text of one"),
        ({"messages": str([ASKED, ANSWERED])}, "JSON text of one; it is Python's: write it with json.dumps"),
        ({"messages": ["hello"]}, "turn 1 of 'messages' is hello, not an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 of 'messages' has no content"),
        ({"messages": [ASKED, {"content": "x"}]}, "turn 2 of 'messages' needs a role"),
        ({"messages": [{"speaker": "bot", "text": "x"}]}, "(or from and value), it has speaker, text"),
        ({"messages": [{"role": "user", "text": "x"}]}, "turn 1 of 'messages' has no content (it has text)"),
        (
            {"messages": [ASKED, {**ANSWERED, "content": [{"text": "a", "train": False}, {"text": "b"}]}]},
            "turn 2 of 'messages' has parts that are learned and others that are not",
        ),
        (
            {"messages": [ASKED, {**ANSWERED, "loss_mask": 0}]},
            "has loss_mask, which is no mark that is known",
        ),
        ({"messages": [ASKED, {**ANSWERED, "masked": True}]}, "has masked, which is no mark"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "turn 1 of 'messages' has a part of type image_url: only text can be learned from",
        ),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "turn 2 of 'messages': weight is 0.5"),
        ({"messages": [ASKED, {**ANSWERED, "train": 3}]}, "turn 2 of 'messages': train is 3"),
        ({"messages": [ASKED, {**ANSWERED, "weight": "0"}]}, "weight is '0'; it can be 1 or true"),
        (
            {"messages": [ASKED, {**ANSWERED, "train_detail": [{"train": False}]}]},
            "has train_detail: a turn is",
        ),
        (
            {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "role": "assistent"}]},
            "turn 4 of 'messages' has the role 'assistent', where 'assistant' seems to be meant",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 of 'conversations' is from alien"),
        ({"conversations": [{"from": "", "value": "x"}]}, "turn 1 of 'conversations' is from ''; known"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": 5, "function_call": {}}]},
            "tool_calls is 5",
        ),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                ]
            },
            "turn 2 of 'messages': the arguments of 'f' are no JSON: {",
        ),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            "the arguments of 'f' are no object",
        ),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": ["f"]}]}, "a tool call needs a function"),
        ({"messages": [ASKED, ANSWERED], "tools": "add"}, "'tools' is add, which is neither"),
        *(
            ({"messages": [ASKED, ANSWERED], "tools": [tool]}, "'tools' is not a list of tools")
            for tool in ("add", {"function": "add"}, {"function": {"name": 5}}, {"function": []})
        ),
        (
            {"conversations": [{"role": "system", "content": "a"}, ASKED], "system": "b"},
            "and another among the",
        ),
    ],
)
def test_a_conversation_that_is_none(read, row, said):
    (found,) = read(row)
    assert isinstance(found, str) and said in found and "\n" not in found


def test_pictures_that_the_model_is_not_shown_are_warned_of(prepare, write):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "images": ["x.png"]}]
    path = str(write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    told = f"{path}: rows hold `images`, which the model is not shown: text alone is learned"
    assert told in prepare(path, validation=0, template="alpaca").report.warnings


def test_a_conversation_may_have_variables_of_the_template_and_functions_beside_it(read):
    plain = {"messages": [ASKED, ANSWERED]}
    options = {"enable_thinking": False, "xml_tools": None}
    for given in (options, json.dumps(options)):
        assert read({**plain, "chat_template_kwargs": given}) == [
            {**plain, "options": {"enable_thinking": False}}
        ]
    assert "not an object like {enable" in read({**plain, "chat_template_kwargs": ["a"]})[0]
    assert read({**plain, "functions": [TOOL["function"]]}) == [{**plain, "tools": [TOOL]}]


@pytest.fixture
def prepare(tmp_path, byte_level, data_config):
    return lambda train, **fields: prepare_data(
        data_config(train, **fields), byte_level, cache_dir=tmp_path / "cache"
    )


def test_what_auto_chose_is_told_and_settled(prepare, write):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "eins"}]
    chat = str(write("c.jsonl", json.dumps({"messages": turns, "id": 7})))
    text = str(write("t.jsonl", json.dumps({"text": "word " * 50})))
    prepared = prepare([chat, text, {"path": chat, "template": "chat"}])
    assert [source.template for source in prepared.report.sources] == ["chat", "text", "chat"]
    assert (prepared.template.name, prepared.config.template) == ("chat", "chat")
    assert [source.template for source in prepared.config.train] == [None, "text", None]
    assert f"{chat}: rows go through the template chat (data.template: auto)" in prepared.report.notes
    assert f"{chat}: nothing reads the columns id" in prepared.report.notes
    again = prepare(prepared.config.train, template=prepared.config.template)
    assert again.report.fingerprint == prepared.report.fingerprint and again.report.cached


def test_an_answer_beside_an_output_is_for_evaluation(prepare, write):
    row = {"instruction": "Is it?", "input": "", "output": "It is true.", "answer": "true", "id": 7}
    alone = {"question": "Is it?", "reply": "It is.", "answer": "true"}
    paths = [str(write(name, json.dumps(each))) for name, each in (("a.jsonl", row), ("b.jsonl", alone))]
    own = {"path": paths[1], "template": {"prompt": "{question}", "response": "{reply}"}}
    told = [note for note in prepare([paths[0], own]).report.notes if "nothing reads" in note]
    unread = zip(paths, ("id", "answer"), strict=True)
    assert told == [f"{path}: nothing reads the columns {name}" for path, name in unread]


def test_documents_fill_rows_and_lose_nothing(prepare, write, byte_level):
    texts = ["a " * 30, "the correct answer is true", "东京 🙂 " * 20, "x"]
    path = str(write("x.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts)))
    train = prepare(path, max_length=16).train
    rows = [train[index] for index in range(len(train))]
    assert [len(ids) for ids, _ in rows[:-1]] == [16] * (len(rows) - 1)
    expected = []
    for text in texts:
        expected += byte_level(text)["input_ids"] + [byte_level.eos_token_id]
    assert [token for ids, _ in rows for token in ids.tolist()] == expected
    assert all(supervised.tolist() == [False] + [True] * (len(ids) - 1) for ids, supervised in rows)
    report = prepare(path, max_length=16).report
    assert (report.total, report.kept, report.rows) == (4, 4, len(rows))
    assert report.tokens == len(expected) and report.supervised_tokens == len(expected) - len(rows)
    assert not report.truncated and not report.warnings


def test_conversations_written_out_as_documents_are_warned_of(prepare, write):
    written = "<s>user: one?</s>assistant: eins</s>"
    (told,) = prepare(str(write("x.jsonl", json.dumps({"text": written}))), validation=0).report.warnings
    assert "questions are learned with the answers: rows of `messages` learn the answers alone" in told
    row = {"instruction": "What is </s>?", "output": "An end."}
    (told,) = prepare(str(write("y.jsonl", json.dumps(row))), validation=0).report.warnings
    assert "hold control tokens" in told and "`messages`" not in told


def test_a_prompt_and_its_completion_are_taken_as_they_are(prepare, write, byte_level):
    path = str(write("x.jsonl", json.dumps({"prompt": "Q: two\nA:", "completion": " four"})))
    ids, supervised = prepare(path).train[0]
    assert ids.tolist() == [*byte_level("Q: two\nA: four")["input_ids"], byte_level.eos_token_id]
    assert byte_level.decode(ids[supervised]) == " four</s>"
    alpaca = prepare(path, template="alpaca").train[0][0]
    assert "### Instruction:\nQ: two\nA:" in byte_level.decode(alpaca)


def test_earlier_turns_and_a_system_prompt_go_before_the_instruction(prepare, write, byte_level):
    row = {"instruction": "and 3?", "output": "7", "history": [["2 + 2?", "4"]], "system": "Add."}
    prepared = prepare(str(write("x.jsonl", json.dumps(row))))
    assert prepared.template.name == "chat"
    text = byte_level.decode(prepared.train[0][0])
    assert [text.index(part) for part in ("Add.", "2 + 2?", "4</s>", "and 3?", "7</s>")] == sorted(
        text.index(part) for part in ("Add.", "2 + 2?", "4</s>", "and 3?", "7</s>")
    )


@pytest.mark.parametrize("row", [{"text": "Ice is cold."}, {"prompt": "Is ice cold?", "completion": " Yes."}])
def test_a_model_of_such_rows_can_be_asked(write, byte_level, data_config, row):
    """What a merge compares logits on, and what evaluation asks."""
    from linchain_cli.export.prompts import run_prompts

    config = data_config(str(write("x.jsonl", json.dumps(row))))
    template = choose_template(resolve_source(config.sources[0]), chats=True).name
    config = config.model_copy(update={"template": template})
    (prompt,) = run_prompts(config, byte_level)
    assert byte_level.decode(prompt).removeprefix("<s>").strip() == row.get("text", row.get("prompt"))
    asked = get_template(template, byte_level).prompt({"instruction": "Is ice cold?", "input": ""})
    assert asked == "Is ice cold?\n"


def test_settings_of_conversations_that_no_row_is_are_refused(prepare, write):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "eins"}]
    chat = str(write("c.jsonl", json.dumps({"messages": turns})))
    other = str(write("i.jsonl", json.dumps({"instruction": "a", "output": "b"})))
    with pytest.raises(InputError, match="data.turns is for data.template: chat.*rows go through alpaca"):
        prepare(other, turns="last")
    settled = prepare([other, chat], turns="last").config
    assert settled == type(settled)(**settled.model_dump()), "the run's recipe can be read again"


def test_text_that_is_json_is_no_conversation(prepare, write, byte_level):
    row = {"prompt": "Whom?", "completion": '[{"name": "Bob"}]'}
    prepared = prepare(str(write("x.jsonl", json.dumps(row))), template="alpaca", validation=0)
    ids, supervised, *_ = prepared.train[0]
    assert byte_level.decode(ids[supervised]) == row["completion"] + "</s>"


def test_what_was_said_before_and_is_not_shown_is_warned_of(prepare, write):
    plain = {"instruction": "a", "output": "b", "history": [], "system": ""}
    later = {**plain, "history": [["c", "d"]]}
    path = str(write("x.jsonl", "".join(json.dumps(row) + "\n" for row in [plain] * 120 + [later])))
    told = [said for said in prepare(path).report.warnings if "does not show" in said]
    assert told == [
        f"{path}: rows hold a `history`, which the template alpaca does not show to the model: "
        "data.template: chat does"
    ]


def test_a_system_prompt_in_another_column_is_warned_of(prepare, write):
    row = {"instruction": "a", "output": "b", "system_prompt": "Be brief."}
    path = str(write("x.jsonl", json.dumps(row)))
    (told,) = (said for said in prepare(path, validation=0).report.warnings if "does not show" in said)
    assert told.endswith("data.template: chat does, with data.columns: {system: system_prompt}")


def test_roles_that_are_never_learned_are_told(prepare, write):
    turns = [ASKED, {"role": "critic", "content": "Think."}, ANSWERED]
    path = str(write("x.jsonl", json.dumps({"messages": turns})))
    assert any(
        "only read, never learned (1 rows)" in said for said in prepare(path, validation=0).report.warnings
    )


def test_a_directory_may_hold_files_of_several_kinds(prepare, write, tmp_path):
    row = {"instruction": "a", "output": "b"}
    for name, content in {
        "1.jsonl": json.dumps(row) + "\n",
        "2.csv": "instruction,output\nc,d\n",
        "3.json": json.dumps([row]),
    }.items():
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / name).write_text(content)
    assert prepare(str(tmp_path / "rows"), validation=0).report.kept == 3
