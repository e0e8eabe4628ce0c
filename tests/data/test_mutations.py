"""Files broken at random: each loads, with every row accounted for, or is refused with one message.

300 files in the suite; `LINCHAIN_TEST_MUTATIONS=5000` makes it that many.
"""

from __future__ import annotations

import io
import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linchain_cli.data import readers
from linchain_cli.data.formats import load_rows
from linchain_cli.data.pipeline import EncodingSettings, rendered_rows
from linchain_cli.data.report import DataReport, SourceReport
from linchain_cli.data.sources import resolve_source
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.recipe import SourceConfig

FILES = int(os.environ.get("LINCHAIN_TEST_MUTATIONS", "300"))
HOSTILE = [
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n", b'"', b"\\", b"{", b"}", b"[", b"]",
    b",", b":", b"null", b"NaN", b"-1e999", b"9" * 5000, b"\\ud800", b"\\u00", b"[" * 2000, b"x" * 3000,
    b"true", b"''", "\u2028".encode(),
]  # fmt: skip


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def _csv(rows: list[dict]) -> bytes:
    import csv

    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return sink.getvalue().encode()


def _files(rows: list[dict]) -> dict[str, bytes]:
    return {
        "compact.json": json.dumps(rows).encode(),
        "indented.json": json.dumps(rows, indent=2, ensure_ascii=False).encode(),
        "objects.json": "\n".join(json.dumps(row) for row in rows).encode(),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "rows.csv": _csv(rows),
        "rows.parquet": _parquet(rows),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four cuts, flips, insertions, repetitions or hostile snippets."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice([0, 1, 1, 8, 100]))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:start]
        elif kind == 1 and start < len(data):
            data = data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        elif kind == 2:
            data = data[:start] + rng.choice(HOSTILE) + data[end:]
        elif kind == 3:
            data = data[:start] + data[start:end] * 3 + data[end:]
        else:
            data = data[:start] + data[end:]
    return data


class Files(dict):
    """Contents by name; shown by name alone when a test fails."""

    def __repr__(self) -> str:
        return ", ".join(self)


@pytest.fixture(scope="module")
def originals(commonsense_rows) -> Files:
    rows = commonsense_rows(12)
    rows[3]["instruction"] += ' "quoted", é 東京\nnew line'
    return Files(_files(rows))


@settings(
    max_examples=FILES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 2**32 - 1), skip_bad=st.booleans(), block=st.sampled_from([64, 1 << 20]))
def test_a_broken_file_loads_or_is_refused(originals, tmp_path_factory, seed, skip_bad, block):
    rng = random.Random(seed)
    name = rng.choice(list(originals))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(mutate(originals[name], rng))
    template = get_template("alpaca", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK", block)
        counts, report = SourceReport(name), DataReport()
        settings = EncodingSettings(256, False, skip_bad)
        good = 0
        try:
            for row in rendered_rows(
                resolve_source(SourceConfig(path=str(path))), template, settings, counts, report
            ):
                assert row.place.startswith(str(path)) and row.texts[0].text.startswith("Below")
                good += 1
        except InputError as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            return
    assert good > 0
    assert good + counts.bad == counts.total
    assert skip_bad or not counts.bad


def test_unbroken_files_load_whole(originals, tmp_path):
    for name, data in originals.items():
        (tmp_path / name).write_bytes(data)
        rows = load_rows(SourceConfig(path=str(tmp_path / name)), get_template("alpaca", None))
        assert len(list(rows)) == 12
