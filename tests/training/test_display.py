"""What a person sees while rows are encoded and steps are taken."""

from __future__ import annotations

import io

from rich.console import Console

from linchain_cli.training import display


def test_encoding_tells_how_far_it_is_and_a_cache_says_nothing(run_tiny, capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    run_tiny({"name": "first", "data.max_length": 257})
    assert "encoding rows: 46 so far\n" in capsys.readouterr().err
    run_tiny({"name": "second", "data.max_length": 257})
    assert "encoding rows" not in capsys.readouterr().err


def test_lines_come_at_most_every_few_seconds(capsys, monkeypatch):
    times = iter([0.0, 1.0, 29.9, 30.5, 30.5, 31.0, 61.0, 61.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(times))
    with display.counting_rows() as show:
        for rows in (10, 20, 1000, 1100, 20000):
            show(rows)
    assert capsys.readouterr().err == "encoding rows: 1,000 so far\nencoding rows: 20,000 so far\n"


def test_on_a_terminal_the_number_changes_in_place(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(
        display, "stderr_console", lambda quiet: Console(file=shown, force_terminal=True, width=60)
    )
    with display.counting_rows() as show:
        show(12345)
    assert "encoding rows: 12,345 so far" in shown.getvalue()
    with display.counting_rows():
        length = len(shown.getvalue())
    assert len(shown.getvalue()) == length, "nothing to count, nothing to see"


def lines_of_a_run(monkeypatch, capsys, **options) -> list[str]:
    """A run of 100 steps of a second each that logs every fiftieth and is validated after it."""
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with display.Display(100, **options) as shown:
        for step in range(1, 101):
            now[0] += 1.0
            shown.step(step, 2.0, 5000.0)
            if step % 50 == 0:
                shown.row({"step": step, "loss": 1.5, "tokens_per_second": 4000.0})
                shown.validation(step, {"loss": 1.25}, best=True)
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_logged_steps_are_lines_and_so_is_every_half_minute(monkeypatch, capsys):
    assert lines_of_a_run(monkeypatch, capsys) == [
        "step 30/100  loss 2.0000  5,000 tokens/s  1:10 left",
        "step 50/100  loss 1.5000  4,000 tokens/s  0:50 left",
        "step 50: validation loss 1.2500 (best so far)",
        "step 80/100  loss 2.0000  5,000 tokens/s  0:20 left",
        "step 100/100  loss 1.5000  4,000 tokens/s  0:00 left",
        "step 100: validation loss 1.2500 (best so far)",
    ]


def test_a_step_that_is_due_by_both_is_one_line(monkeypatch, capsys):
    now = iter([0.0, 30.0, 30.0, 31.0, 31.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(now))
    with display.Display(100) as shown:
        for step in (19, 20):
            shown.step(step, 2.0, 5000.0)
            shown.row({"step": step, "loss": 2.0, "tokens_per_second": 5000.0})
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 19/100",
        "step 20/100",
    ]


def test_one_of_many_runs_is_a_line_every_half_minute(monkeypatch, capsys):
    steps = [line.partition("/")[0] for line in lines_of_a_run(monkeypatch, capsys, brief=True)]
    assert steps == ["step 30", "step 60", "step 90"]


def test_every_process_but_the_first_is_silent(monkeypatch, capsys):
    assert lines_of_a_run(monkeypatch, capsys, quiet=True) == []
