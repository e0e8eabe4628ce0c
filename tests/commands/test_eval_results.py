"""`linchain eval`: where results go, and that none is written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ..command_line import linchain
from .conftest import make_run, read


def contents(directory):
    """What was measured: the results below a directory and their rows."""
    return {path: path.read_bytes() for path in Path(directory).glob("*.json*")}


OTHER_SETTINGS = [
    ("--limit", 3),
    ("--template", "alpaca"),
    ("--dtype", "bfloat16"),
    ("--protocol", "generate", "--beams", 1),
    ("--protocol", "generate", "--beams", 2),
]


def test_no_setting_is_written_over_another(workplace, capsys):
    """Each of them once replaced what the one before had measured."""
    arguments = ("eval", "runs/tuned", "--tasks", "boolq", "--data-dir", "data")
    assert linchain(*arguments) == 0
    for number, options in enumerate(OTHER_SETTINGS, 2):
        before = contents("runs/tuned/eval")
        assert linchain(*arguments, *options) == 0
        after = contents("runs/tuned/eval")
        assert len(after) == 2 * number and before.items() <= after.items()
    assert sorted(path.name for path in Path("runs/tuned/eval").glob("*.json")) == [
        "generate-beams2.json", "generate.json", "likelihood-alpaca.json", "likelihood-bfloat16.json",
        "likelihood-limit3.json", "likelihood.json",
    ]  # fmt: skip


def test_another_task_joins_the_results_of_its_setting(workplace, capsys):
    arguments = ("eval", "runs/tuned", "--data-dir", "data", "--tasks")
    assert linchain(*arguments, "boolq") == 0
    boolq = read("runs/tuned/eval/likelihood.json")
    assert linchain(*arguments, "piqa") == 0
    both = read("runs/tuned/eval/likelihood.json")
    assert list(both["tasks"]) == ["boolq", "piqa"] and both["tasks"]["boolq"] == boolq["tasks"]["boolq"]
    assert both["average"] == pytest.approx(sum(task["accuracy"] for task in both["tasks"].values()) / 2)
    assert len(Path("runs/tuned/eval/likelihood.predictions.jsonl").read_text().splitlines()) == 16
    assert "boolq" not in capsys.readouterr().out.rpartition("template plain")[2]  # asked for piqa alone


def test_what_was_measured_is_not_measured_again(workplace, capsys, monkeypatch):
    from linchain_cli.evaluation.jobs import LikelihoodJob

    arguments = ("eval", "runs/tuned", "--data-dir", "data", "--tasks")
    assert linchain(*arguments, "boolq") == 0
    before, shown = contents("runs/tuned/eval"), capsys.readouterr().out
    monkeypatch.setattr(LikelihoodJob, "run", None)
    assert linchain(*arguments, "boolq") == 0
    assert contents("runs/tuned/eval") == before
    again = capsys.readouterr().out
    assert again.startswith("measured before: boolq") and again.endswith(shown)


def test_an_edited_configuration_is_another_model_of_the_same_weights(workplace, capsys):
    arguments = ("eval", "base", "--data-dir", "data", "--tasks", "boolq", "--out", "results")
    assert linchain(*arguments) == 0
    config = read("base/config.json")
    Path("base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    capsys.readouterr()
    assert linchain(*arguments) == 0
    assert "measured before" not in capsys.readouterr().out
    found = {path: json.loads(data) for path, data in contents("results").items() if path.suffix == ".json"}
    assert len(found) == 2 and len({one["config_sha256"] for one in found.values()}) == 2
    Path("base/config.json").write_text(json.dumps(config | {"transformers_version": "4.40.0"}))
    assert linchain(*arguments) == 0
    assert capsys.readouterr().out.startswith("measured before: boolq")


def test_the_second_models_results_are_kept(workplace, capsys):
    make_run("other", template="alpaca")
    task = ("--tasks", "boolq", "--data-dir", "data")
    assert linchain("eval", "runs/other", *task) == 0
    before = contents("runs/other/eval")
    assert linchain("eval", "runs/tuned", *task, "--limit", 4, "--against", "runs/other") == 0
    after = contents("runs/other/eval")
    assert before.items() <= after.items() and len(after) == 4
    assert linchain("eval", "runs/tuned", *task, "--limit", 4, "--against", "base") == 0
    models = [one["model"] for one in read("runs/tuned/eval/likelihood.json")["against"]]
    assert models == ["runs/other", "base"]


def test_two_templates_of_ones_own_are_two_results(workplace, capsys):
    own = [{"prompt": f"{word} {{instruction}}\n", "response": "{output}"} for word in ("Ask:", "Tell:")]
    for number, template in enumerate(own):
        make_run(f"own{number}", template=template)
    task = ("--tasks", "boolq", "--data-dir", "data")
    assert linchain("eval", "runs/own0", *task, "--against", "runs/own1") == 0
    out = " ".join(capsys.readouterr().out.split())
    hashes = [read(f"runs/own{number}/eval/likelihood.json")["template_sha256"][:8] for number in range(2)]
    assert f"not evaluated alike — template: custom {hashes[0]} and {hashes[1]}" in out


def test_the_file_that_was_named_is_never_anothers(workplace, capsys):
    task = ("--tasks", "boolq", "--data-dir", "data")
    Path("mine.json").write_text("{}")
    Path("rows.predictions.jsonl").write_text("mine")
    Path("chart.png").write_bytes(b"my picture")
    assert linchain("eval", "base", *task, "--out", "result.json") == 0
    kept = contents(".")
    capsys.readouterr()
    for out, reason in {
        "mine.json": "mine.json: this is no result of linchain eval",
        "rows.json": "rows.predictions.jsonl is there already",
        "result.json": "result.json holds another result (base: likelihood · template chat · float32)",
        "chart.png": "expected a .json file or a directory",
        "mine.json/x": "mine.json is not a directory: name another place",
    }.items():
        assert linchain("eval", "base", *task, "--limit", 2, "--out", out) == 2
        assert reason in capsys.readouterr().err
    assert contents(".") == kept and Path("chart.png").read_bytes() == b"my picture"
    assert linchain("eval", "base", *task, "--out", "chart.json") == 0
    assert Path("chart.png").read_bytes() == b"my picture" and "chart:" not in capsys.readouterr().out


def test_a_directory_can_be_named(workplace):
    task = ("--tasks", "boolq", "--data-dir", "data")
    Path("there").mkdir()
    for out in ("there", "new/results"):
        assert linchain("eval", "base", *task, "--out", out) == 0
        assert read(f"{out}/likelihood.json")["tasks"]["boolq"]["n"] == 8


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_evaluated(
    workplace, capsys, monkeypatch
):
    arguments = ("eval", "runs/tuned", "--tasks", "boolq", "--data-dir", "data")
    monkeypatch.setattr("linchain_cli.commands.eval.load_subject", None)
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    assert linchain(*arguments) == 2
    assert (
        "cannot be written to: name another place for the results, such as --out" in capsys.readouterr().err
    )


def test_beside_the_first_go_results_of_a_second_model_that_can_only_be_read(workplace, capsys, monkeypatch):
    real = os.access
    monkeypatch.setattr("os.access", lambda path, mode: "runs" not in str(path) and real(path, mode))
    arguments = ("eval", "base", "--tasks", "boolq", "--data-dir", "data", "--out", "results")
    assert linchain(*arguments, "--against", "runs/tuned") == 0
    assert {one["model"] for one in map(read, Path("results").glob("*.json"))} == {"base", "runs/tuned"}
    assert not Path("runs/tuned/eval").exists()


def test_predictions_may_hold_any_line_separator(workplace, capsys):
    """U+2028 in a text is no end of a line; --against once called such a file damaged."""
    task = ("--tasks", "boolq", "--data-dir", "data", "--protocol", "generate")
    assert linchain("eval", "base", *task, "--out", "earlier.json") == 0
    rows = [json.loads(line) for line in Path("earlier.predictions.jsonl").read_text().split("\n") if line]
    rows[0]["text"] = "one\u2028two\x85three"
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path("earlier.predictions.jsonl").write_text("".join(lines))
    assert linchain("eval", "runs/tuned", *task, "--against", "earlier.json") == 0
