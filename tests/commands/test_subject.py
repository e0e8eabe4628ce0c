"""MODEL, as `eval` and `generate` take it: its template, its base, its device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from linchain_cli.commands.subject import process_device
from linchain_cli.model.loading import load_model
from linchain_cli.training import processes

from ..architectures import SMALL
from ..command_line import linchain
from .conftest import make_run, read


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


@pytest.mark.parametrize(
    "command", [["eval", "base", "--tasks", "boolq", "--data-dir", "data"], ["generate", "base", "Is it?"]]
)
def test_a_model_that_sees_what_it_should_predict_is_refused(workplace, capsys, command):
    """Scores by likelihood were those of a model that had been shown the answer."""
    config = Gemma3TextConfig(
        **{**SMALL, "vocab_size": read("base/config.json")["vocab_size"]},
        head_dim=8,
        use_bidirectional_attention=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    assert linchain(*command) == 2
    assert "sees the tokens that it should predict" in " ".join(capsys.readouterr().err.split())
    assert not Path("eval-base").exists()


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
        assert linchain(*arguments) == 0 and set_to[0] == 3


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
