"""Atomic files, what killed processes left, hashes. What happens when the disk fails stands in
training/test_faults.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import time

import pytest
import torch

from linchain_cli import directories, storage


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file"
    storage.write_atomic(path, "grüße\n")
    assert path.read_text(encoding="utf-8") == "grüße\n"
    storage.write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path) == ["file"]
    assert os.stat(path).st_mode & 0o444 == 0o444, "readable by others, where the umask allows it"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")

    def full(handle, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        storage.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_json_is_readable_ends_with_a_newline_and_refuses_nan(tmp_path):
    storage.write_json(tmp_path / "a.json", {"name": "grüße", "value": 0.1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "grüße",\n  "value": 0.1\n}\n'
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"value": float("nan")})
    assert "0.1" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_tensors_as_bytes_depend_on_names_and_values_alone():
    from safetensors.torch import load

    values = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(3, dtype=torch.int64)}
    data = storage.tensor_bytes(values, {"format": "pt"})
    assert storage.tensor_bytes(dict(reversed(values.items())), {"format": "pt"}) == data
    loaded = load(data)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())
    assert storage.tensor_bytes({**values, "a": torch.tensor(4)}) != storage.tensor_bytes(values)


def test_leftovers_are_removed_of_all_or_of_one(tmp_path):
    (tmp_path / ".staging-a-0123abcd-1-0123abcd").mkdir()
    (tmp_path / ".staging-b-0123abcd-2-0123abcd").touch()
    (tmp_path / "kept").touch()
    storage.remove_staging(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == [".staging-b-0123abcd-2-0123abcd", "kept"]
    storage.remove_staging(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]
    storage.remove_staging(tmp_path / "missing")


def test_what_a_killed_process_had_moved_aside_is_put_back(tmp_path):
    """Killed between the two renames of a replacement, the old directory is all there is."""
    for name in ("lost", "there"):
        (aside := tmp_path / f".replaced-{name}-0123abcd-1-0123abcd").mkdir()
        (aside / "old").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / ".removed-gone-0123abcd-1-0123abcd").mkdir()
    storage.remove_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lost", "there"]
    assert os.listdir(tmp_path / "lost") == ["old"] and os.listdir(tmp_path / "there") == []


def test_names_on_the_way_cannot_be_guessed(tmp_path, monkeypatch):
    """Somebody who may write there could have laid a link of that name."""
    names = set()
    for _ in range(3):
        with pytest.raises(KeyError), directories.staged_directory(tmp_path / "target") as staging:
            names.add(staging.name)
            raise KeyError
    assert len(names) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: "0" * 2 * size)
    for target, victim in (("directory", "mine"), ("x", "file")):
        name = storage.beside(tmp_path / target, storage.STAGING_PREFIX)
        name.symlink_to(tmp_path / victim)
    with pytest.raises(FileExistsError), directories.staged_directory(tmp_path / "directory") as staging:
        (staging / "stranger").touch()
    with pytest.raises(FileExistsError):
        storage.write_atomic(tmp_path / "x", "stranger")
    assert os.listdir(tmp_path / "mine") == [] and (tmp_path / "file").read_text() == "mine"


def test_another_machines_staging_is_left_for_a_day(tmp_path):
    theirs = tmp_path / ".staging-a-0123abcd-1-0123abcd"
    theirs.mkdir()
    (theirs / "file").touch()
    storage.remove_staging(tmp_path, "a", spare_living=True)
    assert theirs.is_dir()
    yesterday = time.time() - 25 * 3600
    os.utime(theirs, (yesterday, yesterday))
    storage.remove_staging(tmp_path, "a", spare_living=True)
    assert theirs.is_dir(), "a file in it is new"
    os.utime(theirs / "file", (yesterday, yesterday))
    storage.remove_staging(tmp_path, "a", spare_living=True)
    assert not theirs.exists()


@pytest.mark.parametrize("token", ["12345678", "00000042", "0123abcd"])
def test_what_a_living_process_stages_is_known_whatever_its_token(tmp_path, monkeypatch, token):
    """One in 43 tokens consists of decimal digits alone, as the number of a process does."""
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: token)
    with directories.staged_directory(tmp_path / "target") as staging:
        storage.remove_staging(tmp_path, spare_living=True)
        assert staging.is_dir()
    aside = storage.beside(tmp_path / "lost", storage.REPLACED_PREFIX)
    aside.mkdir()
    storage.remove_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lost", "target"], "under its own name"


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    """A kill between the beginning of a write and its end costs no disk for good."""
    for write in (
        "storage.write_atomic(Path(sys.argv[1]), b'x')",
        "directories.staged_directory(Path(sys.argv[1]))",
    ):
        code = f"""
import os, sys
from pathlib import Path
from linchain_cli import directories, storage
storage._fsync = directories._sync_tree = storage._write = lambda *_: os.kill(os.getpid(), 9)
held = {write}
held.__enter__()
os.kill(os.getpid(), 9)
"""
        name = write.partition(".")[2].partition("(")[0]
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        assert subprocess.run(command, timeout=60).returncode == -9
        assert len(list(tmp_path.glob(f".staging-{name}-*"))) == 1
    storage.write_atomic(tmp_path / "write_atomic", b"new")
    with directories.staged_directory(tmp_path / "staged_directory"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["staged_directory", "write_atomic"]


def test_a_directory_that_cannot_be_listed_can_be_written_to(tmp_path, monkeypatch):
    def unlistable(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.Path, "iterdir", unlistable)
    storage.write_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_file_systems_that_cannot_sync_directories_are_lived_with(tmp_path, monkeypatch):
    def refuses(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(storage, "_fsync", refuses)
    storage.write_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_hashes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert (
        storage.sha256_file(tmp_path / "file")
        == storage.sha256_bytes(data)
        == hashlib.sha256(data).hexdigest()
    )
