"""Signals to real processes."""

from __future__ import annotations

import json
import signal
import time

import pytest

from linchain_cli.run import RunDirectory


def wait_for_step(run: RunDirectory, step: int, process) -> None:
    """Until the run has logged the step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if run.rows_path.exists() and run.rows_path.read_text().count("\n") >= step:
            return
        assert process.handle.is_alive(), process.log
        time.sleep(0.01)
    pytest.fail(f"no step {step} within a minute: {process.log}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_exits(starter, recipe_file, recipe_of, number, code):
    changes = {"training.max_steps": 500, "training.save_every": 500, "training.eval_every": 500}
    run = RunDirectory(recipe_of(changes).run_path)
    process = starter.start("train", recipe_file(changes), hook="slow_steps", seconds=0.02)
    wait_for_step(run, 2, process)
    process.handle.is_alive() and __import__("os").kill(process.pid, number)
    assert process.wait() == code
    steps = [json.loads(line)["step"] for line in run.rows_path.read_text().splitlines()]
    assert run.read_status()["status"] == "stopped"
    assert run.read_status()["step"] == steps[-1] < 500
    assert [path.name for path in run.checkpoints_dir.iterdir()] == [f"step-{steps[-1]:06d}"]
    assert f"stopped at step {steps[-1]} of 500; continue with --resume" in process.log
    assert "Traceback" not in process.log
