"""Which labelled rows a model is measured on, and what is said where they are not its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from linchain_cli.errors import InputError
from linchain_cli.evaluation.labels import evaluate_labels, load_labelled
from linchain_cli.model.classifier import Outputs
from linchain_cli.model.limits import Limits
from linchain_cli.recipe import DataConfig

from ..classifiers import make_encoder
from .conftest import forked

RTE = "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta cat\tnot_entailment\n1\train\tdog\tentailment\n"
OWN = Outputs(("bad", "good"))
THREE = Outputs(("bad", "good", "odd"))  # of the tiny classifier


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    """BERT's kind, which names no longest row; rows.jsonl and GLUE's RTE lie in the current directory."""
    from transformers import BertTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "rain"]
    Path("vocab.txt").write_text("\n".join(vocabulary))
    Path("RTE").mkdir()
    Path("RTE/dev.tsv").write_text(RTE)
    write_rows("cat " * 30, "good")
    return BertTokenizer("vocab.txt")


def write_rows(text, label):
    rows = [{"review": "a dog", "stars": "bad"}, {"review": text, "stars": label}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("classes", "targets"),
    [(("LABEL_0", "LABEL_1"), [1, 0]), (("NOT_ENTAILMENT", "ENTAILMENT", "NEUTRAL"), [0, 1])],
)
def test_a_tasks_classes_may_be_called_otherwise(tokenizer, classes, targets):
    """By their numbers or in another case, as many classifiers of the hub have them."""
    (task,) = load_labelled(["glue/rte"], Outputs(classes), tokenizer)
    assert task.data.train.targets.tolist() == targets


def test_a_slice_of_a_split_may_be_named(tokenizer):
    for name, targets in (("glue/rte:validation[1:]", [0]), ("rows.jsonl:dev[:50%]+dev[:1]", [2, 2])):
        (task,) = load_labelled([name], Outputs(("entailment", "not_entailment", "bad")), tokenizer)
        assert task.data.train.targets.tolist() == targets


def test_labels_of_a_file_may_be_the_numbers_of_classes_that_nobody_has_named(tokenizer):
    rows = [{"text": "a dog", "label": 1}, {"text": "a cat", "label": 0}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = load_labelled(["rows.jsonl"], Outputs(("LABEL_0", "LABEL_1")), tokenizer)
    assert task.data.train.targets.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("task", "outputs", "message"),
    [
        (
            "glue/rte",
            OWN,
            "glue/rte is labelled with entailment, not_entailment, and the model predicts bad, good",
        ),
        ("glue/rte", Outputs(), "labelled with entailment, not_entailment, and the model predicts numbers"),
        ("glue/stsb", OWN, "glue/stsb is labelled with numbers, and the model predicts bad, good"),
    ],
)
def test_a_task_of_other_labels_is_told_before_a_row_is_read(tokenizer, task, outputs, message):
    with pytest.raises(InputError, match=message):
        load_labelled([task], outputs, tokenizer)


def test_a_row_of_another_label_is_told_without_settings_that_eval_has_not(tokenizer):
    like = DataConfig.model_validate({"train": "x.jsonl", "columns": {"text": "review", "label": "stars"}})
    write_rows("the dog", "odd")
    with pytest.raises(
        InputError, match=r"rows.jsonl:2 .*'odd' is none of the classes \(bad, good\)"
    ) as told:
        load_labelled(["rows.jsonl"], OWN, tokenizer, like=like)
    assert "on_bad_row" not in str(told.value) and "The model predicts no others" in str(told.value)


def test_columns_are_the_runs_where_the_rows_have_them_and_else_found(tokenizer):
    columns = {"text": "review", "label": "stars"}
    like = DataConfig.model_validate({"train": "x.jsonl", "columns": columns})
    (task,) = load_labelled(["rows.jsonl"], OWN, tokenizer, like=like)
    assert task.data.train.targets.tolist() == [0, 1] and not task.data.report.notes
    Path("rows.jsonl").write_text(
        Path("rows.jsonl").read_text().replace("review", "sentence").replace("stars", "label")
    )
    (task,) = load_labelled(["rows.jsonl"], OWN, tokenizer, like=like)
    assert task.data.train.targets.tolist() == [0, 1]
    assert "the columns {text: sentence, label: label}" in task.data.report.notes[0]


def test_rows_are_cut_to_what_the_model_reads(tokenizer):
    """Beyond its last position an encoder has no embedding."""
    columns = {"text": "review", "label": "stars"}
    like = DataConfig.model_validate({"train": "x.jsonl", "columns": columns})
    (task,) = load_labelled(["rows.jsonl"], OWN, tokenizer, like=like, readable=Limits(10, 16, table=True))
    assert task.data.train.lengths.tolist() == [4, 16]
    assert "1 of 2 rows are longer than data.max_length (16 tokens" in task.data.report.warnings[0]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A tiny classifier, its tokenizer and two tasks: rows.jsonl, a fifth of them long, and more.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    texts = ["the cat " * (20 if number % 5 == 0 else 1 + number % 2) for number in range(60)]
    for file, some in {"rows.jsonl": texts, "more.jsonl": texts[:7]}.items():
        written = [{"text": text, "label": ("bad", "good")[len(text) % 3 == 0]} for text in some]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in written))
    model, tokenizer = make_encoder("bert")
    return model, tokenizer, load_labelled(["rows.jsonl", "more.jsonl"], THREE, tokenizer)


def sizes_of(model, monkeypatch):
    """The padded sizes that the model reads from here on."""
    seen = []
    forward = model.forward

    def noted(input_ids, **inputs):
        seen.append(tuple(input_ids.shape))
        return forward(input_ids, **inputs)

    monkeypatch.setattr(model, "forward", noted)
    return seen


def test_no_batch_has_more_tokens_than_it_may(rows, monkeypatch):
    model, tokenizer, tasks = rows
    whole = evaluate_labels(model, tokenizer, THREE, tasks, name="tiny", batch_tokens=100_000)
    seen = sizes_of(model, monkeypatch)
    found = evaluate_labels(model, tokenizer, THREE, tasks, name="tiny", batch_tokens=100)
    assert len(seen) > 4 and all(count * longest <= 100 for count, longest in seen)
    assert sum(count for count, _ in seen) == 67
    assert [row["prediction"] for row in found.predictions] == [
        row["prediction"] for row in whole.predictions
    ]


def test_a_batch_that_does_not_fit_is_halved(rows, monkeypatch):
    model, tokenizer, tasks = rows
    whole = evaluate_labels(model, tokenizer, THREE, tasks, name="tiny")
    forward = model.forward

    def small_memory(input_ids, **inputs):
        if input_ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **inputs)

    monkeypatch.setattr(model, "forward", small_memory)
    found = evaluate_labels(model, tokenizer, THREE, tasks, name="tiny")
    assert [row["index"] for row in found.predictions] == [row["index"] for row in whole.predictions]


def test_what_is_measured_already_is_read_by_the_first_process_alone(rows, tmp_path):
    """Another machine's disk does not hold its results; all have to measure the same."""
    model, tokenizer, tasks = rows
    first = evaluate_labels(model, tokenizer, THREE, tasks[:1], name="tiny", out=tmp_path / "0")

    def run_one(rank):
        for _ in range(2):  # what is missing, and then nothing
            found = evaluate_labels(model, tokenizer, THREE, tasks, name="tiny", out=tmp_path / str(rank))
            assert {row["task"] for row in found.predictions} == {"rows.jsonl", "more.jsonl"}
            assert found.known[:1] == tuple(first.summary.tasks)

    assert forked(tmp_path / "store", run_one) == [0, 0]
    assert not (tmp_path / "1").exists()
