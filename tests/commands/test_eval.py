"""`linchain eval` on tiny runs and checkpoints, within this process."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest

from linchain_cli.chain.files import adapter_hash
from linchain_cli.model import loading
from linchain_cli.model.hashing import base_hash

from ..command_line import linchain
from .conftest import make_run, read


def test_a_run_is_evaluated_through_its_template(workplace, capsys):
    assert linchain("eval", "runs/tuned", "--tasks", "boolq,piqa", "--data-dir", "data", "--limit", 5) == 0
    result = read("runs/tuned/eval/likelihood.json")
    assert (result["model"], result["template"], result["dtype"]) == ("runs/tuned", "plain", "float32")
    assert result["adapter_sha256"] == adapter_hash(Path("runs/tuned/adapter"))
    assert result["base_sha256"] == base_hash(Path("base"))
    assert {name: entry["n"] for name, entry in result["tasks"].items()} == {"boolq": 5, "piqa": 5}
    assert Path("runs/tuned/eval/likelihood.png").is_file()
    assert len(Path("runs/tuned/eval/likelihood.predictions.jsonl").read_text().splitlines()) == 10
    out = capsys.readouterr().out
    assert "runs/tuned · likelihood · template plain" in out and "runs/tuned/eval/likelihood.json" in out


def test_left_out_it_is_the_newest_run_with_its_own_tasks(workplace, capsys):
    make_run("unfinished", status="running")
    assert linchain("eval", "--data-dir", "data") == 0
    assert "run runs/tuned" in capsys.readouterr().err
    assert list(read("runs/tuned/eval/likelihood.json")["tasks"]) == ["boolq"]


def test_a_checkpoint_gets_its_chat_template_and_a_file_beside(workplace):
    assert linchain("eval", "base/", "--tasks", "boolq", "--data-dir", "data") == 0
    result = read("eval-base/likelihood.json")
    assert (result["model"], result["template"], result.get("adapter_sha256")) == ("base", "chat", None)
    assert (
        linchain(
            "eval",
            "base",
            "--tasks",
            "boolq",
            "--data-dir",
            "data",
            "--out",
            "deep/er.json",
            "--template",
            "plain",
        )
        == 0
    )
    assert read("deep/er.json")["template"] == "plain"


def test_generation_has_a_file_of_its_own(workplace):
    assert linchain("eval", "--protocol", "generate", "--beams", 2, "--data-dir", "data", "--limit", 3) == 0
    result = read("runs/tuned/eval/generate.json")
    assert (result["protocol"], result["beams"], result["tasks"]["boolq"]["n"]) == ("generate", 2, 3)
    assert not Path("runs/tuned/eval/likelihood.json").exists()


def test_two_models_are_compared_on_the_same_prompts(workplace, capsys):
    arguments = ["eval", "--tasks", "boolq,piqa", "--data-dir", "data"]
    assert linchain(*arguments, "--against", "base") == 0
    out = capsys.readouterr().out
    assert "runs/tuned minus base" in out and "not evaluated alike" not in out
    (comparison,) = read("runs/tuned/eval/likelihood.json")["against"]
    assert comparison["model"] == "base" and comparison["all_rows"]["n"] == 16
    assert read("eval-base/likelihood.json")["template"] == "plain"  # that of the run
    one = [json.loads(line) for line in Path("runs/tuned/eval/likelihood.predictions.jsonl").open()]
    two = [json.loads(line) for line in Path("eval-base/likelihood.predictions.jsonl").open()]
    gained = sum(a["correct"] and not b["correct"] for a, b in zip(one, two, strict=True))
    assert comparison["all_rows"]["gained"] == gained


def test_the_first_model_is_gone_before_the_second_is_loaded(workplace, monkeypatch):
    load, weights, left = loading.load_model, [], []

    def loads(*arguments, **options):
        left.append(sum(weight() is not None for weight in weights))
        model = load(*arguments, **options)
        weights.extend(map(weakref.ref, model.parameters()))
        return model

    monkeypatch.setattr(loading, "load_model", loads)
    gc.disable()
    try:
        assert linchain("eval", "--tasks", "boolq", "--data-dir", "data", "--against", "base") == 0
    finally:
        gc.enable()
    assert left == [0, 0]


def test_with_json_stdout_holds_the_results_alone(workplace, capsys):
    arguments = ["eval", "--tasks", "boolq", "--data-dir", "data", "--json"]
    assert linchain(*arguments) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said.pop("results") == "runs/tuned/eval/likelihood.json"
    assert said["tasks"] == read("runs/tuned/eval/likelihood.json")["tasks"] and said["model"] == "runs/tuned"
    assert linchain(*arguments, "--against", "base") == 0
    ((comparison,),) = (one["against"] for one in json.loads(capsys.readouterr().out))
    assert comparison["model"] == "base"


def test_an_earlier_result_is_compared_without_its_model(workplace, capsys, monkeypatch):
    arguments = ["eval", "--tasks", "boolq,piqa", "--data-dir", "data"]
    assert linchain(*arguments, "--against", "base") == 0
    expected = read("runs/tuned/eval/likelihood.json")["against"]
    shutil.move("eval-base/likelihood.json", "earlier.json")
    shutil.move("eval-base/likelihood.predictions.jsonl", "earlier.predictions.jsonl")
    capsys.readouterr()
    assert linchain(*arguments, "--against", "earlier.json") == 0
    assert "runs/tuned minus base" in capsys.readouterr().out
    assert read("runs/tuned/eval/likelihood.json")["against"] == expected
    assert not Path("eval-base/likelihood.json").exists()


@pytest.mark.parametrize(
    ("against", "reason"),
    [
        ("nowhere.json", "nowhere.json: cannot read this result: nowhere.json: No such file"),
        ("recipe.json", "recipe.json: this is no result of linchain eval: it has no tasks"),
        ("alone.json", "alone.json: cannot read this result: alone.predictions.jsonl: No such file"),
        ("broken.json", "broken.json: this is no result of linchain eval, or a damaged one"),
        ("shorter.json", "shorter.predictions.jsonl beside it is not of the same evaluation"),
        ("limited.json", r"limited.json is of other rows (boolq: 3 rows there, 8 here)"),
        ("piqa.json", "piqa.json is of other tasks (piqa instead of boolq)"),
        ("no/such/model", "no/such/model"),
    ],
)
def test_a_wrong_second_model_is_told_before_the_first_is_evaluated(workplace, capsys, against, reason):
    for name, tasks, limit in (
        ("limited", "boolq", 3),
        ("piqa", "piqa", 8),
        ("shorter", "boolq", 8),
        ("alone", "boolq", 8),
    ):
        options = ("--tasks", tasks, "--limit", limit, "--data-dir", "data", "--out", f"{name}.json")
        assert linchain("eval", "base", *options) == 0
    Path("recipe.json").write_text("{}")
    Path("alone.predictions.jsonl").unlink()
    Path("broken.json").write_text("{")
    Path("broken.predictions.jsonl").write_text("")
    rows = Path("shorter.predictions.jsonl").read_text().splitlines(keepends=True)
    Path("shorter.predictions.jsonl").write_text("".join(rows[1:]))
    capsys.readouterr()
    arguments = ("eval", "runs/tuned", "--tasks", "boolq", "--data-dir", "data", "--against", against)
    assert linchain(*arguments) == 2
    assert reason in capsys.readouterr().err
    assert not Path("runs/tuned/eval/likelihood.json").exists()


def test_a_task_without_a_right_answer_has_a_chart(workplace, monkeypatch):
    """Its interval starts at 0 %, where its bar ends: rounding once put it a hair above."""
    from linchain_cli.evaluation.answers import Reading
    from linchain_cli.evaluation.jobs import LikelihoodJob

    monkeypatch.setattr(LikelihoodJob, "_best", lambda *_: Reading("neither", False))
    assert linchain("eval", "--data-dir", "data", "--tasks", "boolq") == 0
    assert read("runs/tuned/eval/likelihood.json")["tasks"]["boolq"]["accuracy"] == 0
    assert Path("runs/tuned/eval/likelihood.png").exists()


def test_runs_with_other_templates_are_not_compared_in_silence(workplace, capsys):
    make_run("other", template="alpaca")
    assert linchain("eval", "runs/tuned", "--data-dir", "data", "--against", "runs/other") == 0
    assert "not evaluated alike — template: plain and alpaca" in capsys.readouterr().out


def test_published_rows_are_shown_on_request(workplace, capsys):
    assert linchain("eval", "--data-dir", "data", "--references") == 0
    assert "No published rows for these tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["eval", "base"], "--tasks is missing"),
        (["eval", "base", "--tasks", "boolq", "--beams", "1"], "--beams 1 is about written answers: add"),
        (
            ["eval", "base", "--tasks", "boolq", "--protocol", "generate", "--normalise", "bytes"],
            "--normalise bytes is about likelihoods",
        ),
        (["eval", "base", "--tasks", "bolq"], "Did you mean 'boolq'?"),
        (["eval", "base", "--tasks", "boolq", "--data-dir", "nowhere"], "there is no such directory"),
        (["eval", "base", "--tasks", "mawps", "--data-dir", "data"], "data/mawps/test.json"),
        (["eval", "compared"], "compared is a comparison: name one of its runs, which lie in compared/arms/"),
        (["eval", "runs/nothing", "--tasks", "boolq", "--data-dir", "data"], "runs/nothing"),
        (
            ["eval", "runs/unfinished"],
            "no checkpoint yet: continue it with 'linchain train runs/unfinished/recipe.yaml --resume'",
        ),
        (["eval", "tuned"], "Did you mean 'runs/tuned'?"),
        (["eval", "base", "--tasks", "boolq", "--base", "base"], "--base is for runs, and base is none"),
        (["generate", "runs/tuned"], "runs/tuned is a model, and the prompt is missing"),
        (["generate", "base", "a", "b"], "put the prompt in quotes"),
        (["generate", "base", "  "], "the prompt is empty"),
        (
            ["eval", "base", "--tasks", "lm_eval:no_such_task_here"],
            "knows no such task" if find_spec("lm_eval") else "pip install lm-eval",
        ),
    ],
)
def test_wrong_input_is_one_message(workplace, capsys, arguments, reason):
    make_run("unfinished", status="running")
    Path("compared").mkdir()
    Path("compared", "comparison.json").write_text("{}")
    assert linchain(*arguments) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error
