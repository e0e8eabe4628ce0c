"""Hashes that are remembered, and when they are not; what stays in the cache, and what goes."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linchain_cli import cache
from linchain_cli.errors import InputError
from linchain_cli.locks import locked
from linchain_cli.storage import sha256_bytes


def test_file_hashes_are_remembered_only_for_settled_files(tmp_path, monkeypatch):
    path, place = tmp_path / "x.json", tmp_path / "cache"
    path.write_text("abc")
    known = cache.remembered_sha256(path, place)
    assert not (place / "hashes").exists(), "it may change again within the clock's resolution"
    elapsed = 0

    def slowly(path):
        nonlocal elapsed
        elapsed = 10
        return known

    with monkeypatch.context() as large:
        large.setattr(time, "time", lambda clock=time.time: clock() + elapsed)
        large.setattr(cache, "sha256_file", slowly)
        assert cache.remembered_sha256(path, place) == known
    assert not (place / "hashes").exists(), "nor is it settled by the time that reading it takes"
    monkeypatch.setattr(time, "time", lambda clock=time.time: clock() + 10)
    assert cache.remembered_sha256(path, place) == known
    monkeypatch.setattr(cache, "sha256_file", None)
    assert cache.remembered_sha256(path, place) == known
    monkeypatch.undo()
    change_source_status = os.stat(path)
    path.write_text("abd")
    os.utime(path, ns=(change_source_status.st_atime_ns, change_source_status.st_mtime_ns))
    assert cache.remembered_sha256(path, place) != known
    note = next((place / "hashes").iterdir())
    note.write_text("{")
    assert cache.remembered_sha256(path, place) != known


DAY = 24 * 3600.0


def place(root: Path, name: str) -> Path:
    """Where the entry FOLDER/WORD lies, which is named as the tool names those of that folder."""
    folder, word = name.split("/")
    mark = sha256_bytes(word.encode())
    names = {"encoded": mark[:32], "gguf": f"{word}-{mark[:16]}", "downloads": mark[:24]}
    return root / folder / names[folder]


def entry(root: Path, name: str, days: float, marker: str = "meta.json") -> Path:
    """An entry of the cache that was last used so many days ago."""
    return left(place(root, name), days, marker)


def left(path: Path, days: float, marker: str) -> Path:
    """A directory with one file, which nobody has touched for so many days."""
    path.mkdir(parents=True)
    (path / marker).write_text("{}")
    for each in (path / marker, path):
        os.utime(each, (time.time() - days * DAY,) * 2)
    return path


USER = """
import sys
from pathlib import Path
from linchain_cli.cache import keep
assert keep(Path(sys.argv[1]))
print("kept", flush=True)
sys.stdin.read()
"""


def test_what_nobody_has_used_for_long_goes_and_what_a_process_uses_stays(tmp_path, caplog):
    caplog.set_level("INFO")
    unused = [
        entry(tmp_path, "encoded/old", 31),
        entry(tmp_path, "gguf/old", 31, "config.json"),
        entry(tmp_path, "downloads/old", 31, "rows.json"),
        entry(tmp_path, "encoded/damaged", 31, "tokens.int32"),
    ]
    fresh, opened = entry(tmp_path, "encoded/fresh", 29), entry(tmp_path, "gguf/opened", 31, "config.json")
    os.utime(opened / "config.json", (time.time(), time.time() - 31 * DAY))  # an earlier version read it
    in_use, made = entry(tmp_path, "encoded/in-use", 31), entry(tmp_path, "encoded/made", 31)
    (tmp_path / "hashes").mkdir()
    for days in (1, 31):
        note = tmp_path / "hashes" / f"{days:032x}.json"
        note.write_text("{}")
        os.utime(note, (time.time() - days * DAY,) * 2)
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(in_use / "meta.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert user.stdout.readline() == b"kept\n"
        os.utime(in_use, (time.time() - 31 * DAY,) * 2)
        with locked(made):
            cache.remove_unused(tmp_path)
    finally:
        user.communicate(timeout=60)
    assert not any(path.exists() for path in unused)
    assert all(path.is_dir() for path in (fresh, opened, in_use, made))
    assert [path.name for path in (tmp_path / "hashes").iterdir()] == [f"{1:032x}.json"]
    assert "4 entries" in caplog.text and "LINCHAIN_CACHE_DAYS" in caplog.text
    cache.remove_unused(tmp_path)
    assert not in_use.exists(), "its process has ended"
    hidden = [path.name for path in tmp_path.rglob(".*")]
    assert hidden == [], "neither locks nor what was on its way out stay"


def test_what_is_not_the_tool_s_stays_where_the_cache_is_a_directory_for_more(tmp_path):
    files = {"downloads/holiday": "photo.jpg", "gguf/llama-3": "config.json", "encoded/talks": "meta.json"}
    foreign = [left(tmp_path / name, 400, file) / file for name, file in files.items()]
    foreign.append(left(tmp_path / "hashes", 400, "passwords.json") / "passwords.json")
    old = entry(tmp_path, "downloads/rows", 31, "rows.json")
    cache.remove_unused(tmp_path)
    assert all(path.is_file() for path in foreign) and not old.exists()


def test_using_an_entry_is_noted_and_what_is_being_removed_is_not_used(tmp_path):
    used = entry(tmp_path, "encoded/a", 31)
    with pytest.raises(FileNotFoundError):
        cache.keep(place(tmp_path, "encoded/b") / "meta.json")
    with open(used / "meta.json", "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert not cache.keep(used / "meta.json")
    assert cache.keep(used / "meta.json")
    assert time.time() - used.stat().st_mtime < 60
    assert cache.keep(used / "meta.json"), "also twice in one process"


def test_where_nothing_can_be_locked_everything_stays(tmp_path, monkeypatch):
    old = entry(tmp_path, "encoded/old", 31)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    cache.remove_unused(tmp_path)
    assert old.is_dir() and cache.keep(old / "meta.json")


@pytest.mark.parametrize(("written", "stays"), [("10", False), ("40", True), ("inf", True), ("", False)])
def test_the_environment_says_how_long_things_stay(tmp_path, monkeypatch, written, stays):
    old = entry(tmp_path, "encoded/old", 31)
    monkeypatch.setenv("LINCHAIN_CACHE_DAYS", written)
    cache.remove_unused(tmp_path)
    assert old.exists() == stays


@pytest.mark.parametrize("written", ["a month", "-1", "nan"])
def test_a_wrong_number_of_days_is_told(tmp_path, monkeypatch, written):
    monkeypatch.setenv("LINCHAIN_CACHE_DAYS", written)
    with pytest.raises(InputError, match="LINCHAIN_CACHE_DAYS: .* is no number of days"):
        cache.remove_unused(tmp_path)
