"""Commands on classifiers, as a user calls them: train, eval, merge, check, report, and what is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from linchain_cli.chain.files import adapter_hash
from linchain_cli.evaluation.statistics import wilson_interval

from ..classifiers import make_checkpoint, pair_rows, write_rows
from ..command_line import linchain


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with a tiny BERT, labelled rows, a recipe, and the runs `one` and `two`."""
    place, before = tmp_path_factory.mktemp("classifying"), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINCHAIN_CACHE", str(place / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        os.chdir(place)
        make_checkpoint("bert", place / "bert")
        write_rows(place / "train.jsonl", pair_rows(48))
        write_rows(place / "dev.jsonl", pair_rows(30, first=101))
        odd = {"sentence1": "the cat [SEP] sat " + "under a tree " * 9, "sentence2": "a cat ran"}
        write_rows(place / "odd.jsonl", [{**odd, "label": "good"}, {**odd, "label": "odd"}])
        recipe = {
            "task": "classification",
            "name": "one",
            "model": {"path": "bert", "dtype": "float32"},
            "adapter": {"rank": 4, "depth": 1, "target_modules": ["query", "value"]},
            "data": {"train": "train.jsonl", "validation": 8, "max_length": 16},
            "training": {"max_steps": 12, "global_batch_size": 8, "learning_rate": 0.01, "eval_every": 6},
            "evaluation": {"tasks": ["dev.jsonl"]},
        }
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert linchain("train", "recipe.yaml") == 0
        assert linchain("train", "recipe.yaml", "name=two", "adapter.depth=0") == 0
        yield place
        os.chdir(before)


def result_of(path: str) -> dict:
    return json.loads(Path(path).read_text())


def test_train_evaluates_on_labelled_rows_when_it_is_done(workplace):
    result = result_of("runs/one/eval/classification.json")
    score = result["tasks"]["dev.jsonl"]
    assert (score["n"], result["protocol"], result["dtype"]) == (30, "classification", "float32")
    # As of all accuracies: the bootstrap's would have no width where every row is right.
    assert score["interval"] == list(wilson_interval(round(30 * score["accuracy"]), 30))
    assert score["majority"] == pytest.approx(2 / 3)
    assert set(score["metrics"]) == {"f1", "matthews"}
    assert all(len(metric["interval"]) == 2 for metric in score["metrics"].values())
    assert result["adapter_sha256"] == adapter_hash(Path("runs/one/adapter"))
    rows = [json.loads(line) for line in Path("runs/one/eval/classification.predictions.jsonl").open()]
    assert [row["index"] for row in rows] == list(range(30))
    assert set(rows[0]) == {"task", "index", "prediction", "answer", "correct", "scores"}
    assert max(rows[0]["scores"], key=rows[0]["scores"].get) == rows[0]["prediction"]


def test_eval_finds_what_train_measured(workplace, capsys):
    before = Path("runs/one/eval/classification.json").read_bytes()
    assert linchain("eval", "runs/one", "--tasks", "dev.jsonl") == 0
    assert "measured before" in capsys.readouterr().out
    assert Path("runs/one/eval/classification.json").read_bytes() == before


def test_two_runs_are_compared_row_by_row(workplace, capsys):
    assert linchain("eval", "runs/one", "--tasks", "dev.jsonl", "--against", "runs/two") == 0
    printed = capsys.readouterr().out
    assert "McNemar" in printed and "matthews" in printed
    (comparison,) = result_of("runs/one/eval/classification.json")["against"]
    first, second = (result_of(f"runs/{name}/eval/classification.json") for name in ("one", "two"))
    values = [result["tasks"]["dev.jsonl"]["metrics"]["f1"]["value"] for result in (first, second)]
    found = comparison["metrics"]["dev.jsonl"]["f1"]
    assert found["difference"] == pytest.approx(values[0] - values[1])
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    earlier = "runs/two/eval/classification.json"
    assert linchain("eval", "runs/one", "--against", earlier) == 0
    assert linchain("eval", "runs/one", "--against", earlier, "--limit", 5, "--out", "few") == 2
    assert "not of the same rows" in capsys.readouterr().err
    assert linchain("eval", "runs/one", "--against", earlier, "--tasks", "train.jsonl", "--out", "few") == 2
    assert "has no train.jsonl" in capsys.readouterr().err


def test_eval_tells_what_becomes_of_odd_rows(workplace, capsys):
    assert linchain("eval", "runs/one", "--tasks", "odd.jsonl", "--limit", 1, "--out", "odd") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "1 of 1 rows are longer than data.max_length (16 tokens" in told
    assert "1 of 1 rows hold control tokens of the tokenizer in their texts (first odd.jsonl:1" in told


def test_a_merged_classifier_tells_the_same(workplace, capsys):
    """Also of rows that the run had to cut, and to transformers' own pipeline."""
    from transformers import pipeline

    assert linchain("merge", "runs/one", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "logits, merged against adapted" in printed and "generate" not in printed
    assert "the tokenizer's model_max_length is 16, to which the run cut its rows" in printed
    assert "`truncation=True, max_length=16`" in Path("runs/one/merged/README.md").read_text()
    assert linchain("eval", "runs/one/merged", "--tasks", "dev.jsonl", "--out", "merged") == 0
    told = capsys.readouterr().err
    assert "runs/one/merged: rows of up to 16 tokens are read, as its tokenizer says" in told
    assert "rows are longer than data.max_length (16 tokens" in told
    merged, run = (
        [json.loads(line) for line in Path(place, "classification.predictions.jsonl").open()]
        for place in ("merged", "runs/one/eval")
    )
    scores = [[list(row["scores"].values()) for row in rows] for rows in (merged, run)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    rows = [json.loads(line) for line in Path("dev.jsonl").open()]
    classify = pipeline("text-classification", "runs/one/merged", device="cpu")
    told = classify(
        [{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows],
        truncation=True,
        batch_size=4,
        top_k=None,
        function_to_apply="none",
    )
    piped = [{one["label"]: one["score"] for one in row} for row in told]
    np.testing.assert_allclose([[row["bad"], row["good"]] for row in piped], scores[1], atol=1e-5)
    assert json.loads(Path("runs/one/merged/config.json").read_text())["id2label"] == {
        "0": "bad",
        "1": "good",
    }


def test_an_exported_classifier_is_a_lora_with_its_head(workplace, capsys):
    assert linchain("export", "runs/one", "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "read back: every ΔW within" in printed and "to be loaded with num_labels=2, which" in printed
    config = json.loads(Path("runs/one/peft/adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "classifier" in config["modules_to_save"]
    card = Path("runs/one/peft/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and ", num_labels=2)" in card


def test_check_shows_labels_and_counts_the_head(workplace, capsys):
    assert linchain("check", "recipe.yaml") == 0
    printed = capsys.readouterr().out
    assert "label good" in printed and "a head of" in printed and "dev.jsonl" in printed
    assert re.search(r"labels to train on: good \d+, bad \d+", printed)
    assert linchain("check", "recipe.yaml", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["bad", "good"] and found["tasks"] == {"dev.jsonl": 30}
    counts = found["labels"]
    assert sum(counts["train"].values()) == 40 and sum(counts["validation"].values()) == 8


def test_reports_and_lists_know_such_runs(workplace, capsys):
    assert linchain("report", "runs/one") == 0
    page = Path("runs/one/report.html").read_text()
    assert re.search(r"Row \d+: \d+ tokens, label (good|bad)<", page) and "cannot be shown" not in page
    assert "supervised" not in page.split("<h2>Recipe</h2>")[0]
    assert re.search(r"last validation</dt><dd>accuracy [01]\.\d{4}, f1", page)
    assert linchain("inspect", "runs/one") == 0
    assert linchain("runs") == 0
    assert "one" in capsys.readouterr().out


def test_resuming_a_finished_run_makes_up_its_evaluation(workplace, capsys):
    for file in Path("runs/two/eval").iterdir():
        file.unlink()
    assert linchain("train", "recipe.yaml", "name=two", "adapter.depth=0", "--resume") == 0
    assert result_of("runs/two/eval/classification.json")["tasks"]["dev.jsonl"]["n"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "runs/one", "good?"], "predicts labels and writes no text"),
        (["export", "runs/one", "--format", "gguf"], "linchain merge writes"),
        (["eval", "runs/one", "--tasks", "gone.jsonl"], "there is no file gone.jsonl"),
        (["eval", "runs/one", "--tasks", "glue/rtee"], "GLUE has no task"),
        (
            ["eval", "runs/one", "--tasks", "glue/rte"],
            "not_entailment, and the model predicts bad, good: name",
        ),
        (
            ["eval", "runs/one", "--tasks", "odd.jsonl"],
            "'odd' is none of the classes.*The model predicts no oth",
        ),
        (
            ["train", "recipe.yaml", "name=x", "evaluation.tasks=[glue/stsb]"],
            "evaluation.tasks: glue/stsb is a regression, and the run's task a classification",
        ),
        (["eval", "runs/one", "--protocol", "generate"], "predicts labels: leave it out"),
        (["train", "recipe.yaml", "name=x", "evaluation.tasks=[gone.jsonl]"], "no file gone.jsonl"),
        (
            ["train", "recipe.yaml", "name=x", "data.columns.label=lable"],
            "no column 'lable'",
        ),
        (["train", "recipe.yaml", "name=x", "training.best_by=pearson"], "one of auto, loss, accuracy, f1"),
        (["train", "recipe.yaml", "name=x", "data.template=alpaca"], "it is about answers"),
        (["train", "recipe.yaml", "name=x", "model.quantization=nf4"], "unrounded base"),
        (["train", "recipe.yaml", "name=x", "task=regression"], "'bad' is no number"),
    ],
)
def test_what_does_not_go_is_told(workplace, capsys, arguments, message):
    import re

    assert linchain(*arguments) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(message, told), told
    assert not Path("runs/x").exists()
