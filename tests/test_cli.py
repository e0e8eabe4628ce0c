"""The command line as a process: what it prints, its exit codes, and how long it takes to say so."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from linchain_cli import __version__, cli
from linchain_cli.commands import recipes
from linchain_cli.errors import InputError, LinchainError, Stopped

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
COMMANDS = [
    "train",
    "eval",
    "merge",
    "export",
    "import",
    "generate",
    "compare",
    "check",
    "inspect",
    "report",
    "recipes",
]


def linchain(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linchain_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=60)


def run(*arguments: str) -> int:
    """The exit code of `main` within this process."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    return end.value.code


def test_help_lists_every_command_with_its_whole_sentence(capsys):
    assert run("--help") == 0
    lines = capsys.readouterr().out.split("Commands:")[1].splitlines()
    listed = {line.split()[0]: line for line in lines if line.strip()}
    assert list(listed) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed.values())


OPTIONS = {
    "train": ["--resume", "--fresh", "--nproc"],
    "eval": [
        "--tasks",
        "--protocol",
        "--beams",
        "--template",
        "--dtype",
        "--limit",
        "--data-dir",
        "--against",
        "--out",
    ],
    "merge": ["--base", "--out", "--dtype", "--max-shard-size", "--overwrite", "--no-proof"],
    "export": ["--format", "--base", "--out", "--overwrite"],
    "import": ["--out", "--base", "--drop-bias"],
    "compare": ["--seeds", "--equal-parameters", "--fresh"],
    "generate": [],
    "check": [],
    "inspect": ["--base"],
    "report": [],
    "recipes": ["list", "copy", "schema"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_there_and_has_a_help_text(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    for option in OPTIONS[command]:
        assert option in text
    assert "negated" not in text and " / --no-" not in text


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"linchain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "x.yaml"], "Did you mean 'train'?"),
        (["recipes", "lst"], "Did you mean 'list'?"),
        (["train", "x.yaml", "--rseume"], "--resume"),
        (["train", "x.yaml", "--nproc", "0"], "--nproc"),
        (["eval", "--limt", "3"], "--limit"),
        (["eval", "--protocol", "likelyhood"], "likelihood"),
        (["eval", "a", "b"], "(b)"),
        (["import", "somewhere"], "--out"),
        (["recipes", "copy", "figur2"], "Did you mean 'figure2'?"),
        (["train", "x.yaml", "--resume", "--fresh"], "give one of them"),
        (["generate", "model", "two", "words"], "quotes"),
    ],
)
def test_wrong_words_exit_2_and_name_the_nearest(arguments, expected, capsys):
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert expected in output.err and output.out == ""
    assert "Traceback" not in output.err


@pytest.mark.parametrize("command", ["train", "compare", "check", "import", "generate"])
def test_a_command_without_its_arguments_shows_its_help(command, capsys):
    assert run(command) == 2
    assert f"Usage: linchain {command}" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("recipe.yaml:3: no"), 2, "error: recipe.yaml:3: no\n"),
        (LinchainError("it failed"), 1, "error: it failed\n"),
        (Stopped("saved at step 3", signal.SIGTERM), 143, "error: saved at step 3\n"),
        (Stopped("saved at step 3", signal.SIGINT), 130, "error: saved at step 3\n"),
        (ValueError("two\nlines"), 1, "error: unexpected ValueError: two lines (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "error: unexpected MemoryError"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error, code, text, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(recipes, "recipe_purposes", fail)
    assert run("recipes", "list") == code
    output = capsys.readouterr()
    assert text in output.err and "Traceback" not in output.err
    if isinstance(error, Exception):
        assert run("recipes", "list", "--debug") == code
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "rest", "debug"),
    [
        (["train", "--debug", "r.yaml"], ["train", "r.yaml"], True),
        (["--debug", "train"], ["train"], True),
        (["generate", "--", "--debug"], ["generate", "--", "--debug"], False),
        (["train"], ["train"], False),
    ],
)
def test_debug_may_stand_anywhere_before_two_dashes(arguments, rest, debug):
    assert cli._take_debug(arguments) == (rest, debug)


def test_notes_of_the_package_reach_the_user(capsys, monkeypatch):
    def note(*arguments, **options):
        logging.getLogger("linchain_cli.model.gguf").info("Converting once")

    monkeypatch.setattr(cli, "app", note)
    for _ in range(2):
        assert run("check") == 0
        assert capsys.readouterr().err == "Converting once\n"


def test_a_reader_that_goes_away_gets_no_traceback():
    command = f"{sys.executable} -m linchain_cli recipes schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{" and done.stderr == ""


def test_ctrl_c_exits_130_without_a_traceback():
    code = (
        "import os, signal, linchain_cli.commands.recipes as r\n"
        "from linchain_cli import cli\n"
        # A background job inherits it as ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "r.recipe_purposes = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['recipes', 'list'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr


LIGHT = [
    ["--help"],
    ["--version"],
    ["recipes", "list"],
    ["recipes", "schema"],
    ["recipes", "copy", "figure2"],
    ["train", "broken.yaml"],
    ["train", "no-such.yaml"],
    ["check", "broken.yaml"],
    ["trian"],
]
FORBIDDEN = ["torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib"]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_torch_is_not_imported_for(arguments, tmp_path):
    (tmp_path / "broken.yaml").write_text("name: x\nmodle: y\n")
    code = (
        "import sys, json\n"
        "from linchain_cli import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        f"finally:\n    found = [name for name in {FORBIDDEN} if name in sys.modules]\n"
        "    json.dump(found, open('found.json', 'w'))"
    )
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60,
    )
    assert json.loads((tmp_path / "found.json").read_text()) == []


def cpu_seconds(*arguments: str) -> float:
    """CPU time of a whole process: on an idle machine its wall time, and independent of what else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    linchain(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "limit"), [(["--help"], 0.3), (["recipes", "list"], 0.5)], ids=["help", "list"]
)
def test_start_up_is_quick(arguments, limit):
    assert min(cpu_seconds(*arguments) for _ in range(5)) < limit


def test_the_console_script_and_the_module_are_the_same():
    script = Path(sys.executable).with_name("linchain")
    if not script.exists():
        pytest.skip("linchain is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == linchain("--version").stdout


@pytest.mark.parametrize(
    ("code", "exit_code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_what_the_system_refuses_is_told_with_its_place(monkeypatch, capsys, code, exit_code):
    def refused():
        raise OSError(code, os.strerror(code), "/some/place")

    monkeypatch.setattr(recipes, "recipe_purposes", refused)
    assert run("recipes", "list") == exit_code
    assert capsys.readouterr().err == f"error: /some/place: {os.strerror(code)}\n"
