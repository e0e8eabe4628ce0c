"""`linchain generate` on tiny runs and checkpoints, within this process."""

from __future__ import annotations

import json

import pytest
import torch

from linchain_cli.evaluation.speaking import Said, Speaker

from ..command_line import linchain
from .conftest import make_run


def test_columns_of_a_template_of_ones_own(workplace, capsys, monkeypatch):
    make_run("own", template={"prompt": "{topic}, for {who}:\n", "response": "{output}"})
    short = ("--max-new-tokens", 4)
    columns = ("--column", "topic=apples = fruit", "--column", "who=me")
    assert linchain("generate", "runs/own", *columns, *short) == 0
    expected, seen = capsys.readouterr().out, []
    said = Said("", "end", 1, 1)
    monkeypatch.setattr(Speaker, "say", lambda self, row, *args, **options: seen.append(row) or said)
    assert linchain("generate", *columns, *short, "--template", "plain") == 2
    assert "the template asks for a column 'instruction'" not in capsys.readouterr().err
    assert linchain("generate", "runs/own", *columns, *short) == 0 and expected
    assert seen[-1]["topic"] == "apples = fruit" and seen[-1]["who"] == "me"
    capsys.readouterr()
    monkeypatch.setattr("linchain_cli.commands.generate.load_subject", None)  # no weights are read for these
    for wrong, reason in {
        ("--column", "topic=x"): "the template asks for a column 'who': give it with --column who=VALUE",
        ("--column", "who"): "expected NAME=VALUE",
        (*columns, "--column", "whom=you"): "Did you mean 'who'?",
    }.items():
        assert linchain("generate", "runs/own", *wrong) == 2
        assert reason in capsys.readouterr().err


def test_the_prompt_may_come_from_the_standard_input(workplace, capsys, monkeypatch):
    import io

    short = ("--max-new-tokens", 5)
    assert linchain("generate", "runs/tuned", "Is an apple\na fruit?", *short) == 0
    expected = capsys.readouterr().out
    for words in (("runs/tuned", "-"), ("runs/tuned",), ("-",), ()):
        monkeypatch.setattr("sys.stdin", io.StringIO("Is an apple\na fruit?\n"))
        assert linchain("generate", *words, *short) == 0
        assert capsys.readouterr().out == expected


def test_an_answer_is_drawn_and_ends_before_a_text(workplace, capsys):
    ask = ("generate", "runs/tuned", "Is an apple a fruit?", "--max-new-tokens", 12)
    assert linchain(*ask) == 0
    likeliest = capsys.readouterr().out.strip()
    drawn = set()
    for seed in range(3):
        torch.manual_seed(seed)
        assert linchain(*ask, "--temperature", 3) == 0
        drawn.add(capsys.readouterr().out)
    assert len(drawn) > 1
    assert linchain(*ask, "--temperature", 1, "--top-p", 1e-9) == 0
    assert capsys.readouterr().out.strip() == likeliest
    assert linchain(*ask, "--stop", likeliest[3:5]) == 0
    assert capsys.readouterr().out.strip() == likeliest[:3].strip()
    for wrong in (("--temperature", 1, "--beams", 2), ("--top-p", 0.5)):
        assert linchain(*ask, *wrong) == 2


def test_generate_answers_through_the_runs_template(workplace, capsys):
    assert linchain("generate", "Is an apple a fruit?", "--max-new-tokens", 6) == 0
    adapted = capsys.readouterr().out
    assert (
        linchain("generate", "base", "Is an apple a fruit?", "--max-new-tokens", 6, "--template", "plain")
        == 0
    )
    base = capsys.readouterr().out
    assert adapted.strip() and adapted != base


def test_an_answer_as_json(workplace, capsys):
    ask = ("generate", "runs/tuned", "Is an apple a fruit?", "--max-new-tokens", 6)
    assert linchain(*ask) == 0
    plain = capsys.readouterr()
    assert "runs/tuned: template plain, as runs/tuned was trained" in plain.err
    assert linchain(*ask, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == plain.out.strip() and found["prompt"] == "Is an apple a fruit?\n"
    assert (found["model"], found["template"], found["stop_reason"]) == ("runs/tuned", "plain", "length")
    assert found["tokens"]["answer"] == 6 and found["row"]["instruction"] == "Is an apple a fruit?"
    assert found["reasoning"] is None


@pytest.mark.parametrize("answer", ["2", None])
def test_json_tells_thought_from_answer(workplace, capsys, monkeypatch, answer):
    said = Said("<think>1 + 1", "length", 1, 4, ("1 + 1", answer))
    monkeypatch.setattr(Speaker, "say", lambda *args, **options: said)
    assert linchain("generate", "runs/tuned", "How many?", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reasoning"], found["answer"]) == ("1 + 1", answer)
