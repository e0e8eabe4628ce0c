"""Encoded rows on disk: when they serve again, and what happens when writing them fails."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linchain_cli import storage
from linchain_cli.data import cache
from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.store import EncodedStore
from linchain_cli.errors import InputError, LinchainError


def all_rows(encoded) -> list[tuple[list[int], list[bool]]]:
    pairs = (encoded[index] for index in range(len(encoded)))
    return [(ids.tolist(), supervised.tolist()) for ids, supervised in pairs]


def test_a_second_call_opens_what_the_first_wrote(prepare, train, monkeypatch):
    first = prepare(train)
    monkeypatch.setattr(cache, "_encode_to", None)  # calling it would fail
    again = prepare(train)
    assert (first.report.cached, again.report.cached) == (False, True)
    assert all_rows(again.train) == all_rows(first.train)
    assert again.report.counts() == first.report.counts()


def entry_of(tmp_path: Path) -> Path:
    (directory,) = (
        path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name != "hashes"
    )
    return directory


def change_source(path: str) -> None:
    """One letter, with size and modification time as before."""
    status = os.stat(path)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data.replace(b"person 7", b"person 8", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_any_change_is_noticed(prepare, train, byte_level, write, rows):
    known = {prepare(train).report.fingerprint}

    def changed(**fields) -> None:
        report = prepare(fields.pop("train", train), **fields).report
        assert not report.cached and report.fingerprint not in known
        known.add(report.fingerprint)

    changed(max_length=255)
    changed(template="plain")
    changed(template={"prompt": "{instruction}\n", "response": "{output}"})
    changed(template="chat")
    changed(train_on_inputs=True)
    changed(on_bad_row="skip")
    changed(columns={"input": "answer"})
    changed(train=[train, train])
    changed(train=str(write("lines.jsonl", "".join(json.dumps(row) + "\n" for row in rows))))
    other = copy.deepcopy(byte_level)
    other.eos_token = "<s>"
    changed(tokenizer=other)
    added = copy.deepcopy(byte_level)
    added.add_tokens(["person"])
    changed(tokenizer=added)
    chat = copy.deepcopy(byte_level)
    chat.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    changed(tokenizer=chat, template="chat")
    change_source(train)
    changed()


def test_what_changes_no_row_needs_no_new_encoding(prepare, train, byte_level, tmp_path):
    prepare(train)
    # Leaves its settings in the tokenizer.
    byte_level(["a", "b c"], padding="max_length", max_length=4, truncation=True)
    moved = tmp_path / "moved.json"
    os.rename(train, moved)
    for fields in (
        {},
        {"validation": 5},
        {"split_seed": 7, "validation": 5},
        {"max_unsupervised_share": 0.5},
    ):
        assert prepare(str(moved), **fields).report.cached


def test_a_report_speaks_of_where_the_files_lie_now(prepare, write, rows, tmp_path):
    path = write("x.jsonl", json.dumps(rows[0]) + "\nnonsense\n")
    prepare(str(path), on_bad_row="skip")
    path.rename(tmp_path / "moved.jsonl")
    report = prepare(str(tmp_path / "moved.jsonl"), on_bad_row="skip").report
    assert report.cached
    assert report.sources[0].name == str(tmp_path / "moved.jsonl")
    assert report.bad_examples[0].startswith(f"{tmp_path}/moved.jsonl:2 (row 2): ")


def test_a_damaged_cache_is_encoded_again(prepare, train, tmp_path):
    expected = all_rows(prepare(train).train)
    directory = entry_of(tmp_path)
    for damage in (
        lambda: os.truncate(directory / "tokens.int32", 100),
        lambda: (directory / "meta.json").write_text("{}"),
        lambda: (directory / "labels.int32").unlink(),
        lambda: (directory / "meta.json").unlink(),
        lambda: (directory / "report.json").unlink(),
    ):
        damage()
        prepared = prepare(train)
        assert not prepared.report.cached
        assert all_rows(prepared.train) == expected


def test_rows_of_which_another_version_tells_otherwise_have_an_entry_of_their_own(
    prepare, train, tmp_path, monkeypatch
):
    first = prepare(train)
    before = entry_of(tmp_path)
    monkeypatch.setattr(cache, "REPORT_VERSION", cache.REPORT_VERSION + 1)
    again = prepare(train)
    assert not again.report.cached and again.report.fingerprint == first.report.fingerprint
    assert before.is_dir(), "the other version may still be in use"


def test_a_failure_leaves_nothing_behind(prepare, write, rows, tmp_path):
    path = write("x.json", json.dumps(rows)[:-1])  # the end is missing
    with pytest.raises(InputError, match="cut off"):
        prepare(str(path), template="alpaca")
    assert [found for found in (tmp_path / "cache").iterdir() if found.is_dir()] == []


def test_what_a_killed_encoding_of_other_rows_left_goes(prepare, train, tmp_path, monkeypatch):
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / "cache").mkdir()
    staged = []
    for number in (process.pid, os.getppid()):
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda number=number: number)
            staged.append(storage.beside(tmp_path / "cache" / "0123abcd", storage.STAGING_PREFIX))
        staged[-1].mkdir()
    prepare(train)
    left = list((tmp_path / "cache").glob(".staging-*"))
    assert left == [staged[1]], "what a living process writes stays"


def test_rows_that_may_not_be_read_are_not_taken_for_damaged(prepare, train, monkeypatch, tmp_path):
    def unreadable(directory):
        raise PermissionError(errno.EACCES, "Permission denied", str(directory / "meta.json"))

    prepare(train)
    before = sorted(path.name for path in (tmp_path / "cache").iterdir())
    monkeypatch.setattr(cache, "EncodedStore", unreadable)
    with pytest.raises(InputError, match="Permission denied.*LINCHAIN_CACHE"):
        prepare(train)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said(prepare, train, monkeypatch, code):
    def full(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache.StoreWriter, "append", full)
    with pytest.raises(LinchainError, match="No space is left .* LINCHAIN_CACHE"):
        prepare(train)


def test_a_cache_that_cannot_be_written_is_said(byte_level, train, data_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Set LINCHAIN_CACHE to a directory"):
        prepare_data(data_config(train), byte_level, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(InputError, match="/proc/nowhere/cache .*Set LINCHAIN_CACHE to a directory"):
        prepare_data(data_config(train), byte_level, cache_dir=Path("/proc/nowhere/cache"))


def test_the_cache_is_where_the_environment_says(byte_level, train, data_config, tmp_path, monkeypatch):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "elsewhere"))
    report = prepare_data(data_config(train), byte_level).report
    (meta,) = (tmp_path / "elsewhere" / "encoded").glob("*/meta.json")
    assert EncodedStore(meta.parent).num_rows == report.rows == 50


PROCESS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from transformers import AutoTokenizer
from linchain_cli.data.dataset import prepare_data
from linchain_cli.recipe import DataConfig
prepared = prepare_data(DataConfig(train=sys.argv[1], validation=0),
AutoTokenizer.from_pretrained(sys.argv[2]),
                        cache_dir=Path(sys.argv[3]))
print(len(prepared.train), prepared.report.cached, prepared.report.tokens)
"""


def test_rows_that_nobody_reads_any_more_go_when_others_are_encoded(
    byte_level, train, data_config, tmp_path, monkeypatch
):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("LINCHAIN_CACHE_DAYS", "0")
    encoded = tmp_path / "elsewhere" / "encoded"
    prepare_data(data_config(train), byte_level)
    forgotten = encoded / ("f" * 32)
    forgotten.mkdir()
    (forgotten / "meta.json").write_text("{}")
    prepare_data(data_config(train, max_length=255), byte_level)
    assert len(list(encoded.glob("*/meta.json"))) == 2 and not forgotten.exists()


def test_two_processes_at_once(write, commonsense_rows, tiny_tokenizer_dir, tmp_path):
    path = write("x.json", json.dumps(commonsense_rows(3000)))
    command = [sys.executable, "-c", PROCESS, str(path), str(tiny_tokenizer_dir), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert {(rows, tokens) for rows, _, tokens in answers} == {("3000", answers[0][2])}
    assert sorted(cached for _, cached, _ in answers) == ["False", "True"]


def test_without_locks_the_slower_of_two_takes_the_other_s_rows(prepare, train, monkeypatch, tmp_path):
    real, raced = cache._encode_to, []

    def race(target, *arguments):
        if not raced:
            raced.append(True)
            real(target, *arguments)  # another process finishes first
        real(target, *arguments)

    monkeypatch.setattr(cache, "_encode_to", race)
    assert len(prepare(train).train) == 50
    assert [path.name for path in (tmp_path / "cache").glob(".staging*")] == []
