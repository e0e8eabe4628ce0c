"""Data sets of other tools' configurations as sources of a recipe."""

from __future__ import annotations

import json

import pytest

from linchain_cli.recipe import convert_recipe
from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES

from .theirs import LLAMA_FACTORY, TRL, V1


def test_llama_factorys_names_are_looked_up(convert, tmp_path, monkeypatch):
    described = {
        "one": {"file_name": "one.json", "columns": {"prompt": "q", "query": "input", "response": "a"}},
        "two": {
            "hf_hub_url": "org/two",
            "subset": "en",
            "num_samples": 5,
            "columns": {"messages": "turns", "images": "pictures"},
            "tags": {"role_tag": "speaker", "content_tag": "content", "user_tag": "user"},
        },
        "books": {"file_name": "books.jsonl", "columns": {"prompt": "body"}},
        "plain": {"file_name": "plain.json", "columns": {"messages": "conversations"}},
        "code": {
            "hf_hub_url": "org/code",
            "folder": "python",
            "columns": {"prompt": "task", "response": "output"},
        },
        "pairs": {
            "hf_hub_url": "org/pairs",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "c"},
        },
    }
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    text = LLAMA_FACTORY.replace("one,two", "one,two,books,plain,code,pairs,three") + "dataset_dir: sets\n"
    made, recipe = convert(text)
    found = [source.model_dump(exclude_none=True, exclude={"weight"}) for source in recipe.data.train]
    assert found == [
        {"path": "sets/one.json", "max_rows": 1000, "columns": {"instruction": "q", "output": "a"}},
        {"path": "org/two", "config": "en", "max_rows": 5, "columns": {"messages": "turns"}},
        {"path": "sets/books.jsonl", "max_rows": 1000, "columns": {"text": "body"}},
        {"path": "sets/plain.json", "max_rows": 1000},
        {"path": "org/code", "max_rows": 1000, "columns": {"instruction": "task"}},
        {"path": "org/pairs", "max_rows": 1000},
        {"path": "three", "max_rows": 1000},
    ]
    for remark in (
        "two: num_samples: 5  (drawn there, from all rows; max_rows takes the first ones)",
        "two: nothing reads images",
        "code: folder: python  (data_files beside the path takes some of its files)",
        "code: a column `input` would be read, too, which is not named there",
        "two: role_tag: speaker (turns have role and content, or from and value: rename them)",
        "pairs: pairs of answers, for preference training, which is not here",
        "three: write its file or hub id; sets/dataset_info.json does not tell it",
    ):
        assert f"#   {remark}\n" in made
    (tmp_path / "sets" / "dataset_info.json").write_text("[")
    said = "sets/dataset_info.json cannot be read: convert where LLaMA-Factory is started"
    assert f"#   one: write its file or hub id; {said}" in convert(text)[0]


def test_a_mixture_of_trl(convert):
    rows = "datasets:\n  - {path: org/a, split: train, columns: [messages], fraction: 0.5}\n  - path: org/b\n"
    text, recipe = convert(
        TRL.replace("dataset_name: org/rows\ndataset_config: en\n", rows) + "test_split_size: 0.1"
    )
    assert [(source.path, source.split) for source in recipe.data.train] == [
        ("org/a", "train"),
        ("org/b", None),
    ]
    assert recipe.data.validation == "10%"
    assert "#   org/a: fraction: 0.5  (weight beside a source's path)" in text


def test_a_chat_template_is_not_written_where_no_row_goes_through_it(convert):
    theirs = "base_model: m\nadapter: lora\nlora_r: 8\nchat_template: chatml\n"
    through = {
        kind: convert(f"{theirs}datasets: [{{path: a.jsonl, type: {kind}}}]")[1].data.chat.template
        for kind in ("alpaca", "chat_template")
    }
    assert through == {"alpaca": None, "chat_template": CHAT_TEMPLATES["chatml"]}


ENTRIES = [
    ("{path: a.jsonl, type:}", {}, "type: null  (rows of tokens there; here they go by their columns"),
    ("{path: a.jsonl, type: completion, field: body}", {"template": "text", "columns": {"text": "body"}}, ""),
    ("{path: json, data_files: a.jsonl, ds_type: json, type: alpaca}", {"template": "alpaca"}, ""),
    (
        "{path: a.jsonl, type: chat_template, roles_to_train: [assistant], train_on_eos: turn}",
        {"template": "chat"},
        "",
    ),
    (
        "{path: a.jsonl, type: chat_template, chat_template: tokenizer_default, "
        "roles: {user: [human, user], assistant: [gpt]}}",
        {"template": "chat"},
        "",
    ),
    (
        "{path: a.jsonl, type: sharegpt, roles_to_train: []}",
        {"template": "chat"},
        "roles_to_train: []  (assistants' turns are, unless one has",
    ),
    (
        "{path: a.jsonl, type: sharegpt, roles_to_train: [all]}",
        {"template": "chat"},
        "roles_to_train: [all]  (assistants' turns are",
    ),
    (
        "{path: a.jsonl, type: sharegpt, train_on_eos: none}",
        {"template": "chat"},
        "train_on_eos: none  (the token that ends an answer is learned",
    ),
    (
        "{path: a.jsonl, type: sharegpt, message_field_role: speaker}",
        {"template": "chat"},
        "message_field_role: speaker  (turns have role and",
    ),
    (
        "{path: a.jsonl, type: sharegpt, message_field_training: learn}",
        {"template": "chat"},
        "message_field_training: learn  (the mark of a turn",
    ),
    ("{path: a.jsonl, type: sharegpt, message_field_training: train}", {"template": "chat"}, ""),
    (
        "{path: a.jsonl, type: sharegpt, drop_system_message: true}",
        {"template": "chat"},
        "drop_system_message: true  (take it out of the rows)",
    ),
    (
        "{path: a.jsonl, type: {system_prompt: 'Be {brief}.', field_instruction: q, field_output: a, "
        "format: 'Q: {instruction}\\n{input}\\nA:', no_input_format: 'Q: {instruction}\\nA:'}}",
        {
            "template": {
                "prompt": "Be {{brief}}.Q: {instruction}\\n{input}\\nA:",
                "prompt_no_input": "Be {{brief}}.Q: {instruction}\\nA:",
                "response": "{output}",
            },
            "columns": {"instruction": "q", "output": "a"},
        },
        "",
    ),
]


@pytest.mark.parametrize("entry, expected, said", ENTRIES)
def test_an_entry_of_axolotls_data_sets(convert, entry, expected, said):
    text, recipe = convert(f"base_model: m\nadapter: lora\nlora_r: 8\nlora_alpha: 8\ndatasets: [{entry}]\n")
    source = recipe.data.train[0].model_dump(exclude_none=True, exclude={"weight"})
    assert source == {"path": "a.jsonl", **expected}
    assert f"#   a.jsonl: {said}" in text if said else "# Not said" not in text


def test_documents_of_axolotl(convert):
    text, recipe = convert(
        "base_model: m\nadapter: lora\nlora_r: 8\nsample_packing: true\npretraining_dataset: org/books\n"
    )
    assert (recipe.data.train[0].path, recipe.data.train[0].template) == ("org/books", "text")
    assert "global_batch_size: 1  # of one process there" in text, (
        "a document's row is a whole sequence anyway"
    )


def test_data_sets_of_llama_factory_v1_stand_in_a_file(convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "theirs.yaml"
    path.write_text(V1.replace("rows.jsonl", "sets.yaml"))
    assert "#   sets.yaml: a list of data sets, which cannot be read: convert where" in convert_recipe(path)
    (tmp_path / "sets.yaml").write_text(
        "one: {path: one.json, source: local, converter: alpaca, size: 5}\n"
        "two: {path: org/two, converter: pair}\n"
    )
    made, recipe = convert(path.read_text())
    assert [(source.path, source.max_rows) for source in recipe.data.train] == [
        ("one.json", 5),
        ("org/two", None),
    ]
    assert "#   one: size: 5  (drawn there, from all rows; max_rows takes the first ones)" in made
    assert "#   two: pairs of answers, for preference training, which is not here" in made
