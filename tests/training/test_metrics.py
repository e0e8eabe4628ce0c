"""Peak memory of one run among several in a process."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from linchain_cli.training.metrics import peak_memory_bytes, reset_peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can set the mark back")
def test_a_peak_can_be_set_back():
    block = np.ones(300_000_000, dtype=np.uint8)
    high = peak_memory_bytes(CPU)
    assert high > block.nbytes
    del block
    assert reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < high - 200_000_000


def test_where_the_mark_cannot_be_set_back_it_is_said(monkeypatch):
    from linchain_cli.training import metrics

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(metrics.Path, "write_text", refused)
    assert not reset_peak_memory(CPU)
