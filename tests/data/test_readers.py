"""Files as people have them: every format, and everything that can be wrong with one."""

from __future__ import annotations

import gzip
import json

import pytest

from linchain_cli.data import readers
from linchain_cli.data.files import open_reader
from linchain_cli.data.rows import RowError
from linchain_cli.errors import InputError

ROWS = [{"a": "eins", "b": "zwei\nlinien"}, {"a": "drei, vier", "b": 'sagt "ja" — 東京'}, {"a": "", "b": "x"}]
BOM = b"\xef\xbb\xbf"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12345\n"


def read(path, wanted=frozenset({"a", "b"})) -> list:
    return list(open_reader(path, set(wanted)))


def as_lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    return "a,b\n" + "".join(f"{cell(row['a'])},{cell(row['b'])}\n" for row in rows)


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
        ("lines.json", as_lines(ROWS)),
        ("objects.json", "\n\n".join(json.dumps(row, indent=2) for row in ROWS) + "  "),
        ("lines.jsonl", as_lines(ROWS)),
        ("no-end.jsonl", as_lines(ROWS).rstrip("\n")),
        ("blank.jsonl", "\n" + as_lines(ROWS).replace("\n", "\n\n  \n")),
        ("list.jsonl", json.dumps(ROWS)),
        ("rows.csv", as_csv(ROWS)),
        ("NAME.CSV", as_csv(ROWS).rstrip("\n")),
    ],
)
@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("crlf", [False, True], ids=["", "crlf"])
def test_every_format_with_and_without_bom_and_crlf(write, name, content, bom, crlf):
    data = content.encode()
    rows = ROWS
    if crlf:
        data = data.replace(b"\n", b"\r\n")
        if name.lower().endswith(".csv"):  # a line break inside a quoted cell is the cell's
            rows = [{key: value.replace("\n", "\r\n") for key, value in row.items()} for row in ROWS]
    assert read(write(name, bom + data)) == rows


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    table = pa.table(
        {"a": [row["a"] for row in ROWS] * 1000, "b": [row["b"] for row in ROWS] * 1000, "c": range(3000)}
    )
    pq.write_table(table, path, row_group_size=700)
    assert read(path) == ROWS * 1000
    assert list(read(path, {"nothing"})[0]) == ["a", "b", "c"]  # so that a message can name them


def test_a_list_is_read_in_pieces(write, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK", 7)
    for indent in (None, 2):
        path = write("rows.json", json.dumps(ROWS * 20, indent=indent, ensure_ascii=False))
        assert read(path) == ROWS * 20
    assert read(write("lines.json", as_lines(ROWS * 20))) == ROWS * 20


def test_numbers_at_the_edge_of_a_piece_are_not_cut(write, monkeypatch):
    for block in range(1, 12):
        monkeypatch.setattr(readers, "_BLOCK", block)
        rows = list(open_reader(write("rows.json", '[{"a": 1}, 12345, true, null, "x"]'), set()))
        assert rows[0] == {"a": 1}
        assert [str(row).split(" is ")[1].split(",")[0] for row in rows[1:]] == [
            "a number",
            "true or false",
            "null",
            "a text",
        ]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_number_is_text_as_it_stands_in_the_file(write, name):
    """Python would write 2.5, 1e-05 and 1e-07 in their place, and a model would learn that."""
    written = ["2.50", "0.00001", "1e-7", "-3.0", "7", "1E+2", "0.1"]
    rows = read(write(name, "".join(f'{{"a": {number}}}\n' for number in written)))
    assert [str(row["a"]) for row in rows] == written
    assert [row["a"] for row in rows] == [2.5, 1e-5, 1e-7, -3, 7, 100, 0.1]
    assert json.dumps(rows[0]) == '{"a": 2.5}'


@pytest.mark.parametrize("block", [5, 1 << 20])
def test_lines_and_rows_are_counted(write, monkeypatch, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    path = write("rows.json", json.dumps(ROWS, indent=1))
    reader = open_reader(path, set())
    assert [(reader.row, reader.line) for _ in reader] == [(1, 2), (2, 6), (3, 10)]
    reader = open_reader(write("rows.jsonl", "\n{}\n\n{}\n"), set())
    assert [(reader.row, reader.line) for _ in reader] == [(1, 2), (2, 4)]
    reader = open_reader(write("rows.csv", 'a,b\n"x\ny",1\n\n2,3\n'), set())
    assert [(reader.row, reader.line) for _ in reader] == [(1, 2), (2, 5)]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.json", b"", "x.json: the file is empty"),
        ("x.json", BOM, "only white space"),
        ("x.json", b" \n ", "only white space"),
        ("x.json", b"hello", r"x.json:1: not JSON: a list of objects begins with '\['.*column 1"),
        ("x.json", b"[]", "the list is empty"),
        ("x.json", b"[\n  {},\n  {]\n", r"x.json:3: not JSON: .*column 4, behind row 1"),
        ("x.json", b'[{"a": "1"}', "x.json:1: the file ends in the middle, behind row 1"),
        ("x.json", b'[\n{"a": "1"},\n{"a": "2', "x.json:3: the file ends in the middle, behind row 1"),
        ("x.json", b'[{"a": "1"},', "ends in the middle, behind row 1"),
        ("x.json", b'[{"a": "1"},]', "comma before the end"),
        ("x.json", b'[{"a": "1"} {"a": "2"}]', "',' or ']' expected"),
        ("x.json", b'[{"a": "1"}] x', "more text after the end"),
        ("x.json", b"[{\"a\": '1'}]", "not JSON"),
        ("x.json", b'[{"a": "' + b"x\n" + b'"}]', "control character"),
        ("x.json", b'{"a": "1"}\n{"a": ', "x.json:2: the file ends in the middle, behind row 1"),
        ("x.json", b'{"a": "1"}\n<html>', "x.json:2: not JSON"),
        ("x.json", b'[{"a": "\xff"}]', r"byte 8 \(0xff\) is not UTF-8"),
        ("x.json", BOM + b'[{"a": "\xc3', "ends in the middle|not UTF-8"),
        ("x.json", '[{"a": "1"}]'.encode("utf-16"), "UTF-16"),
        ("x.json", b"[" * 100_000, "nested too deeply|ends in the middle"),
        ("x.json", b"[" + b"9" * 5000 + b"]", "not JSON that can be read"),
        ("x.jsonl", b"", "x.jsonl: the file is empty"),
        ("x.csv", b"", "x.csv: the file is empty"),
        ("x.csv", b"\n", "no header"),
        ("x.csv", b"a,b\n", "no row"),
        ("x.csv", b"a,b,a\n1,2,3\n", "x.csv:1: the header names the column 'a' twice"),
        (
            "x.csv",
            b'a,b\n1,2\n"open,2\n3,4\n',
            "x.csv:3: not CSV: a quote that is opened here is never closed",
        ),
        ("x.csv", b'a,b\n"1"x,2\n', "x.csv:2: not CSV"),
        ("x.csv", b"a,b\n1,2\n3,\xe9\n", r"x.csv:3: byte 10 \(0xe9\) is not UTF-8"),
        ("x.csv", b"a,b\n1\r2,3\n", "x.csv:2: not CSV: a carriage return outside quotes"),
        ("x.csv", b"\xff\xfea\x00", "UTF-16"),
        ("x.csv", b"a;b\n1;2\n", "x.csv:1: the columns are separated by ';', not by commas"),
        ("x.csv", b"a\tb\n1\t2\n", "separated by .* or end its name in .tsv"),
        ("x.jsonl", gzip.compress(b"{}"), r"x.jsonl: the file is compressed \(gzip\). Put .gz behind"),
        ("x.json", b"PAR1\x15\x04", "x.json: the file is a parquet file"),
        *(
            (f"x.{kind}", LFS, f"x.{kind} is not the file itself but what Git LFS keeps in its place: `git")
            for kind in ("jsonl", "csv.gz", "parquet")
        ),
        ("x.jsonl", b"\n\n<!DOCTYPE html>\n<html>", "x.jsonl: the file is a web page. .*`resolve`.*`raw`"),
        ("x.csv", b"<HTML><head>", "x.csv: the file is a web page"),
        ("x.csv", b"PK\x03\x04\x14", "x.csv: the file is a zip archive or a spreadsheet"),
        ("x.parquet", b"", "x.parquet: not a parquet file"),
        ("x.parquet", b"PAR1 nothing PAR1", "x.parquet: not a parquet file"),
        ("x.parquet", b"[1, 2, 3]", "x.parquet: not a parquet file"),
    ],
)
def test_broken_files_are_refused_with_the_place(write, name, content, said):
    with pytest.raises(InputError, match=said) as caught:
        read(write(name, content))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "name, content, said, good",
    [
        ("x.jsonl", b'{"a": "1"}\nnonsense\n{"a": "2"}\n', "not JSON: Expecting value at column 1", 2),
        ("x.jsonl", b'{"a": "1"}\n{"a":\n', "not JSON: Expecting value at column 6", 1),
        ("x.jsonl", b'{"a": "1"}\n{"a": "2\n', "not JSON: Unterminated string starting at column 7", 1),
        ("x.jsonl", b'{"a": "1"}\n[1]\n', "the row is a list", 1),
        ("x.jsonl", b'{"a": "1"}\n\xff\n', r"byte 11 \(0xff\) is not UTF-8", 1),
        ("x.jsonl", b'{"a": "1"}\n{"a": "2', "as if it had been cut off", 1),
        ("x.jsonl", b'{"a": "1"}\n' + b"[" * 100_000 + b"\n", "nested too deeply", 1),
        ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "not JSON that can be read", 0),
        ("x.json", b'[{"a": "1"}, null, {"a": "2"}]', "the row is null, not an object", 2),
        ("x.csv", b"a,b\n1,2\n1\n1,2,3\n", "the row has 1 cells where the header names 2 columns", 1),
    ],
)
def test_a_bad_row_can_be_left_out(write, name, content, said, good):
    rows = read(write(name, content))
    errors = [row for row in rows if isinstance(row, RowError)]
    assert len(rows) - len(errors) == good
    assert errors and said.replace("\\", "") in str(errors[0])


def test_absurd_rows_are_refused_before_they_fill_the_memory(write, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 100)
    monkeypatch.setattr(readers, "MAX_CELL", 500)
    huge = '{"a": "' + "x" * 5000 + '"}'
    with pytest.raises(InputError, match="row 2 has more than 1,000 characters"):
        read(write("x.json", f'[{{"a": "1"}}, {huge}]'))
    rows = read(write("x.jsonl", f'{{"a": "1"}}\n{huge}\n{{"a": "2"}}\n'))
    assert [isinstance(row, RowError) for row in rows] == [False, True, False]
    with pytest.raises(InputError, match="x.csv:3: .*limit|a cell has more than"):
        read(write("x.csv", "a,b\n1,2\n" + "x" * 600 + ",2\n"))


def test_the_csv_limit_of_the_process_is_put_back(write):
    import csv

    before = csv.field_size_limit()
    read(write("x.csv", "a,b\n1,2\n"))
    assert csv.field_size_limit() == before
    long = write("y.csv", "a,b\n" + "x" * 200_000 + ",2\n")  # more than the csv module's own limit
    assert len(read(long)[0]["a"]) == 200_000


def test_a_parquet_file_cut_short_or_flipped_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": ["x" * 50] * 1000}), path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="not a parquet file"):
        read(path)
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    with pytest.raises(InputError, match="no rows"):
        read(path)
