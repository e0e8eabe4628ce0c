"""`linchain eval` on tiny runs and checkpoints, within this process."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linchain_cli import cli
from linchain_cli.chain.files import adapter_hash
from linchain_cli.commands.subject import process_device
from linchain_cli.model.hashing import base_hash
from linchain_cli.model.loading import load_model
from linchain_cli.training import processes

from .conftest import linchain, make_run


def read(path):
    return json.loads(Path(path).read_text())


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
        (["eval", "runs/nothing", "--tasks", "boolq", "--data-dir", "data"], "runs/nothing"),
        (["eval", "runs/unfinished"], "was killed and has no checkpoint yet"),
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
    assert linchain(*arguments) == 2
    error = capsys.readouterr().err
    assert reason in error and "Traceback" not in error


@pytest.mark.parametrize("command", [["eval"], ["generate", "Why?"], ["chat"]])
def test_an_unknown_template_is_told_before_a_model_is_looked_for(workplace, capsys, command):
    shutil.rmtree("runs")
    assert linchain(*command, "--template", "chatt") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--template chatt: there is no such template. Did you mean 'chat'?" in error
    assert "data.template" not in error


@pytest.mark.parametrize("command", [["eval", "base", "--tasks", "everyday"], ["generate", "base", "Why?"]])
def test_a_missing_chat_template_is_told_before_the_weights_are_read(workplace, capsys, command):
    settings = read("base/tokenizer_config.json")
    settings.pop("chat_template", None)
    Path("base/tokenizer_config.json").write_text(json.dumps(settings))
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    Path("base/model.safetensors").write_bytes(b"no weights")
    assert linchain(*command, "--template", "chat") == 2
    assert "--template chat: base has no chat template" in " ".join(capsys.readouterr().err.split())


def test_another_base_is_refused(workplace, capsys):
    model = load_model(Path("base"), dtype="float32", device="cpu")
    torch.nn.init.ones_(model.get_output_embeddings().weight)
    model.save_pretrained("base")
    assert linchain("eval", "--data-dir", "data") == 2
    assert "was trained on other weights" in capsys.readouterr().err
    assert linchain("eval", "--data-dir", "data", "--allow-other-base") == 0
    assert linchain("generate", "Is it?", "--max-new-tokens", 2, "--allow-other-base") == 0


def test_a_merged_run_is_asked_as_it_was_trained(workplace, capsys):
    """It was asked through alpaca, whatever it had been trained with: other answers from the same weights."""
    task = ("--tasks", "boolq,piqa", "--data-dir", "data")
    assert linchain("eval", "runs/tuned", *task) == 0
    assert linchain("merge", "runs/tuned") == 0
    capsys.readouterr()
    assert linchain("eval", "runs/tuned/merged", *task) == 0
    assert "runs/tuned/merged: template plain, as runs/tuned/merged was trained" in capsys.readouterr().err
    rows = [
        [json.loads(line) for line in (Path(place) / "likelihood.predictions.jsonl").open()]
        for place in ("runs/tuned/eval", "eval-tuned-merged")
    ]
    assert [row["prediction"] for row in rows[0]] == [row["prediction"] for row in rows[1]]
    assert linchain("generate", "runs/tuned", "Is it?", "--max-new-tokens", 5) == 0
    expected = capsys.readouterr()
    assert linchain("generate", "runs/tuned/merged", "Is it?", "--max-new-tokens", 5) == 0
    found = capsys.readouterr()
    assert found.out == expected.out
    assert "runs/tuned/merged: template plain, as runs/tuned/merged was trained" in found.err


def test_an_imported_adapter_is_asked_as_its_record_says(workplace, capsys):
    """Its export holds the record; without one it was asked through alpaca, whatever it was trained with."""
    make_run("own", template={"prompt": "Q: {instruction}\n", "response": "{output}"})
    assert linchain("export", "runs/own", "--format", "peft") == 0
    assert linchain("import", "runs/own/peft", "--out", "again") == 0
    capsys.readouterr()
    for name in ("runs/own", "again"):
        assert linchain("eval", name, "--tasks", "boolq", "--data-dir", "data") == 0
    mine, again = (read(Path(name, "eval", "likelihood.json")) for name in ("runs/own", "again"))
    assert mine["template_sha256"] == again["template_sha256"]
    for name in ("runs/own", "again"):
        assert linchain("merge", name) == 0
    records = [Path(name, "merged", "linchain_prompt.json").read_bytes() for name in ("runs/own", "again")]
    assert records[0] == records[1]


def test_without_a_record_a_model_is_asked_through_its_chat_template(workplace, capsys):
    assert linchain("eval", "base", "--tasks", "boolq", "--data-dir", "data") == 0
    assert read("eval-base/likelihood.json")["template"] == "chat"
    assert "base: template chat, base has a chat template" in capsys.readouterr().err
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (path := Path("base", name)).exists():
            settings = None if name.endswith("jinja") else json.loads(path.read_text())
            if settings is None:
                path.unlink()
            else:
                settings.pop("chat_template", None)
                path.write_text(json.dumps(settings))
    assert linchain("generate", "base", "Is it?", "--max-new-tokens", 2) == 0
    assert "template alpaca, base has no chat template, and no record" in capsys.readouterr().err


def test_threads_stay_within_the_containers_limit(workplace, monkeypatch):
    set_to = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr("linchain_cli.machine.cpu_limit", lambda: 3)
    for arguments in (
        ["eval", "runs/tuned", "--tasks", "boolq", "--data-dir", "data"],
        ["merge", "runs/tuned"],
    ):
        set_to.clear()
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0 and set_to[0] == 3


def test_processes_wait_for_each_other_as_long_as_those_that_train(monkeypatch, group_of_gpus, launched_as):
    """Accelerate's own group would be one of NCCL alone, which ends a process that waits for ten minutes."""
    asked = group_of_gpus
    state = SimpleNamespace(device=torch.device("cuda", 1))
    monkeypatch.setattr("accelerate.PartialState", lambda **options: asked.append(options) or state)
    launched_as(1, of=2)
    assert process_device() == state.device
    assert asked == [
        1,
        (processes.BACKENDS, processes.PATIENCE),
        {"cpu": False, "timeout": processes.PATIENCE},
    ]
