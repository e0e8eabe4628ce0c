"""Notes and progress: where they go, and what is seen of them without a terminal."""

from __future__ import annotations

import io
import json
import sys

import pytest

from linchain_cli import console
from linchain_cli.console import Progress, note, print_json, set_quiet, warn


@pytest.fixture(autouse=True)
def _loud():
    yield
    set_quiet(False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_notes_go_to_stderr_and_quiet_ends_them(capsys):
    note("one")
    set_quiet(True)
    note("two")
    warn("three")
    assert capsys.readouterr() == ("", "one\nwarning: three\n")


def test_without_a_terminal_progress_is_a_line_every_half_minute(capsys, clock):
    with Progress() as progress:
        for done in range(100):
            progress.show("runs/a", done, 3270, "boolq" if done < 50 else "piqa")
            clock[0] += 1.0
    lines = ["runs/a (boolq): 30 of 3,270", "runs/a (piqa): 60 of 3,270", "runs/a (piqa): 90 of 3,270"]
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))


def test_bytes_are_shown_as_megabytes(capsys, clock):
    with Progress("bytes") as progress:
        clock[0] += 31
        progress.show("[writing]", 5_000_000, 1_234_000_000)
    assert capsys.readouterr().err == "[writing]: 5 MB of 1,234 MB\n"


def test_models_are_counted_where_tensors_are_bytes(capsys, clock, monkeypatch):
    with Progress("bytes", counted=["trying"]) as progress:
        clock[0] += 31
        progress.show("trying", 2, 4)
    assert capsys.readouterr().err == "trying: 2 of 4\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("bytes", counted=["trying"]) as progress:
        progress.show("writing", 5_000_000, 1_234_000_000)
        progress.show("trying", 2, 4)
        progress._progress.refresh()
    assert "0.0/1.2 GB" in sys.stderr.getvalue() and "2/4" in sys.stderr.getvalue()


@pytest.mark.parametrize("quiet_by", ["option", "argument"])
def test_quiet_progress_shows_nothing(capsys, clock, quiet_by):
    set_quiet(quiet_by == "option")
    with Progress(quiet=quiet_by == "argument") as progress:
        clock[0] += 100
        progress.show("boolq", 1, 2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress() as progress:
        progress.show("boolq", 1, 4)
        progress.show("boolq", 2, 4)
        progress._progress.refresh()
    assert "boolq" in shown.getvalue() and "2/4" in shown.getvalue() and "\x1b[3" in shown.getvalue()


def test_no_color_takes_the_colours_away(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress() as progress:
        progress.show("boolq", 1, 4)
        progress._progress.refresh()
    assert "1/4" in shown.getvalue() and "\x1b[3" not in shown.getvalue()


@pytest.mark.parametrize(("encoding", "text"), [("utf-8", "ΔW"), ("ascii", "\\u0394W")])
def test_json_is_in_ascii_where_stdout_takes_nothing_else(monkeypatch, encoding, text):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print_json({"of": "ΔW"})
    sys.stdout.flush()
    assert text in raw.getvalue().decode(encoding) and json.loads(raw.getvalue()) == {"of": "ΔW"}
