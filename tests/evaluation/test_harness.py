"""Tasks of lm-evaluation-harness on our models, offline: its numbers are kept as ours are."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from linchain_cli.data.fingerprint import tokenizer_sha256
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.harness import evaluate_harness, find_tasks, load_harness, split_names
from linchain_cli.evaluation.results import compare, read_results
from linchain_cli.evaluation.task import Task, read_row
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.recipe import ChatConfig

from ..data.chat_templates import REASONING
from ..harness import ROWS, write_task
from .conftest import forked
from .test_reasoning import CHANNELS, MARKS

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    """A multiple-choice task in the harness's own format, with the prompts of the template below."""
    return write_task(tmp_path_factory.mktemp("harness"))


@pytest.fixture
def loaded(tiny_llama_dir, harness_alone):
    return load_model(tiny_llama_dir, dtype="float32", device="cpu"), load_tokenizer(tiny_llama_dir)


def test_its_numbers_are_ours_on_the_same_prompts(loaded, task_file, tmp_path):
    model, tokenizer = loaded
    template = get_template({"prompt": "{instruction} A:", "response": "{output}"}, tokenizer)
    loaded_task = load_harness([task_file])
    theirs = evaluate_harness(model, tokenizer, template, loaded_task, name="tiny", out=tmp_path)
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
    again = evaluate_harness(model, tokenizer, template, load_harness([task_file]), name="tiny", out=tmp_path)
    assert again.path == theirs.path and compare(again, theirs)["all_rows"]["gained"] == 0
    assert again.known == ("linchain_test_places",)
    limited = evaluate_harness(model, tokenizer, template, loaded_task, name="tiny", limit=4, out=tmp_path)
    assert limited.path.name == "lm_eval-limit4.json" and limited.summary.tasks["linchain_test_places"].n == 4


def grouped(folder, rows, description="''"):
    """A group of two tasks in a folder of its own, with an average of both."""
    folder.mkdir(exist_ok=True)
    for part in ("first", "second"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{part}.yaml").write_text(
            f"task: linchain_test_{part}\ndataset_path: json\ndescription: {description}\n"
            f'dataset_kwargs: {{data_files: {{test: "{folder}/{part}.jsonl"}}}}\n'
            'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}} A:"\n'
            'doc_to_choice: "{{options}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n'
        )
    (folder / "both.yaml").write_text(
        "group: linchain_test_both\ntask: [linchain_test_first, linchain_test_second]\n"
        "aggregate_metric_list: [{metric: acc}]\n"
    )
    return str(folder / "both.yaml")


def test_what_was_measured_is_not_measured_again_unless_something_changed(loaded, tmp_path, monkeypatch):
    import lm_eval

    model, tokenizer = loaded
    template, measure, measured = get_template("plain", tokenizer), lm_eval.simple_evaluate, []

    def counted(wrapped, tasks, **options):
        measured.append([item.name if hasattr(item, "name") else item.task_name for item in tasks])
        return measure(wrapped, tasks=tasks, **options)

    def evaluated(names):
        tasks = load_harness(names)
        return evaluate_harness(model, tokenizer, template, tasks, name="tiny", out=tmp_path / "out")

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    group = grouped(tmp_path / "tasks", ROWS)
    first = str(tmp_path / "tasks" / "first.yaml")
    whole = evaluated([group])
    names = {"linchain_test_both", "linchain_test_first", "linchain_test_second"}
    scores = whole.summary.tasks
    assert {name: score.rows_sha256 for name, score in scores.items()} == load_harness([group])[0].rows(None)
    assert whole.summary.tasks.keys() == names and not whole.known
    assert set(evaluated([group]).known) == names and len(measured) == 1
    # A task of the group that is asked for by itself; then other rows, another configuration, other code.
    assert evaluated([first]).known == ("linchain_test_first",) and len(measured) == 1
    grouped(tmp_path / "tasks", ROWS[:5])
    assert evaluated([first]).summary.tasks["linchain_test_first"].n == 5 and len(measured) == 2
    grouped(tmp_path / "tasks", ROWS[:5], description="Answer.")
    assert not evaluated([first]).known and len(measured) == 3
    (tmp_path / "tasks" / "utils.py").write_text("x = 1\n")
    assert not evaluated([first]).known and len(measured) == 4
    assert evaluated([first]).known and len(measured) == 4


def test_a_chat_template_and_end_tokens_are_handed_over(loaded, task_file, monkeypatch):
    import lm_eval

    model, tokenizer = loaded
    before = model.generation_config.eos_token_id
    seen = {}

    def evaluate_nothing(wrapped, **options):
        seen.update(options, ends=wrapped.model.generation_config.eos_token_id)
        return {"results": {"linchain_test_places": {}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_nothing)
    tasks = load_harness([task_file])
    evaluate_harness(
        model, tokenizer, get_template("chat", tokenizer), tasks, name="tiny", system="Be short."
    )
    assert seen["apply_chat_template"] is True and seen["system_instruction"] == "Be short."
    assert seen["ends"] == [2] and model.generation_config.eos_token_id == before


BRIEF = (
    "{% set asks = '<assistant>' ~ ('(brief)' if brief) ~ strftime_now('%Y:') %}{% for message in messages %}"
    "{{ asks if message.role == 'assistant' else '<' ~ message.role ~ '>' }}{{ message.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}{{ asks }}{% endif %}"
)


@pytest.mark.parametrize(
    "of_tokenizer", [None, "{% for message in messages %}{{ message.content }}{% endfor %}"]
)
def test_conversations_are_written_as_in_training(loaded, task_file, monkeypatch, of_tokenizer):
    """With the template of the run, its variables and its date, whatever template the tokenizer has."""
    import lm_eval

    model, tokenizer = loaded
    tokenizer.chat_template = of_tokenizer
    measure, samples, read = lm_eval.simple_evaluate, [], []

    def kept(wrapped, **options):
        encode = wrapped.tok_encode
        wrapped.tok_encode = lambda text, *rest, **more: read.append(encode(text, *rest, **more)) or read[-1]
        found = measure(wrapped, **options)
        samples.extend(found["samples"]["linchain_test_places"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", kept)
    chat = ChatConfig(template=BRIEF, options={"brief": True}, system="Be kind.")
    template = get_template("chat", tokenizer, chat)
    tasks = load_harness([task_file])
    evaluate_harness(model, tokenizer, template, tasks, name="tiny", system="Be kind.", limit=1)
    asked = "<system>Be kind.<|im_end|><user>Where is horse 0? A:<|im_end|><assistant>(brief)2024:"
    assert samples[0]["arguments"][0][0] == asked
    assert template.prompt({"messages": [{"role": "user", "content": "Where is horse 0? A:"}]}) == asked
    trained = tokenizer(asked, add_special_tokens=False).input_ids
    assert [tokens for tokens in read if tokens[: len(trained) - 1] == trained[:-1]]
    assert not [tokens for tokens in read if tokens[0] == tokenizer.bos_token_id]


def test_a_turn_that_the_harness_begins_goes_on_where_it_ends(loaded):
    from linchain_cli.evaluation.harness_model import SharedModel

    model, tokenizer = loaded
    template = get_template("chat", tokenizer, ChatConfig(template=BRIEF))
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "The answer is"}]
    wrapped = SharedModel(model, tokenizer, chat=template)
    assert wrapped.apply_chat_template(turns, add_generation_prompt=False) == (
        "<user>2 + 2?<|im_end|><assistant>2024:The answer is"
    )


def test_of_a_template_without_a_place_for_it_the_system_prompt_is_left_out(loaded):
    from linchain_cli.evaluation.harness_model import SharedModel

    model, tokenizer = loaded
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + BRIEF
    wrapped = SharedModel(
        model, tokenizer, chat=get_template("chat", tokenizer, ChatConfig(template=refusing))
    )
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2 + 2?"}]
    assert wrapped.apply_chat_template(turns) == "<user>2 + 2?<|im_end|><assistant>2024:"


def test_names_are_split_and_unknown_ones_told(tmp_path):
    assert split_names(["boolq, lm_eval:mmlu", "lm_eval:ifeval"]) == (["boolq"], ["mmlu", "ifeval"])
    with pytest.raises(InputError, match="Did you mean 'lm_eval:hellaswag'"):
        find_tasks(["helaswag"])
    with pytest.raises(InputError, match=r"knows no such task\.$"):
        find_tasks(["nothere"])
    with pytest.raises(InputError, match="there is no task file"):
        find_tasks([str(tmp_path / "none.yaml")])
    (tmp_path / "other.yaml").write_text("path: rows.jsonl\n")
    with pytest.raises(InputError, match="is no task of lm-evaluation-harness"):
        find_tasks([str(tmp_path / "other.yaml")])


def test_a_task_twice_is_refused_before_a_model_is_loaded(tmp_path, harness_alone):
    group = grouped(tmp_path / "tasks", ROWS)
    with pytest.raises(InputError, match="lm_eval:linchain_test_first is asked for 2 times"):
        load_harness([group, str(tmp_path / "tasks" / "first.yaml")])
    (tmp_path / "tasks" / "first.jsonl").unlink()
    with pytest.raises(InputError, match=r"^lm_eval:.*first.yaml: FileNotFoundError: "):
        load_harness([str(tmp_path / "tasks" / "first.yaml")])


def test_without_the_harness_the_remedy_is_told(monkeypatch):

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match="pip install lm-eval"):
        find_tasks(["mmlu"])


def test_processes_share_the_rows_and_find_what_one_finds(loaded, task_file, tmp_path):
    model, tokenizer = loaded
    template, tasks = get_template("plain", tokenizer), load_harness([task_file])
    alone = evaluate_harness(model, tokenizer, template, tasks, name="tiny")

    def work(rank):
        asked, forward = [], model.forward

        def counted(input_ids, **options):
            asked.append(len(input_ids))
            return forward(input_ids, **options)

        model.forward = counted
        found = evaluate_harness(model, tokenizer, template, tasks, name="tiny", out=tmp_path / "out")
        assert found.predictions == alone.predictions and 0 < sum(asked) < 18
        # Of one row there is none for the second process: both ask it.
        one = evaluate_harness(model, tokenizer, template, tasks, name="tiny", limit=1)
        assert one.predictions == alone.predictions[:1]

    assert forked(tmp_path / "store", work) == [0, 0]
    written = read_results(tmp_path / "out" / "lm_eval.json").summary.tasks["linchain_test_places"]
    of_one = alone.summary.tasks["linchain_test_places"]
    assert (written.accuracy, written.metrics) == (of_one.accuracy, of_one.metrics)
    assert (written.fingerprint, written.rows_sha256) == (of_one.fingerprint, of_one.rows_sha256)


def test_an_evaluation_leaves_tokenizer_and_tasks_what_they_were(
    loaded, task_file, tmp_path, monkeypatch, capfd
):
    """A comparison's arms are evaluated on the same ones, one after another. And git is not asked about the
    current directory."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded
    template, tasks = get_template("plain", tokenizer), load_harness([task_file])
    before, rows = tokenizer_sha256(tokenizer), tasks[0].rows(None)
    evaluate_harness(model, tokenizer, template, tasks, name="tiny", out=tmp_path)
    assert "fatal: not a git repository" not in capfd.readouterr().err
    assert (tokenizer_sha256(tokenizer), tasks[0].rows(None)) == (before, rows)
    assert evaluate_harness(model, tokenizer, template, tasks, name="tiny", out=tmp_path).known


@pytest.mark.parametrize(("template", "tokens"), [(REASONING, False), (REASONING, True), (CHANNELS, True)])
def test_reasoning_is_no_part_of_an_answer(loaded, monkeypatch, template, tokens):
    from lm_eval.api.instance import Instance

    from linchain_cli.evaluation.harness_model import SharedModel

    model, tokenizer = loaded
    if tokens:
        tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    chat = get_template("chat", tokenizer, ChatConfig(template=template))
    begins, ends = chat.thinking
    texts = [f"{begins}yes?\n\nyes{ends}no\n\nyes", "no"]

    def write(context, **_):
        written = tokenizer(texts[len(asked)], add_special_tokens=False).input_ids
        asked.append(context)
        return torch.cat([context, torch.tensor([written])], dim=1)

    wrapped, asked = SharedModel(model, tokenizer, chat=chat), []
    monkeypatch.setattr(wrapped, "_model_generate", write)
    wrapped.batch_size_per_gpu = 1
    rows = [
        Instance("generate_until", {}, (f"Is ice {'very ' * (2 - at)}cold?", {"until": ["\n\n"]}), at)
        for at in range(2)
    ]
    assert wrapped.generate_until(rows) == ["no", "no"]
