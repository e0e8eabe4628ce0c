"""Atomic files, staged directories, hashes. What happens when the disk fails stands in
training/test_faults.py.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys

import pytest
import torch

from linchain_cli import storage


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
    with pytest.raises(OSError, match="No space left on device: .*file"):
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


def test_a_staged_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with storage.staged_directory(target) as staging:
        assert staging.parent == target.parent and not target.exists()
        storage.write_durable(staging / "a", b"1")
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("2")
    assert (target / "a").read_bytes() == b"1" and (target / "inner" / "b").read_text() == "2"
    assert os.listdir(target.parent) == ["target"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "target"
    with storage.staged_directory(target) as staging:
        (staging / "a").write_text("old")
    for overwrite in (False, True):
        with pytest.raises(KeyError), storage.staged_directory(target, overwrite=overwrite) as staging:
            (staging / "a").write_text("new")
            raise KeyError
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_an_existing_directory_is_replaced_only_on_request(tmp_path):
    target = tmp_path / "target"
    for text in ("old", "new"):
        with storage.staged_directory(target, overwrite=text == "new") as staging:
            (staging / text).touch()
    assert os.listdir(target) == ["new"]
    with pytest.raises(OSError), storage.staged_directory(target) as staging:
        (staging / "newer").touch()
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["target"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    with storage.staged_directory(target) as staging:
        (staging / "old").touch()
    rename = storage._rename

    def fails(source, destination):
        if destination == target and ".staging-target" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(storage, "_rename", fails)
    with (
        pytest.raises(OSError, match="Input/output"),
        storage.staged_directory(target, overwrite=True) as staging,
    ):
        (staging / "new").touch()
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["target"]


def test_leftovers_are_removed_of_all_or_of_one(tmp_path):
    (tmp_path / ".staging-a-1").mkdir()
    (tmp_path / ".staging-b-2").touch()
    (tmp_path / "kept").touch()
    storage.remove_staging(tmp_path, "a")
    assert sorted(os.listdir(tmp_path)) == [".staging-b-2", "kept"]
    storage.remove_staging(tmp_path)
    assert os.listdir(tmp_path) == ["kept"]
    storage.remove_staging(tmp_path / "missing")


def test_what_a_killed_process_had_moved_aside_is_put_back(tmp_path):
    """Killed between the two renames of a replacement, the old directory is all there is."""
    for name in ("lost", "there"):
        (tmp_path / f".replaced-{name}-1").mkdir()
        (tmp_path / f".replaced-{name}-1" / "old").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / ".staging-old-gone-1").mkdir()
    storage.remove_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lost", "there"]
    assert os.listdir(tmp_path / "lost") == ["old"] and os.listdir(tmp_path / "there") == []


def test_a_replacement_killed_between_its_renames_loses_nothing(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    code = """
import os, sys
from pathlib import Path
from linchain_cli import storage
rename = storage._rename
storage._rename = lambda source, target: (rename(source, target), os.kill(os.getpid(), 9))
with storage.staged_directory(Path(sys.argv[1]), overwrite=True) as staging:
    (staging / "new").touch()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "target")], timeout=60)
    assert done.returncode == -9 and not (tmp_path / "target").exists()
    storage.remove_staging(tmp_path, "target")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


def test_a_removed_directory_is_never_seen_in_part(tmp_path, monkeypatch):
    path = tmp_path / "step-000001"
    path.mkdir()
    for name in "abc":
        (path / name).touch()
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *args, **options: None)  # killed before it
    storage.remove_directory(path)
    assert not path.exists()
    assert all(name.startswith(storage.STAGING_PREFIX) for name in os.listdir(tmp_path))


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
