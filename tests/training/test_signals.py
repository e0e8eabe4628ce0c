"""Signals to real processes: one finishes the step and saves, a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from linchain_cli.errors import Stopped
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training import runner
from linchain_cli.training.signals import stop_requests

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
LONG = {"training.max_steps": 500, "training.save_every": 500, "training.eval_every": 500}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_finishes_the_step_saves_and_exits(starter, recipe_file, recipe_of, number, code):
    recipe = recipe_file(LONG)
    run = RunDirectory(recipe_of().run_path)
    process = starter.start("train", recipe, hook="slow_steps", seconds=0.02)
    process.wait_for_step(run, 2)
    os.kill(process.pid, number)
    assert process.wait() == code
    step = read_jsonl(run.rows_path)[-1]["step"]
    status = run.read_status()
    assert status.status == "stopped" and status.step == step < 500
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"step-{step:06d}"]
    assert f"error: stopped at step {step} of 500; continue with --resume" in process.log
    assert "Traceback" not in process.log

    again = starter.start("train", recipe, f"training.max_steps={step + 1}", "--resume")
    assert again.wait() == 0 and f"after step {step} of {step + 1}" in again.log
    assert [row["step"] for row in read_jsonl(run.rows_path)] == list(range(1, step + 2))


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_second_signal_exits_at_once(starter, recipe_file, recipe_of, number, code):
    run = RunDirectory(recipe_of().run_path)
    process = starter.start("train", recipe_file(LONG), hook="slow_steps", seconds=60)
    process.wait_until(run.exists, "run directory")
    time.sleep(0.3)  # into the step
    os.kill(process.pid, number)
    process.handle.join(0.5)
    assert process.handle.is_alive(), "the first signal lets the step go on"
    began = time.monotonic()
    os.kill(process.pid, number)
    assert process.wait() == code
    assert time.monotonic() - began < 20
    assert not run.checkpoints_dir.exists()
    again = starter.start("train", recipe_file({"training.max_steps": 1}), "--resume")
    assert again.wait() == 0, "the lock is gone with the process"


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_before_the_first_step_there_is_nothing_to_wait_for(
    starter, recipe_file, recipe_of, tmp_path, number, code
):
    marker = tmp_path / "loading"
    process = starter.start("train", recipe_file(), hook="slow_loading", seconds=60, marker=str(marker))
    process.wait_until(marker.exists, "loading")
    os.kill(process.pid, number)
    assert process.wait(30) == code
    assert "error: stopped before the first step: nothing was written" in process.log
    assert not recipe_of().run_path.exists()


def test_a_terminal_that_is_closed_costs_no_step(starter, recipe_file, recipe_of):
    """The kernel and the shell send SIGHUP each, the end of the session SIGTERM: no second wish to stop."""
    run = RunDirectory(recipe_of().run_path)
    process = starter.start("train", recipe_file(LONG), hook="slow_steps", seconds=0.2)
    process.wait_for_step(run, 1)
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.01)
    assert process.wait() in (129, 143)
    status = run.read_status()
    assert status.status == "stopped" and status.step >= 1
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"step-{status.step:06d}"]


def test_nohup_is_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests("never said"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_result_is_written_ends_after_it(run_tiny, recipe_of, monkeypatch):
    """The run is finished then, and what would follow it is not begun."""
    original = runner._write_result

    def interrupted(job):
        os.kill(os.getpid(), signal.SIGINT)
        original(job)

    monkeypatch.setattr(runner, "_write_result", interrupted)
    with pytest.raises(Stopped, match="is finished; nothing was done after that") as caught:
        run_tiny({"training.max_steps": 1})
    assert caught.value.exit_code == 130
    run = RunDirectory(recipe_of().run_path)
    assert run.read_status().finished and (run.adapter_dir / "chain.safetensors").is_file()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number, _ in SIGNALS]
    with stop_requests("never said") as request:
        assert [signal.getsignal(number) for number, _ in SIGNALS] != before
        request.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before
    with pytest.raises(Stopped, match="^left as it is$") as caught, stop_requests("left as it is"):
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130
    assert [signal.getsignal(number) for number, _ in SIGNALS] == before
