"""`linchain chat`: with lines that are piped into it, and at a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from linchain_cli.evaluation.speaking import Speaker
from linchain_cli.model.loading import load_model

from ..command_line import linchain
from .conftest import make_run

SHORT = ("--max-new-tokens", 6)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def chat(monkeypatch, capsys):
    """chat(lines, *arguments): exit code, answers, and what stderr says."""

    def run(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = linchain("chat", *arguments, *SHORT)
        shown = capsys.readouterr()
        return code, shown.out.splitlines(), shown.err

    return run


@pytest.fixture
def asked(monkeypatch):
    """The prompts that reach the model."""
    prompts, say = [], Speaker.say

    def noted(self, row, *arguments):
        prompts.append(self.template.prompt(row))
        return say(self, row, *arguments)

    monkeypatch.setattr(Speaker, "say", noted)
    return prompts


def test_runs_of_one_base_answer_by_name(workplace, chat, capsys):
    make_run("other", seed=2)
    expected = []
    for model in ("runs/tuned", "runs/other", "base"):
        assert linchain("generate", model, "Is an apple a fruit?", "--template", "plain", *SHORT) == 0
        expected.append(" ".join(capsys.readouterr().out.split()))
    assert len(set(expected)) == 3
    question = "Is an apple a fruit?"
    lines = [question, "/use other", question, "/use base", question, "/use", "/use runs/tuned", question]
    code, answers, err = chat([*lines, "/exit", question], "runs/tuned", "runs/other")
    assert code == 0
    assert [" ".join(answer.split()) for answer in answers] == [*expected, expected[0]]
    assert "runs/other: template plain, as runs/other was trained" in err and "* base" in err
    assert err.count("Each question is asked by itself") == 1


def test_a_conversation_goes_through_the_chat_template(workplace, chat, asked):
    make_run("chatty", template="chat", chat={"system": "Be kind."})
    lines = [
        "one?",
        "",
        '"""two',
        'and a half?"""',
        "/system Be brief.",
        "//three",
        "/reset",
        "four?",
        "/system",
    ]
    code, answers, err = chat(lines, "runs/chatty")
    assert code == 0 and "Be brief." in err
    assert answers[0] in asked[1] and "one?" in asked[1] and "two\nand a half?<|im_end|>" in asked[1]
    assert "system\nBe kind.<|im_end|>" in asked[0]
    assert "one?" not in asked[2] and "system\nBe brief.<|im_end|>" in asked[2] and "user\n/three" in asked[2]
    assert "three" not in asked[3] and "Be brief." in asked[3]


def test_answers_are_drawn_when_asked_for(workplace, chat):
    code, answers, _ = chat(["a?", "/temperature 9", *["a?"] * 4, "/temperature 0", "a?"])
    assert code == 0 and answers[0] == answers[-1] and len(set(answers)) > 2


@pytest.mark.parametrize(
    ("arguments", "lines", "reason"),
    [
        ((), ["/rest"], "there is no command /rest. Did you mean '/reset'?"),
        ((), ["/temp 1"], "there is no command /temp. Did you mean '/temperature'?"),
        (
            (),
            ["/use tuned2"],
            "there is no 'tuned2' here. Did you mean 'runs/tuned'? Known: runs/tuned, base",
        ),
        ((), ["/temperature hot"], "expected a number such as 0.7"),
        ((), ['"""a', "b"], "the input ends within"),
        ((), ["/system Be brief."], "the template plain has no place for a system prompt"),
        (("--system", "Be brief."), [], "the template plain has no place for a system prompt"),
        (("--top-p", "0.5"), [], "top-p goes with a temperature"),
        (("runs/tuned", "base"), [], "base is no run"),
        (("runs/tuned", "runs/foreign"), [], "runs/foreign was trained on other weights"),
        (("tuned",), [], "Did you mean 'runs/tuned'?"),
    ],
)
def test_wrong_input_is_one_message(workplace, chat, arguments, lines, reason):
    if "runs/foreign" in arguments:
        model = load_model(Path("base"), dtype="float32", device="cpu")
        torch.nn.init.ones_(model.get_output_embeddings().weight)
        os.rename("base", "first")
        model.save_pretrained("base")
        make_run("foreign")
        os.rename("base", "second")
        os.rename("first", "base")
    code, _, err = chat(lines, *arguments)
    assert code == 2 and reason in err and "Traceback" not in err


@pytest.mark.skipif(
    "LINCHAIN_TEST_TERMINAL" not in os.environ,
    reason="depends on when Ctrl-C arrives: LINCHAIN_TEST_TERMINAL=1",
)
def test_at_a_terminal_an_answer_is_stopped_and_mistakes_are_told(workplace):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "linchain_cli", "chat", "base", "--max-new-tokens", "1000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def wait_for(text, typed):
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen and time.monotonic() < end:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 65536).decode(errors="replace")
        assert text in seen
        seen = seen.partition(text)[2]
        if text == "> ":
            time.sleep(0.5)  # the prompt stands before readline listens; keys until then are echoed twice
        os.write(master, typed)

    try:
        wait_for("> ", b"/rset\n")
        wait_for("Did you mean '/reset'?", b"")
        wait_for("> ", b"Tell me a story\n")
        wait_for("Tell me a story\r\n", b"")
        wait_for(" ", b"\x03")
        wait_for("(stopped)", b"")
        wait_for("> ", b"\x03")
        wait_for("(Ctrl-D or /exit ends)", b"")
        wait_for("> ", b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(master)
