"""Figures about an epoch, against batches that are really made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_cli.data.batches import micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.report import DataReport, SourceReport, epoch_plan, length_histogram


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 256), min_size=1, max_size=120),
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_the_plan_is_what_the_batches_do(lengths, batch, micro, world):
    lengths = np.array(lengths, np.int32)
    plan = epoch_plan(
        lengths, np.ones_like(lengths), seed=3, global_batch=batch, micro_batch=micro, world=world
    )
    sizes = []
    for step in range(steps_per_epoch(len(lengths), batch)):
        rows = step_rows(len(lengths), 3, batch, step)
        for rank in range(world):
            parts = micro_batches(rows, lengths, micro, rank, world)
            sizes += [len(part) * int(lengths[part].max()) for part in parts if len(part)]
    assert plan.steps == steps_per_epoch(len(lengths), batch)
    assert (plan.rows, plan.tokens, plan.supervised_tokens) == (len(lengths), lengths.sum(), len(lengths))
    assert plan.padding == pytest.approx(1 - lengths.sum() / sum(sizes))
    assert plan.longest_micro_batch == max(sizes)


def test_sorting_saves_padding():
    lengths = np.random.default_rng(0).integers(20, 200, 5000).astype(np.int32)
    plan = epoch_plan(lengths, lengths, seed=0, global_batch=16, micro_batch=4)
    assert plan.padding < 0.15 < plan.padding_unsorted


def test_the_histogram_covers_every_row_once():
    lengths = np.array([1, 2, 10, 11, 12, 256], np.int32)
    bins = length_histogram(lengths, 256, bins=12)
    assert bins[0][0] == 1 and bins[-1][1] == 256
    assert all(high + 1 == low for (_, high, _), (low, _, _) in zip(bins[:-1], bins[1:], strict=True))
    assert sum(count for _, _, count in bins) == 6
    for low, high, count in bins:
        assert count == ((lengths >= low) & (lengths <= high)).sum()
    assert sum(count for *_, count in length_histogram(np.array([1, 2, 3]), 3)) == 3


def test_a_report_survives_json():
    report = DataReport(
        "f" * 64,
        sources=[SourceReport("a", "a.json", total=10, kept=7, bad=2, unsupervised=1)],
        tokens=5,
        bad_examples=["x"],
    )
    assert DataReport.from_dict(report.to_dict()) == report
    assert report.skipped == report.counts()["sources"][0]["skipped"] == 3
