"""Tasks of lm-evaluation-harness on our models, offline: its numbers are kept as ours are."""

from __future__ import annotations

import json

import pytest

from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.harness import evaluate_harness, find_tasks, split_names
from linchain_cli.evaluation.results import compare, read_results
from linchain_cli.evaluation.task import Task, read_row
from linchain_cli.model.loading import load_model, load_tokenizer

pytest.importorskip("lm_eval")

ROWS = [
    {
        "q": f"Where is horse {number}?",
        "options": ["in the kitchen", "at the harbour by the station"],
        "gold": number % 2,
    }
    for number in range(9)
]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """A multiple-choice task in the harness's own format, with the prompts of the template below."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "places.yaml").write_text(
        "task: linchain_test_places\ndataset_path: json\n"
        f'dataset_kwargs: {{data_files: {{test: "{folder}/rows.jsonl"}}}}\n'
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}} A:"\n'
        "doc_to_choice: \"{{options}}\"\ndoc_to_target: gold\ntarget_delimiter: ' '\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return str(folder / "places.yaml")


@pytest.fixture
def loaded(tiny_llama_dir):
    return load_model(tiny_llama_dir, dtype="float32", device="cpu"), load_tokenizer(tiny_llama_dir)


def test_its_numbers_are_ours_on_the_same_prompts(loaded, task_file, tmp_path):
    model, tokenizer = loaded
    template = get_template({"prompt": "{instruction} A:", "response": "{output}"}, tokenizer)
    theirs = evaluate_harness(model, tokenizer, template, [task_file], name="tiny", out=tmp_path)
    score = theirs.summary.tasks["linchain_test_places"]
    rule = AnswerRule("options")
    rows = tuple(
        read_row(
            {"instruction": row["q"], "answer": row["gold"]},
            index,
            rule,
            "rows",
            row["options"],
            names="index",
        )
        for index, row in enumerate(ROWS)
    )
    task = Task("places", rows, "rows", rule, 4, prefix=" ", free_text=True)
    ours = evaluate(model, tokenizer, template, [task], name="tiny").summary.tasks["places"]
    assert score.accuracy == ours.accuracy and score.n == 9
    assert score.metrics["acc_norm"].value == ours.metrics["bytes"].value
    assert score.stderr == pytest.approx(ours.stderr, rel=0.05)
    assert theirs.path == tmp_path / "lm_eval.json" and read_results(theirs.path).summary == theirs.summary
    assert theirs.summary.template == "the harness's own" and theirs.summary.versions["lm_eval"]
    again = evaluate_harness(model, tokenizer, template, [task_file], name="tiny", out=tmp_path)
    assert again.path == theirs.path and compare(again, theirs)["all_rows"]["gained"] == 0
    limited = evaluate_harness(model, tokenizer, template, [task_file], name="tiny", limit=4, out=tmp_path)
    assert limited.path.name == "lm_eval-limit4.json" and limited.summary.tasks["linchain_test_places"].n == 4


def test_a_chat_template_and_end_tokens_are_handed_over(loaded, task_file, monkeypatch):
    import lm_eval

    model, tokenizer = loaded
    before = model.generation_config.eos_token_id
    seen = {}

    def evaluate_nothing(wrapped, **options):
        seen.update(options, ends=wrapped.model.generation_config.eos_token_id)
        return {"results": {}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_nothing)
    evaluate_harness(
        model, tokenizer, get_template("chat", tokenizer), [task_file], name="tiny", system="Be short."
    )
    assert seen["apply_chat_template"] is True and seen["system_instruction"] == "Be short."
    assert seen["ends"] == [2] and model.generation_config.eos_token_id == before


def test_names_are_split_and_unknown_ones_told(tmp_path):
    assert split_names(["boolq, lm_eval:mmlu", "lm_eval:ifeval"]) == (["boolq"], ["mmlu", "ifeval"])
    with pytest.raises(InputError, match="Did you mean 'hellaswag'"):
        find_tasks(["helaswag"])
    with pytest.raises(InputError, match="there is no task file"):
        find_tasks([str(tmp_path / "none.yaml")])
    (tmp_path / "other.yaml").write_text("path: rows.jsonl\n")
    with pytest.raises(InputError, match="is no task of lm-evaluation-harness"):
        find_tasks([str(tmp_path / "other.yaml")])


def test_without_the_harness_the_remedy_is_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        find_tasks(["mmlu"])
