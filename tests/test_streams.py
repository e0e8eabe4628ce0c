"""Streams that take ASCII alone, are full, closed or no longer read: what a process makes of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}


@pytest.mark.parametrize("words", [["recipes", "list"], ["recipes", "schema"], ["train", "rezept-ä.yaml"]])
def test_a_terminal_that_takes_ascii_alone_gets_the_rest_as_question_marks(words, tmp_path):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "linchain_cli", *words]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=60)
    assert done.returncode == (2 if words[0] == "train" else 0), done.stderr
    assert (done.stdout + done.stderr).isascii() and b"unexpected" not in done.stderr
    if words[1] == "schema":
        assert json.loads(done.stdout)["title"] == "Recipe"


def test_a_reader_that_goes_away_gets_no_traceback():
    command = f"{sys.executable} -m linchain_cli recipes schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{" and done.stderr == ""


def test_closed_streams_take_nothing_and_give_their_place_to_no_file():
    """Without stdout and stderr, the next file that is opened would be what a library's message goes to."""
    code = (
        "import os, sys\n"
        "from linchain_cli import cli\n"
        "cli._run = lambda words, debug: open(sys.argv[1], 'w').fileno()\n"
        "cli.main([])"
    )
    command = f"{sys.executable} -c {shlex.quote(code)} {os.devnull} <&- >&- 2>&-"
    assert subprocess.run(command, shell=True, env=ENVIRONMENT, timeout=60).returncode > 2
    command = f"{sys.executable} -m linchain_cli recipes list >&-"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_wanted_unbuffered_is_so():
    code = "import os; from linchain_cli import streams; streams.make_ready(); print(1, end=''); os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], capture_output=True, env=ENVIRONMENT, timeout=60
    )
    assert done.stdout == b"1"


def test_a_full_stdout_is_told():
    command = f"{sys.executable} -m linchain_cli recipes schema > /dev/full"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: stdout: No space left on device; make room"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("end", ["gone", "/dev/full"])
def test_work_goes_on_where_stderr_takes_nothing(end):
    """`linchain train ... 2>&1 | head`, a log on a full disk, a terminal that was closed."""
    code = (
        "import sys\n"
        "from linchain_cli import console, streams\n"
        "streams.make_ready()\n"
        "shown = console.Progress()\n"
        "for number in range(9000):\n"
        "    console.note('note')\n"
        "console.stderr_console().print('drawn')\n"
        "print('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe, open("/dev/full", "wb") as full:
        stderr = pipe if end == "gone" else full
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, env=ENVIRONMENT, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"done\n")
