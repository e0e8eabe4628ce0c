"""Threads follow the load of the CPUs only where that changes no bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from linchain_cli.machine import cpu_limit
from linchain_cli.training import loss
from linchain_cli.training.threads import LoadedCpus


class Cpus:
    """What others leave of two CPUs."""

    limit, leave = 2, 2

    def look(self) -> int:
        return self.leave


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The counts that were set; the computing itself stays on one thread."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    counts = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    return counts


@pytest.fixture
def build(job_of, set_to):
    def build(changes=None):
        job, cpus, notes = job_of(changes), Cpus(), []
        job.state.micro_batch_size = 2
        return LoadedCpus(job, cpus, notes.append), job, cpus, notes

    return build


ROWS = np.arange(6)


def test_a_thread_is_given_up_and_taken_back(build, set_to):
    loaded, job, cpus, notes = build()
    loaded.adjust(ROWS)
    assert set_to == [2]
    cpus.leave = 1
    loaded.adjust(ROWS)
    assert set_to[-1] == 1 and "1 of 2 threads" in notes[0]
    assert not job.optimizer.sums.any()
    cpus.leave = 2
    loaded.adjust(ROWS)
    assert set_to[-1] == 2
    cpus.leave = 1
    tried = len(set_to)
    loaded.adjust(ROWS)  # what was tried once is known, and told once
    assert set_to[tried:] == [1] and len(notes) == 1


def test_a_count_that_rounds_differently_is_never_used(build, set_to, monkeypatch):
    loaded, job, cpus, notes = build()
    add_gradients = loss.add_gradients

    def rounds_by_count(model, batch, scale, device):
        return add_gradients(model, batch, scale * (1 + 1e-6 * torch.get_num_threads()), device)

    monkeypatch.setattr(loss, "add_gradients", rounds_by_count)
    cpus.leave = 1
    loaded.adjust(ROWS)
    assert set_to[-1] == 2 and "differently" in notes[0]


def test_compiled_runs_keep_their_threads(build, set_to):
    loaded, _, cpus, _ = build({"training.compile": True})
    cpus.leave = 1
    loaded.adjust(ROWS)
    assert set_to == [2]


def test_a_run_leaves_torch_as_it_found_it(run_tiny, monkeypatch):
    monkeypatch.setattr(LoadedCpus, "adjust", lambda self, rows: torch.set_num_threads(1))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_tiny()
        assert torch.get_num_threads() == min(2, cpu_limit())
    finally:
        torch.set_num_threads(before)
