"""Evaluations from tasks to result files: settings, continuing, sharing among processes."""

from __future__ import annotations

import copy
import errno
import json
import os
import time

import pytest
import torch
from tokenizers import pre_tokenizers

from linchain_cli import storage
from linchain_cli.chain import ChainConfig, detach, inject
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.evaluation.answers import AnswerRule
from linchain_cli.evaluation.evaluate import evaluate
from linchain_cli.evaluation.jobs import LikelihoodJob
from linchain_cli.evaluation.progress import FinishedRows
from linchain_cli.evaluation.results import predictions_path, read_results
from linchain_cli.evaluation.task import Task, read_row
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer

from .conftest import forked, naive_scores


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return load_tokenizer(tiny_llama_dir)


@pytest.fixture
def model(tiny_llama_dir):
    return load_model(tiny_llama_dir, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def template(tokenizer):
    return get_template("alpaca", tokenizer)


@pytest.fixture(scope="module")
def tasks(commonsense_rows):
    return make_tasks(commonsense_rows(36))


def make_tasks(rows):
    """One task per answer style."""
    rule, made = AnswerRule("options"), []
    for name, style in {"yes-no": "true/", "two": "solution1/", "many": "answer1/"}.items():
        own = [row for row in rows if f"Answer format: {style}" in row["instruction"]]
        checked = tuple(read_row(row, index, rule, name) for index, row in enumerate(own))
        made.append(Task(name, checked, f"{name}.json", rule, max_new_tokens=6))
    return made


def run(model, tokenizer, template, tasks, **options):
    return evaluate(model, tokenizer, template, tasks, name="tiny", **options)


def test_the_result_has_what_the_contract_says(model, tokenizer, template, tasks, tmp_path):
    out = tmp_path / "deep" / "likelihood.json"
    results = run(model, tokenizer, template, tasks, out=out)
    written = json.loads(out.read_text())
    assert read_results(out) == results and written == results.summary.to_json()
    assert {
        "model": "tiny",
        "protocol": "likelihood",
        "template": "alpaca",
        "dtype": "float32",
    }.items() <= written.items()
    assert list(written["tasks"]) == ["yes-no", "two", "many"]
    for task in tasks:
        entry = written["tasks"][task.name]
        rows = [row for row in results.predictions if row["task"] == task.name]
        assert [row["index"] for row in rows] == list(range(len(task.rows)))
        assert entry["n"] == 12 and entry["unparsable"] == 0
        assert entry["accuracy"] == sum(row["correct"] for row in rows) / 12
        assert entry["interval"][0] <= entry["accuracy"] <= entry["interval"][1]
    assert written["average"] == pytest.approx(
        sum(entry["accuracy"] for entry in written["tasks"].values()) / 3
    )
    lines = [json.loads(line) for line in predictions_path(out).read_text().splitlines()]
    assert lines == results.predictions
    assert set(lines[0]) == {"index", "task", "prediction", "answer", "correct", "scores"}
    assert sorted(path.name for path in out.parent.iterdir()) == [
        ".results.lock",
        "likelihood.json",
        "likelihood.predictions.jsonl",
    ]


def test_predictions_are_those_of_scoring_every_text_alone(model, tokenizer, template, tasks):
    results = run(model, tokenizer, template, tasks)
    by_key = {(row["task"], row["index"]): row for row in results.predictions}
    for task in tasks:
        for row in task.rows:
            prompt = template.prompt(row.fields) + "the correct answer is "
            texts = [tokenizer(prompt + option, add_special_tokens=False).input_ids for option in row.options]
            shared = len(os.path.commonprefix(texts))
            scores = naive_scores(model, texts, shared)
            found = by_key[task.name, row.index]
            assert list(found["scores"].values()) == pytest.approx(scores, abs=1e-4)
            assert found["prediction"] == row.options[scores.index(max(scores))]


def test_of_equal_options_the_first_wins(model, tokenizer, template, tasks):
    """Without weights in the output projection every token is as likely as any other."""
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    results = run(model, tokenizer, template, tasks[:2])
    assert all(row["prediction"] == list(row["scores"])[0] for row in results.predictions)
    assert [score.near_ties for score in results.summary.tasks.values()] == [12, 12]


@pytest.mark.parametrize("batch_tokens", [1, 250, 100_000])
def test_batch_size_changes_no_prediction(model, tokenizer, template, tasks, batch_tokens):
    reference = run(model, tokenizer, template, tasks)
    results = run(model, tokenizer, template, tasks, batch_tokens=batch_tokens)
    assert sum(score.near_ties for score in reference.summary.tasks.values()) == 0
    assert [row["prediction"] for row in results.predictions] == [
        row["prediction"] for row in reference.predictions
    ]


def test_generated_answers_are_read_and_unparsable_ones_counted(model, tokenizer, template, tasks):
    results = run(model, tokenizer, template, tasks[:2], protocol="generate", beams=2)
    assert results.summary.protocol == "generate" and results.summary.beams == 2
    for name, score in results.summary.tasks.items():
        rows = [row for row in results.predictions if row["task"] == name]
        assert score.unparsable == sum(row["prediction"] is None for row in rows)
        assert all(row["correct"] is False for row in rows if row["prediction"] is None)
    assert set(results.predictions[0]) == {"index", "task", "prediction", "answer", "correct", "text"}


def test_free_answers_have_no_likelihood(model, tokenizer, template):
    rule = AnswerRule("number")
    task = Task(
        "sums", (read_row({"instruction": "1 + 1?", "answer": "2"}, 0, rule, "sums"),), "sums", rule, 4
    )
    with pytest.raises(InputError, match="--protocol generate"):
        run(model, tokenizer, template, [task])
    assert run(model, tokenizer, template, [task], protocol="generate").summary.tasks["sums"].majority is None


def test_dropout_is_off_and_the_mode_comes_back(tiny_llama_dir, tokenizer, template, tasks, monkeypatch):
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    inject(model, ChainConfig(4, 2, 8, dropout=0.5, target_modules=["q_proj", "v_proj"]))
    for layer in model.modules():
        if hasattr(layer, "links"):
            torch.nn.init.normal_(layer.B, std=0.5, generator=torch.Generator().manual_seed(0))
    model.train()
    first, second = (run(model, tokenizer, template, tasks) for _ in range(2))
    assert first.predictions == second.predictions and model.training
    assert first.summary.adapter_sha256 is not None
    base = run(load_model(tiny_llama_dir, dtype="float32", device="cpu"), tokenizer, template, tasks)
    assert base.summary.adapter_sha256 is None
    assert base.predictions[0]["scores"] != first.predictions[0]["scores"]


def test_a_task_brings_its_own_template(model, tokenizer, template, tasks):
    own = Task(**{**vars(tasks[0]), "template": {"prompt": "{instruction} ->", "response": "{output}"}})
    other = run(model, tokenizer, template, [own])
    assert (
        other.predictions[0]["scores"] != run(model, tokenizer, template, tasks[:1]).predictions[0]["scores"]
    )
    missing = Task(**{**vars(tasks[0]), "template": {"prompt": "{question}", "response": "{output}"}})
    with pytest.raises(InputError, match=r"yes-no\.json, row 1: the template wants a column 'question'"):
        run(model, tokenizer, template, [missing])


class Interrupted(Exception):
    pass


def interrupt_after(batches):
    left = [batches]

    def on_progress(*_):
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    return on_progress


def alike(results):
    """What was found, without when and where."""
    scores = {name: {**score.to_json(), "measured_at": None} for name, score in results.summary.tasks.items()}
    return results.summary.setting, scores, results.summary.average, results.predictions


def test_a_stopped_evaluation_continues(model, tokenizer, template, tasks, tmp_path):
    out, options = tmp_path / "likelihood.json", {"batch_tokens": 300}
    complete = run(model, tokenizer, template, tasks, **options)
    with pytest.raises(Interrupted):
        run(model, tokenizer, template, tasks, out=out, on_progress=interrupt_after(3), **options)
    assert not out.exists()
    parts = list(tmp_path.glob(".*.part-*"))
    with open(parts[-1], "ab") as handle:
        handle.write(b'{"index": 5, "task": "ma')  # what a killed process leaves
    given_up, other = (tmp_path / f".{digit * 16}.part-00000000.jsonl" for digit in "ab")
    for part in (given_up, other):
        part.write_text("")
    os.utime(given_up, (0, time.time() - 40 * 24 * 3600))
    seen = []
    results = run(
        model, tokenizer, template, tasks, out=out, on_progress=lambda *args: seen.append(args), **options
    )
    assert alike(results) == alike(complete)
    assert seen[0][0] == "continuing" and 0 < seen[0][1] < 36 and seen[-1][1:] == (36, 36)
    whole = []
    run(model, tokenizer, template, tasks, on_progress=lambda *args: whole.append(args), **options)
    assert len(seen) == len(whole) - 3 + 1
    assert list(tmp_path.glob(".*.part-*")) == [other]  # what was given up long ago is gone, too


@pytest.mark.parametrize("change", ["adapter", "dtype", "template", "rows", "protocol", "tokenizer"])
def test_another_evaluation_does_not_continue_it(
    tiny_llama_dir, tokenizer, template, tasks, tmp_path, change
):
    model = load_model(tiny_llama_dir, dtype="float32", device="cpu")
    out = tmp_path / "likelihood.json"
    with pytest.raises(Interrupted):
        run(model, tokenizer, template, tasks, out=out, batch_tokens=300, on_progress=interrupt_after(3))
    options = {"batch_tokens": 300}
    if change == "adapter":
        inject(model, ChainConfig(4, 1, 8, target_modules=["q_proj"]))
    elif change == "dtype":
        model = load_model(tiny_llama_dir, dtype="bfloat16", device="cpu")
    elif change == "template":
        template = get_template("plain", tokenizer)
    elif change == "rows":
        tasks = [tasks[0], tasks[1], Task(**{**vars(tasks[2]), "rows": tasks[2].rows[:-1]})]
    elif change == "protocol":
        options["protocol"] = "generate"
    elif change == "tokenizer":
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    done = []
    results = run(
        model, tokenizer, template, tasks, out=out, on_progress=lambda *args: done.append(args[1]), **options
    )
    assert alike(results) == alike(run(model, tokenizer, template, tasks, **options))
    assert done[-1] == sum(len(task.rows) for task in tasks)
    # Of other rows of the last task the first two are still the same; nothing of another model or setting is.
    assert len(done) > 3 if change != "rows" else done[-1] == 35


@pytest.mark.parametrize("protocol", ["likelihood", "generate"])
def test_two_processes_write_the_file_of_one(model, tokenizer, template, tasks, tmp_path, protocol):
    options = {"batch_tokens": 300, "protocol": protocol, "beams": 2}
    one, two = tmp_path / "one" / "eval.json", tmp_path / "two" / "eval.json"
    batches = []
    run(model, tokenizer, template, tasks, out=one, on_progress=lambda *args: batches.append(args), **options)
    assert len(batches) > 3

    def run_one(rank):
        own = []
        results = run(
            model, tokenizer, template, tasks, out=two, on_progress=lambda *args: own.append(args), **options
        )
        assert len(results.predictions) == 36  # each process has all rows in the end
        assert 0 < len(own) < len(batches)  # and did its share
        assert own[-1][1] >= batches[-2][1]  # and showed how far they came together

    assert forked(tmp_path / "store", run_one) == [0, 0]
    assert alike(read_results(two)) == alike(read_results(one))
    assert predictions_path(two).read_bytes() == predictions_path(one).read_bytes()
    assert list(two.parent.glob(".*.part-*")) == []


def test_what_is_measured_already_is_read_by_the_first_process_alone(
    model, tokenizer, template, tasks, tmp_path
):
    """Another machine's disk does not hold its results; all have to measure the same."""
    run(model, tokenizer, template, tasks[:2], out=tmp_path / "0")

    def run_one(rank):
        out = tmp_path / str(rank)
        for _ in range(2):  # what is missing, and then nothing
            results = run(model, tokenizer, template, tasks, out=out)
            assert len(results.predictions) == 36 and set(results.known) >= {"yes-no", "two"}

    assert forked(tmp_path / "store", run_one) == [0, 0]


def test_processes_with_other_adapters_are_refused(model, tokenizer, template, tasks, tmp_path):
    def run_one(rank):
        inject(model, ChainConfig(rank=2, depth=1, target_modules=["q_proj"]), seed=rank)
        try:
            with pytest.raises(LinchainError if rank == 0 else SystemExit) as end:
                run(model, tokenizer, template, tasks, out=tmp_path / "eval.json")
            if rank == 0:
                assert "do not hold the same adapter" in str(end.value)
        finally:
            detach(model)

    assert forked(tmp_path / "store", run_one) == [0, 0]
    assert not (tmp_path / "eval.json").exists()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")],
)
def test_a_batch_that_does_not_fit_is_halved(model, tokenizer, template, tasks, monkeypatch, error):
    reference = run(model, tokenizer, template, tasks)
    original, sizes = LikelihoodJob.run, []

    def small_memory(job, batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise error
        return original(job, batch)

    monkeypatch.setattr(LikelihoodJob, "run", small_memory)
    results = run(model, tokenizer, template, tasks)
    assert max(sizes) > 3
    assert [row["prediction"] for row in results.predictions] == [
        row["prediction"] for row in reference.predictions
    ]

    def no_memory(job, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LikelihoodJob, "run", no_memory)
    with pytest.raises(LinchainError, match="a single row does not fit"):
        run(model, tokenizer, template, tasks)


def test_a_batch_of_a_spread_base_is_not_halved(model, tokenizer, template, tasks, monkeypatch):
    """The other processes would get weights of other blocks for it."""
    tried = []

    def no_memory(job, batch):
        tried.append(batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LikelihoodJob, "run", no_memory)
    with pytest.raises(LinchainError, match="cannot read it in halves .*training.offload_base=true"):
        run(model, tokenizer, template, tasks, share=False)
    assert len(tried) == 1


@pytest.mark.parametrize("protocol", ["likelihood", "generate"])
def test_a_broken_model_is_no_result(model, tokenizer, template, tasks, protocol):
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(LinchainError, match="damaged"):
        run(model, tokenizer, template, tasks, protocol=protocol)


def test_a_disk_that_takes_no_more_rows_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_write", full)
    with pytest.raises(OSError) as error:
        FinishedRows(tmp_path, {"boolq": "a" * 64}).append([{"task": "boolq", "index": 0}])
    assert error.value.filename.startswith(f"{tmp_path}/.aaaa")
