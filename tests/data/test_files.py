"""Which files a source's path names, and the ways they can be packed."""

from __future__ import annotations

import bz2
import errno
import functools
import gzip
import http.server
import json
import lzma
import os
import threading
from pathlib import Path

import pytest

from linchain_cli.data.reading import RawRows
from linchain_cli.data.sources import resolve_source
from linchain_cli.errors import InputError, LinchainError
from linchain_cli.recipe import SourceConfig

ROWS = [{"a": str(number), "b": f"row {number}"} for number in range(10)]


def lines(rows=ROWS) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    import pyarrow

    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.fixture
def read(source):
    """`read(path, **fields)`: a source's rows."""
    return lambda path, **fields: list(RawRows(resolve_source(source(path, **fields)), {"a", "b"}))


def arrow(path: Path, rows=ROWS, stream: bool = True) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    opened = pa.ipc.new_stream if stream else pa.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return path


def parquet(path: Path, rows=ROWS) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", lines()),
        ("rows.ndjson", lines()),
        ("rows.json", json.dumps(ROWS, indent=1).encode()),
        ("list.jsonl", json.dumps(ROWS).encode()),
        ("rows.csv", b"a,b\r\n" + b"".join(f"{r['a']},{r['b']}\r\n".encode() for r in ROWS)),
        ("bom.tsv", b"\xef\xbb\xbfa\tb\n" + b"".join(f"{r['a']}\t{r['b']}\n".encode() for r in ROWS)),
    ],
)
def test_compressed_files_are_read_as_what_is_in_them(write, read, packing, name, content):
    assert read(write(name + packing, PACKERS[packing](content))) == ROWS
    # Several streams one behind the other are one file: what parallel compressors write.
    pieces = PACKERS[packing](content[:30]) + PACKERS[packing](content[30:])
    assert read(write(f"two-{name}{packing}", pieces)) == ROWS


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_compressed_file_that_is_damaged_is_named(write, read, packing, name):
    content = json.dumps(ROWS * 500).encode() if name.endswith(".json") else lines(ROWS * 500)
    packed = PACKERS[packing](content)
    for damaged in (packed[: len(packed) // 2], b"no archive", packed[:20] + b"\xff" * 20 + packed[40:]):
        with pytest.raises(InputError, match=rf"{name}{packing}") as caught:
            read(write(name + packing, damaged))
        assert "\n" not in str(caught.value)
    assert "decompressed" in str(caught.value) or "not" in str(caught.value)


def test_a_row_of_a_compressed_file_has_its_line(write, source):
    rows = RawRows(resolve_source(source(write("x.jsonl.gz", gzip.compress(lines())))), set())
    places = [rows.place() for _ in rows]
    assert places[2].endswith("x.jsonl.gz:3 (row 3)")


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(tmp_path, read, stream):
    assert read(arrow(tmp_path / "x.arrow", stream=stream)) == ROWS
    assert read(tmp_path / "x.arrow", split="train[3:5]") == ROWS[3:5]
    assert read(tmp_path / "x.arrow", split="train[80%:]") == ROWS[8:]
    (tmp_path / "y.arrow").write_bytes(b"no arrow")
    with pytest.raises(InputError, match="y.arrow: not an .arrow file"):
        read(tmp_path / "y.arrow")


@pytest.mark.parametrize(
    "line, cells",
    [
        (b'She said "no".\tb', ['She said "no".', "b"]),
        (b'"Hello," she said.\tb', ['"Hello," she said.', "b"]),
        (b'"\tb', ['"', "b"]),
        (b'"say ""yes"""\tb', ['say "yes"', "b"]),
        (b'""\tb', ['""', "b"]),
        (b" a \t ", [" a ", " "]),
        (b"a,b\tc\r", ["a,b", "c"]),
    ],
)
def test_tabs_part_cells_and_quotes_are_text(write, read, line, cells):
    assert read(write("x.tsv", b"a\tb\n\n" + line + b"\n")) == [dict(zip("ab", cells, strict=True))]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"a\tb\n1\n", r"the row has 1 cells where the header names 2"),
        (b"a\ta\n1\t2\n", r"x.tsv:1: the header names the column 'a' twice"),
        (b"a\tb\n", "there is no row .behind the header line"),
        (b"", "is empty"),
        (b"a\tb\n\xff\t2\n", r"byte 4 \(0xff\) is not UTF-8"),
    ],
)
def test_a_tsv_file_that_is_none(write, read, content, said):
    path = write("x.tsv", content)
    try:
        (row,) = read(path)
        assert isinstance(row, ValueError)
    except InputError as error:
        row = error
    import re

    assert re.search(said, str(row))


def test_patterns_take_files_of_all_kinds_in_order(tmp_path, write, read, source):
    write("b.jsonl.gz", gzip.compress(lines(ROWS[3:6])))
    write("a.jsonl", lines(ROWS[:3]))
    parquet(tmp_path / "c.parquet", ROWS[6:])
    write("README.md", "words")
    assert read(tmp_path / "*.jsonl*") == ROWS[:6]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.json").write_text(json.dumps(ROWS[:1]))
    assert read(f"{tmp_path}/**/*") == ROWS + ROWS[:1]
    found = resolve_source(source(tmp_path / "[ab]*"))
    assert [Path(file.name).name for file in found.files.splits["train"]] == ["a.jsonl", "b.jsonl.gz"]
    with pytest.raises(InputError, match=r"matches nothing"):
        read(tmp_path / "*.csv")
    with pytest.raises(InputError, match=r"matches no data file \(it matches .*README.md\)"):
        read(tmp_path / "*.md")


def test_a_directory_has_the_splits_that_its_names_tell(tmp_path, read, source):
    for name, rows in {"train-00000-of-00002": ROWS[:4], "train-00001-of-00002": ROWS[4:8]}.items():
        parquet(tmp_path / f"{name}.parquet", rows)
    (tmp_path / "test.jsonl").write_bytes(lines(ROWS[8:]))
    (tmp_path / "extra.csv").write_text("a,b\n1,2\n")
    assert read(tmp_path) == ROWS[:8]
    assert read(tmp_path, split="test") == ROWS[8:]
    assert read(tmp_path, split="train[2:6]+test[:1]") == ROWS[2:6] + ROWS[8:9]
    assert read(tmp_path, split="train[50%:]", max_rows=3) == ROWS[4:7]
    assert resolve_source(source(tmp_path)).files.left_out == (str(tmp_path / "extra.csv"),)
    with pytest.raises(InputError, match="no split 'tests'. Splits: train, test. Did you mean 'test'"):
        read(tmp_path, split="tests")


def test_a_directory_without_names_of_splits_is_one(tmp_path, read):
    (tmp_path / "part-1.jsonl").write_bytes(lines(ROWS[:5]))
    (tmp_path / "part-2.jsonl").write_bytes(lines(ROWS[5:]))
    (tmp_path / ".hidden.jsonl").write_text("nonsense")
    (tmp_path / "README.md").write_text("words")
    assert read(tmp_path) == read(f"{tmp_path}/") == ROWS
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "dev.jsonl").write_bytes(lines(ROWS[:2]))
    assert read(tmp_path / "sub") == ROWS[:2]  # the only split needs no name


def test_a_file_is_one_split_whatever_it_is_called(write, read):
    path = write("x.jsonl", lines())
    assert read(path, split="train") == read(path, split="dev") == ROWS
    assert read(path, split="dev[-2:]") == ROWS[-2:]
    assert read(path, split="train[:1]+train[9:]") == [ROWS[0], ROWS[9]]
    assert read(path, max_rows=4) == ROWS[:4]
    for wrong in ("train[:", "train[a:b]", "train:5", "[:5]", "train[:200%]"):
        with pytest.raises(InputError, match="no split or slice"):
            read(path, split=wrong)


def test_what_datasets_saved_is_read(tmp_path, read):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data.select(range(7)), "test": data.select(range(7, 10))}).save_to_disk(
        tmp_path / "two"
    )
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "one", split="train[20%:40%]") == ROWS[2:4]
    assert read(tmp_path / "two", split="test") == ROWS[7:]
    with pytest.raises(InputError, match="no split 'dev'. Splits: train, test"):
        read(tmp_path / "two", split="dev")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a data set that `save_to_disk` wrote"):
        from linchain_cli.data.hub import load_saved

        load_saved.cache_clear()
        read(tmp_path / "one")


def test_addresses_are_fetched_once(tmp_path, read, source, monkeypatch):
    import fsspec

    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/a.jsonl.gz", gzip.compress(lines(ROWS[:5])))
    memory.pipe("/set/b.jsonl", lines(ROWS[5:]))
    assert read("memory://set/a.jsonl.gz") == ROWS[:5]
    assert read("memory://set/*.jsonl*", split="train[4:6]") == ROWS[4:6]
    rows = RawRows(resolve_source(source("memory://set/b.jsonl")), set())
    assert [rows.place() for _ in rows][0] == "memory:///set/b.jsonl:1 (row 1)"
    memory.pipe("/set/b.jsonl", lines(ROWS[:1]))
    assert read("memory://set/b.jsonl") == ROWS[:1], "the address has other rows by now"
    assert read(f"file://{tmp_path}/x.jsonl") if (tmp_path / "x.jsonl").write_bytes(lines()) else False
    with pytest.raises(InputError, match="memory://set/c.jsonl is not there"):
        read("memory://set/c.jsonl")
    with pytest.raises(InputError, match="is no data file"):
        read("memory://set/c.txt")
    with pytest.raises(InputError, match="cannot be read: ValueError: Protocol not known: nonsense"):
        read("nonsense://set/c.jsonl")


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, read, monkeypatch):
    import fsspec

    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/broken/a.jsonl", lines())

    def breaks_off(_, path, target):
        Path(target).write_bytes(lines()[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", breaks_off)
        with pytest.raises(LinchainError, match="no space is left .* set LINCHAIN_CACHE"):
            read("memory://broken/a.jsonl")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    assert read("memory://broken/a.jsonl") == ROWS


def test_files_of_a_web_server(tmp_path, monkeypatch, read):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "x.jsonl").write_bytes(lines())
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert read(f"{address}/x.jsonl") == ROWS
            with pytest.raises(InputError, match=f"{address}/y.jsonl is not there"):
                read(f"{address}/y.jsonl")
        finally:
            server.shutdown()


def test_what_belongs_to_the_hub_alone_is_refused_elsewhere(write, read):
    with pytest.raises(InputError, match="config is for data sets of the hub and directories"):
        read(write("x.jsonl", lines()), config="part")


def test_a_directory_can_be_read_as_datasets_does(tmp_path, read):
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(lines(ROWS[:2] if name == "one" else ROWS[2:]))
    assert read(tmp_path / "set", data_files="two.jsonl") == ROWS[2:]
    with pytest.raises(InputError, match="three.jsonl"):
        read(tmp_path / "set", data_files="three.jsonl")


@pytest.mark.parametrize("name", ["rows.json", "disk/rows"])
def test_a_link_that_leads_nowhere_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / Path(name).parts[0]).symlink_to("/nowhere/mounted")
    with pytest.raises(InputError, match="is a link to /nowhere/mounted, where nothing is") as error:
        resolve_source(SourceConfig(path=name))
    assert "Did you mean" not in str(error.value)


def test_no_link_in_a_directory_is_passed_over_in_silence(tmp_path, read, prepare):
    """`datasets` follows none to directories, so their splits could not be told."""
    (rows := tmp_path / "rows").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "b.jsonl").write_bytes(lines(ROWS[5:]))
    (rows / "more").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"holds no data file \(it holds more/\)"):
        read(rows)
    (rows / "a.jsonl").write_text('{"text": "a document"}\n{"text": "another one"}\n')
    assert prepare(str(rows)).report.notes[-1] == f"{rows}: not read are more/"
    (rows / "c.jsonl").symlink_to("/nowhere/mounted")
    for source in (rows, rows / "*.jsonl"):
        with pytest.raises(InputError, match=r"no file .*c.jsonl .*is a link to /nowhere/mounted"):
            read(source)


def test_a_name_that_is_no_utf8_is_one_as_any(tmp_path, prepare):
    """As files from before UTF-8 have them: the name comes into reports, hashes and messages."""
    content = b'{"instruction": "a", "output": "b"}\n' * 3 + b"nonsense\n"
    (folder := tmp_path / "rows").mkdir()
    path = os.path.join(os.fsencode(folder), b"caf\xe9.jsonl")
    with open(path, "wb") as handle:
        handle.write(content)
    os.utime(path, (0, 0))
    for name in (os.fsdecode(path), f"{folder}/caf?.jsonl"):  # written, and read again
        report = prepare(str(folder), on_bad_row="skip").report
        assert report.bad_examples[0].startswith(f"{name}:4 (row 4): not JSON")
    assert report.cached
