"""A host that asks for a step before it knows how the last one ended, as it does on a GPU. A CPU stands in
for the device; that it is not waited for is in test_on_a_gpu.py."""

from __future__ import annotations

import math
import signal

import pytest

from linchain_cli.errors import LinchainError, Stopped
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training import history, loop, loss, runner
from linchain_cli.training.state import snapshot

FILES = ("adapter/chain.safetensors", "checkpoints/step-000006/optimizer.safetensors", "rows.jsonl")
SELDOM = {"training.save_every": 3, "training.eval_every": 6, "adapter.dropout": 0.1}
TIMES = ("tokens_per_second", "step_seconds", "peak_memory_bytes")


@pytest.fixture(autouse=True)
def _ahead(monkeypatch):
    monkeypatch.setattr(history, "AHEAD_ON", ("cpu",))


def contents(job) -> list[bytes]:
    return [(job.run.path / name).read_bytes() for name in FILES]


def values(job) -> list[dict]:
    """metrics.jsonl without what no two runs have in common."""
    rows = read_jsonl(job.run.metrics_path)
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_a_run_writes_what_it_writes_without_being_ahead(run_tiny, monkeypatch):
    ahead = run_tiny({**SELDOM, "name": "ahead", "training.log_every": 2})
    monkeypatch.setattr(history, "AHEAD_ON", ())
    behind = run_tiny({**SELDOM, "name": "behind", "training.log_every": 2})
    assert contents(ahead) == contents(behind)
    assert values(ahead) == values(behind)
    assert [row["step"] for row in values(ahead)] == [2, 4, 6, 6]


def test_nothing_is_updated_by_a_step_that_is_not_finite_or_by_the_one_behind_it(
    run_tiny, recipe_of, monkeypatch
):
    """Which had been asked for before that was known."""
    original, step, seen, after = loss.add_gradients, loop.optimizer_step, {}, []

    def spoilt(model, batch, scale, device):
        result = original(model, batch, scale, device)
        return result * math.nan if seen["job"].state.step == 3 else result

    def watched(job, *rest):
        seen["job"] = job
        taken = step(job, *rest)
        after.append(snapshot(job.parameters))
        return taken

    monkeypatch.setattr(runner, "run_heaviest", lambda job: None)
    monkeypatch.setattr(loss, "add_gradients", spoilt)
    monkeypatch.setattr(loop, "optimizer_step", watched)
    with pytest.raises(LinchainError, match=r"step 4: the loss is nan .* nothing was updated"):
        run_tiny(SELDOM)
    assert len(after) == 5, "the fifth step was asked for"
    for name, value in after[2].items():
        assert value.equal(after[3][name]) and value.equal(after[4][name]) and not value.equal(after[1][name])
    assert [row["step"] for row in read_jsonl(RunDirectory(recipe_of().run_path).rows_path)] == [1, 2, 3]


def test_a_signal_ends_the_run_a_step_later_and_a_resume_is_bitwise(run_tiny, monkeypatch):
    whole = run_tiny({**SELDOM, "name": "whole"})
    step = loop.optimizer_step

    def asked_to_stop(job, rows, rate, stop):
        if job.state.step == 3:
            stop.signum = signal.SIGTERM
        return step(job, rows, rate, stop)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimizer_step", asked_to_stop)
        with pytest.raises(Stopped, match="stopped at step 5 of 6") as caught:
            run_tiny(SELDOM)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    job = run_tiny(SELDOM, resume=True)
    assert contents(job) == contents(whole)
    assert values(job) == values(whole)
