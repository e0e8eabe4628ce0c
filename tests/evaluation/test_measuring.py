"""Several processes that measure together: what the first one finds decides for all."""

from __future__ import annotations

from functools import partial

import pytest

from linchain_cli.errors import InputError
from linchain_cli.evaluation.measuring import Measuring
from linchain_cli.result_files import Evaluation

from .conftest import forked


@pytest.mark.parametrize("unwritable", [0, 1])
def test_a_place_that_one_process_cannot_use_leaves_none_waiting(tmp_path, unwritable):
    (tmp_path / "taken").write_text("no directory")

    def run_one(rank):
        out = tmp_path / ("taken" if rank == unwritable else "free")
        make = partial(Measuring, Evaluation(tasks={}), {"task": "fingerprint"}, out)
        if unwritable == 0:
            with pytest.raises(InputError if rank == 0 else SystemExit):
                make()
        else:  # the first process writes
            assert (make().directory is None) == (rank == 1)

    assert forked(tmp_path / "store", run_one) == [0, 0]
