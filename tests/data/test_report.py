"""Figures about an epoch, against batches that are really made."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linchain_cli.data.batches import micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.report import (
    REPORT_VERSION,
    DataReport,
    SourceReport,
    epoch_plan,
    length_histogram,
)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 256), min_size=1, max_size=120),
    st.integers(1, 20),
    st.integers(1, 9),
)
def test_the_plan_is_what_the_batches_do(lengths, batch, micro):
    lengths = np.array(lengths, np.int32)
    plan = epoch_plan(lengths, np.ones_like(lengths), seed=3, global_batch=batch, micro_batch=micro)
    sizes = []
    for step in range(steps_per_epoch(len(lengths), batch)):
        rows = step_rows(len(lengths), 3, batch, step)
        parts = micro_batches(rows, lengths, micro)
        sizes += [len(part) * int(lengths[part].max()) for part in parts]
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
    bins = length_histogram(lengths, 256)
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


def test_examples_move_with_their_own_source():
    """Also where one has the other's place now, or a name that begins as the other's."""
    places = ["/a/rows.json", "/a/rows.jsonl", "/b/rows.jsonl"]
    sources = [SourceReport(place, place) for place in places]
    report = DataReport("f" * 64, sources=sources, bad_examples=[f"{place}:3: bad" for place in places])
    report.move([(place, place) for place in ("/c/new.json", "/b/rows.jsonl", "/a/rows.jsonl")])
    assert report.bad_examples == ["/c/new.json:3: bad", "/b/rows.jsonl:3: bad", "/a/rows.jsonl:3: bad"]
    assert [source.location for source in report.sources] == ["/c/new.json", "/b/rows.jsonl", "/a/rows.jsonl"]


def test_a_report_that_tells_otherwise_is_another_version(write, byte_level, data_config, tmp_path):
    """A cache keeps reports by their version: where this fails, raise REPORT_VERSION, and write here what the
    new one tells."""
    rows = [
        {"instruction": "a", "output": "b", "note": "c", "system": "d"},
        {"instruction": "</s> a", "output": "b", "note": "c", "system": "d"},
        {"instruction": "a", "output": None},
        {"instruction": "a" * 300, "output": "b"},
        {"instruction": "a", "output": "b" * 300},
    ]
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 9}] * 20}]
    write("rows.json", json.dumps(rows))
    write("chats.json", json.dumps(chats))
    sources = [
        {"path": str(tmp_path / "rows.json"), "template": "alpaca"},
        {"path": str(tmp_path / "chats.json"), "template": "chat"},
    ]
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    config = data_config(sources, max_length=200, on_bad_row="skip", max_unsupervised_share=1.0)
    prepare_data(config, tokenizer, cache_dir=tmp_path / "cache")
    (path,) = (tmp_path / "cache").glob("*/report.json")
    told = json.loads(path.read_text().replace(f"{tmp_path}/", ""))
    del told["fingerprint"]
    of_rows = {"name": "rows.json", "location": "rows.json", "template": "alpaca", "total": 5, "kept": 3}
    of_chats = {"name": "chats.json", "location": "chats.json", "template": "chat", "total": 1, "kept": 1}
    of_rows |= {"bad": 1, "unsupervised": 1, "long": 0, "rows": 3}
    of_chats |= {"bad": 0, "unsupervised": 0, "long": 0, "rows": 1}
    version_2 = {
        "template": "",
        "cached": False,
        "sources": [
            of_rows | {"unread": ["note", "system"], "unshown": ["system"]},
            of_chats | {"unread": [], "unshown": []},
        ],
        "tokens": 469,
        "supervised_tokens": 325,
        "longest": 440,
        "truncated": 2,
        "straddling_rows": 0,
        "straddling_tokens": 0,
        "answers_cut_away": 0,
        "control_rows": 1,
        "remarks": {},
        "bad_examples": ["rows.json:1 (row 3): 'output' is null, where a value is expected"],
        "unsupervised_examples": ["rows.json:1 (row 4): 333 tokens"],
        "control_examples": ["rows.json:1 (row 2): </s>"],
        "notes": [],
        "warnings": [],
    }
    assert (REPORT_VERSION, told) == (2, version_2)
