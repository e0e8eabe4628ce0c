"""Directories that appear, and go, as a whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linchain_cli import directories, storage
from linchain_cli.errors import InputError

from .failing import failing_at_each_call


def test_a_staged_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with directories.staged_directory(target) as staging:
        assert staging.parent == target.parent and not target.exists()
        storage.write_durable(staging / "a", b"1")
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("2")
    assert (target / "a").read_bytes() == b"1" and (target / "inner" / "b").read_text() == "2"
    assert os.listdir(target.parent) == ["target"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "target"
    with directories.staged_directory(target) as staging:
        (staging / "a").write_text("old")
    for overwrite in (False, True):
        with (
            pytest.raises(KeyError if overwrite else FileExistsError),
            directories.staged_directory(target, overwrite=overwrite) as staging,
        ):
            (staging / "a").write_text("new")
            raise KeyError
    assert (target / "a").read_text() == "old" and os.listdir(tmp_path) == ["target"]


def test_an_existing_directory_is_replaced_only_on_request(tmp_path):
    target = tmp_path / "target"
    for text in ("old", "new"):
        with directories.staged_directory(target, overwrite=text == "new") as staging:
            (staging / text).touch()
    assert os.listdir(target) == ["new"]
    with pytest.raises(OSError), directories.staged_directory(target) as staging:
        (staging / "newer").touch()
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["target"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    with directories.staged_directory(target) as staging:
        (staging / "old").touch()
    rename = storage.rename

    def fails(source, destination):
        if destination == target and ".staging-target" in source.name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(storage, "rename", fails)
    with (
        pytest.raises(OSError, match="Input/output"),
        directories.staged_directory(target, overwrite=True) as staging,
    ):
        (staging / "new").touch()
    assert os.listdir(target) == ["old"] and os.listdir(tmp_path) == ["target"]


def test_a_replacement_killed_between_its_renames_loses_nothing(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    code = """
import os, sys
from pathlib import Path
from linchain_cli import directories, storage
rename = storage.rename
storage.rename = lambda source, target: (rename(source, target), os.kill(os.getpid(), 9))
with directories.staged_directory(Path(sys.argv[1]), overwrite=True) as staging:
    (staging / "new").touch()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "target")], timeout=60)
    assert done.returncode == -9 and not (tmp_path / "target").exists()
    storage.remove_staging(tmp_path, "target")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


def test_an_empty_target_is_filled_in_place(tmp_path):
    """It may be a mount point, which cannot be renamed, or stand where nothing else can be made."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "lost+found").mkdir()
    before = target.stat().st_ino
    with directories.staged_directory(target) as staging:
        assert staging.parent == target == directories.staging_place(target)
        (staging / "big").write_text("x" * 100)
        (staging / "inner").mkdir()
        (staging / "small").touch()
    assert sorted(os.listdir(target)) == ["big", "inner", "lost+found", "small"]
    assert target.stat().st_ino == before and os.listdir(tmp_path) == ["target"]


def test_a_mount_point_is_never_renamed(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(directories, "_is_mount_point", lambda path: path == target)
    before, rename = target.stat().st_ino, storage.rename

    def busy(source, place):
        if target in (source, place):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, place)

    monkeypatch.setattr(storage, "rename", busy)
    with directories.staged_directory(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert os.listdir(target) == ["new"] and target.stat().st_ino == before
    with pytest.raises(FileExistsError), directories.staged_directory(target) as staging:
        (staging / "newer").touch()
    assert os.listdir(target) == ["new"]
    directories.remove_directory(target)
    assert os.listdir(target) == [] and os.listdir(tmp_path) == ["target"]


def test_mount_points_are_known():
    points = [line.split()[4] for line in open("/proc/self/mountinfo")] if os.path.exists("/proc") else []
    assert all(directories._is_mount_point(Path(point)) for point in points if "\\" not in point)
    assert not directories._is_mount_point(Path(__file__).parent)


@pytest.mark.parametrize("mounted", [False, True])
def test_every_step_of_filling_in_place_may_fail(tmp_path, monkeypatch, mounted):
    target = tmp_path / "target"
    monkeypatch.setattr(directories, "_is_mount_point", lambda path: mounted and path == target)
    was = {"old", "older"} if mounted else set()
    for function in ("mkdir", "rename", "_fsync"):
        for failing in failing_at_each_call(monkeypatch, storage, function):
            directories.shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in was:
                (target / name).touch()
            try:
                with directories.staged_directory(target, overwrite=True) as staging:
                    for name in ("new", "newer"):
                        (staging / name).touch()
            except OSError:
                assert set(os.listdir(target)) == was, (function, failing)
            else:
                assert set(os.listdir(target)) == {"new", "newer"}


def test_a_filling_that_was_killed_is_undone(tmp_path):
    target = tmp_path / "target"
    aside = target / ".replaced-target-0123abcd-1-0123abcd"
    aside.mkdir(parents=True)
    (target / ".staging-target-0123abcd-1-0123abcd").mkdir()
    (aside / "old").touch()
    assert directories.is_empty(target)
    storage.remove_staging(tmp_path, "target")
    assert os.listdir(target) == ["old"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_meanwhile_is_left(tmp_path, overwrite):
    """Two that write one target at once: who is done second must not take the place of the first."""
    target = tmp_path / "target"
    with (
        pytest.raises(FileExistsError, match="another process has written it meanwhile"),
        directories.staged_directory(target, overwrite) as second,
    ):
        (second / "second").touch()
        with directories.staged_directory(target, overwrite) as first:
            (first / "first").touch()
    assert os.listdir(target) == ["first"] and os.listdir(tmp_path) == ["target"]
    with (
        pytest.raises(FileExistsError),
        directories.staged_directory(target, overwrite=True) as second,
    ):
        with directories.staged_directory(target, overwrite=True) as first:
            (first / "third").touch()
    assert os.listdir(target) == ["third"] and os.listdir(tmp_path) == ["target"]


def test_two_fillings_of_one_directory_do_not_mix(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(FileExistsError), directories.staged_directory(target, overwrite=False) as second:
        (second / "second").touch()
        with directories.staged_directory(target) as first:
            (first / "first").touch()
    assert os.listdir(target) == ["first"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "target")
    for name in ("one", "two"):
        with directories.staged_directory(tmp_path / "link", overwrite=True) as staging:
            (staging / name).touch()
        assert os.listdir(tmp_path / "deep" / "target") == [name]
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "deep") == ["target"]
    directories.remove_directory(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "deep" / "target") == []


def test_what_had_been_moved_aside_is_not_written_over_unasked(tmp_path):
    """Its place is empty since a process was killed that replaced it: it comes back first."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    aside = tmp_path / f".replaced-target-{storage._host()}-{dead.pid}-0123abcd"
    aside.mkdir()
    (aside / "old").touch()
    with pytest.raises(FileExistsError), directories.staged_directory(tmp_path / "target") as staging:
        (staging / "new").touch()
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


def test_a_place_that_cannot_be_written_is_told_before(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    directories.check_writable(tmp_path / "new" / "deep")
    directories.check_writable(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"], "nothing is left of the trial"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    tried, mkdir = [], storage.mkdir
    monkeypatch.setattr(storage, "mkdir", lambda path: (tried.append(path.parent), mkdir(path)))
    directories.check_writable(Path("."))
    assert tried == [directories.staging_place(Path("."))], "where it will be staged, and not beside that"
    (tmp_path / "empty").rmdir()

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage, "mkdir", read_only)
    for target in (tmp_path / "new" / "deep", tmp_path / "full"):
        with pytest.raises(InputError, match=f"cannot be written: {tmp_path}: Read-only file system"):
            directories.check_writable(target)


def test_a_removed_directory_is_never_seen_in_part(tmp_path, monkeypatch):
    path = tmp_path / "step-000001"
    path.mkdir()
    for name in "abc":
        (path / name).touch()
    monkeypatch.setattr(directories.shutil, "rmtree", lambda *args, **options: None)  # killed before it
    directories.remove_directory(path)
    assert not path.exists()
    assert all(name.startswith(storage.REMOVED_PREFIX) for name in os.listdir(tmp_path))
