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
import typer

from linchain_cli import __version__, cli, console
from linchain_cli.commands import recipes
from linchain_cli.errors import InputError, LinchainError, Stopped

from .command_line import linchain

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
COMMANDS = [
    "train",
    "eval",
    "merge",
    "export",
    "import",
    "generate",
    "chat",
    "compare",
    "tune",
    "check",
    "inspect",
    "report",
    "runs",
    "reproduce",
    "push",
    "recipes",
]


def process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linchain_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, timeout=60)


def test_help_lists_every_command_with_its_whole_sentence(capsys):
    assert linchain("--help") == 0
    lines = capsys.readouterr().out.split("Commands:")[1].splitlines()
    listed = {line.split()[0]: line for line in lines if line.strip()}
    assert list(listed) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed.values())


OPTIONS = {
    "tune": ["--fresh", "--overwrite", "--json"],
    "train": ["--resume", "--fresh", "--overwrite", "--nproc", "--json"],
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
        "--json",
    ],
    "merge": [
        "--weights",
        "--base",
        "--out",
        "--dtype",
        "--max-shard-size",
        "--overwrite",
        "--no-proof",
        "--as-adapter",
        "--json",
    ],
    "export": ["--format", "--base", "--out", "--overwrite", "--json"],
    "import": ["--out", "--base", "--revision", "--drop-bias", "--overwrite", "--json"],
    "compare": ["--seeds", "--equal-parameters", "--fresh", "--overwrite", "--json"],
    "generate": ["--json"],
    "chat": ["--system", "--template", "--temperature", "--top-p", "--max-new-tokens", "--base", "--dtype"],
    "check": ["--json"],
    "inspect": ["--base", "--json"],
    "report": ["--json"],
    "runs": ["--json"],
    "reproduce": ["--base", "--overwrite", "--json"],
    "push": ["--merged", "--private", "--yes", "--base", "--json"],
    "recipes": ["list", "copy", "schema"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_there_and_has_a_help_text(command, capsys):
    assert linchain(command, "--help") == 0
    text = capsys.readouterr().out
    for option in OPTIONS[command]:
        assert option in text
    assert "negated" not in text and " / --no-" not in text


# What each prints is no report: a conversation, a sentence about a file, JSON as it is.
WITHOUT_JSON = {"chat", "recipes copy", "recipes convert", "recipes schema"}
# What each replaces only where --overwrite says so.
WITH_OVERWRITE = {"train", "compare", "tune", "merge", "export", "import", "reproduce", "recipes copy"}


def commands(group=None, name=()):
    """Every command's options, by its words."""
    group = group or typer.main.get_command(cli.app)
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, word))
        else:
            yield " ".join((*name, word)), {option for one in command.params for option in one.opts}


def test_every_command_that_reports_takes_json_and_one_word_means_replacing():
    found = dict(commands())
    assert {name for name, options in found.items() if "--json" not in options} == WITHOUT_JSON
    assert {name for name, options in found.items() if "--overwrite" in options} == WITH_OVERWRITE
    for options in found.values():
        assert not options & {"--force", "--replace", "--yes-overwrite", "-f"}


def test_h_is_help_everywhere(capsys):
    for words in ([], ["train"], ["recipes"], ["recipes", "copy"]):
        assert linchain(*words, "-h") == 0
        assert f"Usage: {' '.join(['linchain', *words])}" in capsys.readouterr().out


def test_a_shell_completes_commands_and_options():
    """What the script that `--install-completion` puts into a shell asks for."""
    environment = {**ENVIRONMENT, "_LINCHAIN_COMPLETE": "complete_bash"}
    for words, position, expected in (("linchain tr", 1, "train"), ("linchain train --re", 2, "--resume")):
        environment |= {"COMP_WORDS": words, "COMP_CWORD": str(position)}
        command = [sys.executable, "-m", "linchain_cli"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert done.stdout.split() == [expected], done.stderr


def test_version(capsys):
    assert linchain("--version") == 0
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
    assert linchain(*arguments) == 2
    output = capsys.readouterr()
    assert expected in output.err and output.out == ""
    assert "Traceback" not in output.err


@pytest.mark.parametrize("command", ["train", "compare", "check", "import", "generate", "reproduce", "push"])
def test_a_command_without_its_arguments_shows_its_help(command, capsys):
    assert linchain(command) == 2
    assert f"Usage: linchain {command}" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("recipe.yaml:3: no"), 2, "error: recipe.yaml:3: no\n"),
        (LinchainError("it failed"), 1, "error: it failed\n"),
        (Stopped("saved at step 3", signal.SIGTERM), 143, "error: saved at step 3\n"),
        (Stopped("saved at step 3", signal.SIGINT), 130, "error: saved at step 3\n"),
        (ValueError("two\nlines"), 1, "error: unexpected ValueError: two lines (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "stopped"),
        (MemoryError("for 3 TB"), 1, "error: the memory is not enough (for 3 TB)\n"),
        (RuntimeError("Symlink loop from 'a'"), 2, "error: 'a': a link that leads back to itself\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "error: the memory is not enough"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (
            OSError(28, "No space left on device", "a/b"),
            1,
            "error: a/b: No space left on device; make room there, or choose another place\n",
        ),
        (PermissionError(13, "Permission denied", "a/b"), 2, "error: a/b: Permission denied; choose a place"),
        (OSError(30, "Read-only file system", "a"), 2, "error: a: Read-only file system; choose a place"),
        (IsADirectoryError(21, "Is a directory", "a"), 2, "a file is expected there"),
        (OSError(36, "File name too long", "x" * 300), 2, "xxx...: File name too long\n"),
        (FileNotFoundError(2, "No such file or directory", "a\nb"), 2, "error: 'a\\nb': No such file"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(error, code, text, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(recipes, "recipe_purposes", fail)
    assert linchain("recipes", "list") == code
    output = capsys.readouterr()
    assert text in output.err and "Traceback" not in output.err
    if isinstance(error, Exception):
        assert linchain("recipes", "list", "--debug") == code
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
    assert cli._take(arguments, "--debug") == (rest, debug)


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_leaves_results_warnings_and_errors(option, capsys, monkeypatch):
    log = logging.getLogger("linchain_cli.model.files")

    def purposes():
        console.note("a note")
        log.info("a conversion")
        log.warning("an old download")
        console.warn("few rows")
        with console.Progress() as progress:
            progress._last = -1e9
            progress.show("rows", 3, 4000)
        return [("one", "A purpose")]

    monkeypatch.setattr(recipes, "recipe_purposes", purposes)
    assert linchain("recipes", "list") == 0
    loud = capsys.readouterr()
    assert loud.err.splitlines() == [
        *("a note", "a conversion", "an old download", "warning: few rows", "rows: 3 of 4,000")
    ]
    assert linchain("recipes", option, "list") == 0
    assert capsys.readouterr() == (loud.out, "an old download\nwarning: few rows\n")
    assert linchain("recipes", "list", option, "--json", "--no-such") == 2
    assert "--no-such" in capsys.readouterr().err


def test_json_is_all_that_stdout_holds(capsys, monkeypatch):
    purposes = recipes.recipe_purposes
    monkeypatch.setattr(recipes, "recipe_purposes", lambda: console.note("listing") or purposes())
    assert linchain("recipes", "list", "--json") == 0
    shown = capsys.readouterr()
    assert {entry["name"]: entry["purpose"] for entry in json.loads(shown.out)} == dict(purposes())
    assert shown.err == "listing\n"


def test_notes_of_the_package_reach_the_user(capsys, monkeypatch):
    def note(*arguments, **options):
        logging.getLogger("linchain_cli.model.gguf").info("Converting once")

    monkeypatch.setattr(cli, "app", note)
    for _ in range(2):
        assert linchain("check") == 0
        assert capsys.readouterr().err == "Converting once\n"


def test_under_a_launcher_one_process_does_what_is_for_one(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for words in (["recipes", "list"], ["merge", "no-such-run"]):
        assert linchain(*words) == 0 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert linchain("merge", "no-such-run") == 2


def test_a_current_directory_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert linchain("merge", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("error: the current directory was removed")


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
    process(*arguments)
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
    assert done.stdout == process("--version").stdout


@pytest.mark.parametrize(
    ("code", "exit_code"), [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_what_the_system_refuses_is_told_with_its_place(monkeypatch, capsys, code, exit_code):
    def refused():
        raise OSError(code, os.strerror(code), "/some/place")

    monkeypatch.setattr(recipes, "recipe_purposes", refused)
    assert linchain("recipes", "list") == exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"error: /some/place: {os.strerror(code)}") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.max_steps=3"], "given without dashes, as training.max_steps=3"),
        (["--learning_rate", "1e-4"], "given without dashes, as training.learning_rate=VALUE"),
        (["--lora_r=8"], "given without dashes, as adapter.rank=8"),
    ],
)
def test_an_override_written_as_an_option_is_told_how(words, said, capsys):
    assert linchain("check", "recipe.yaml", *words) == 2
    assert capsys.readouterr().err == f"error: {words[0]}: a recipe's value is {said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--config", "r.yaml"],
            "--config: the recipe is given without it: `linchain train RECIPE`",
        ),
        (["train", "r.yaml", "--packing"], "--packing: leave it out: rows of like length are read together"),
        (["check", "r.yaml", "--neftune_noise_alpha=5"], "not here: noise on embeddings (NEFTune)"),
        (["train", "r.yaml", "--deepspeed", "x"], "given without dashes, as training.parallel=VALUE"),
        (["sft", "r.yaml"], "sft: here it is `linchain train`"),
        (["merge-lora"], "merge-lora: here it is `linchain merge`"),
    ],
)
def test_what_other_tools_take_is_told_how_it_is_done_here(words, said, capsys):
    assert linchain(*words) == 2
    assert said in capsys.readouterr().err


def test_no_option_or_command_of_ours_is_called_as_other_tools_call_theirs():
    for name, options in commands():
        assert name.split()[0] not in cli._CALLED_ELSEWHERE
        if name in ("train", "check", "compare", "tune"):
            cli._refuse_what_other_tools_take([name, *options])
