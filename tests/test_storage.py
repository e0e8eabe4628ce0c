"""Atomic files, staged directories, hashes. What happens when the disk fails stands in
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

from linchain_cli import storage
from linchain_cli.errors import InputError


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
        with (
            pytest.raises(KeyError if overwrite else FileExistsError),
            storage.staged_directory(target, overwrite=overwrite) as staging,
        ):
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
    (tmp_path / ".removed-gone-1").mkdir()
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


def test_an_empty_target_is_filled_in_place(tmp_path):
    """It may be a mount point, which cannot be renamed, or stand where nothing else can be made."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "lost+found").mkdir()
    before = target.stat().st_ino
    with storage.staged_directory(target) as staging:
        assert staging.parent == target == storage.staging_place(target)
        (staging / "big").write_text("x" * 100)
        (staging / "inner").mkdir()
        (staging / "small").touch()
    assert sorted(os.listdir(target)) == ["big", "inner", "lost+found", "small"]
    assert target.stat().st_ino == before and os.listdir(tmp_path) == ["target"]


def test_a_mount_point_is_never_renamed(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(storage, "_is_mount_point", lambda path: path == target)
    before, rename = target.stat().st_ino, storage._rename

    def busy(source, place):
        if target in (source, place):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, place)

    monkeypatch.setattr(storage, "_rename", busy)
    with storage.staged_directory(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert os.listdir(target) == ["new"] and target.stat().st_ino == before
    with pytest.raises(FileExistsError), storage.staged_directory(target) as staging:
        (staging / "newer").touch()
    assert os.listdir(target) == ["new"]
    storage.remove_directory(target)
    assert os.listdir(target) == [] and os.listdir(tmp_path) == ["target"]


def test_mount_points_are_known():
    points = [line.split()[4] for line in open("/proc/self/mountinfo")] if os.path.exists("/proc") else []
    assert all(storage._is_mount_point(storage.Path(point)) for point in points if "\\" not in point)
    assert not storage._is_mount_point(storage.Path(__file__).parent)


@pytest.mark.parametrize("mounted", [False, True])
def test_every_step_of_filling_in_place_may_fail(tmp_path, monkeypatch, mounted):
    target = tmp_path / "target"
    monkeypatch.setattr(storage, "_is_mount_point", lambda path: mounted and path == target)
    was = {"old", "older"} if mounted else set()
    for function in ("_mkdir", "_rename", "_fsync"):
        original = getattr(storage, function)
        for failing in range(1, 30):
            storage.shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in was:
                (target / name).touch()
            calls = 0

            def step(*arguments, original=original, failing=failing):
                nonlocal calls
                calls += 1
                if calls == failing:
                    raise OSError(errno.EIO, "it broke")
                return original(*arguments)

            monkeypatch.setattr(storage, function, step)
            try:
                with storage.staged_directory(target, overwrite=True) as staging:
                    for name in ("new", "newer"):
                        (staging / name).touch()
            except OSError:
                assert set(os.listdir(target)) == was, (function, failing)
            else:
                assert set(os.listdir(target)) == {"new", "newer"}
            monkeypatch.setattr(storage, function, original)
            if calls < failing:
                break
        else:
            pytest.fail("the steps have no end")


def test_a_filling_that_was_killed_is_undone(tmp_path):
    target = tmp_path / "target"
    aside = target / ".replaced-target-0123abcd-1-0123abcd"
    aside.mkdir(parents=True)
    (target / ".staging-target-0123abcd-1-0123abcd").mkdir()
    (aside / "old").touch()
    assert storage.is_empty(target)
    storage.remove_staging(tmp_path, "target")
    assert os.listdir(target) == ["old"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_meanwhile_is_left(tmp_path, overwrite):
    """Two that write one target at once: who is done second must not take the place of the first."""
    target = tmp_path / "target"
    with (
        pytest.raises(FileExistsError, match="another process has written it meanwhile"),
        storage.staged_directory(target, overwrite) as second,
    ):
        (second / "second").touch()
        with storage.staged_directory(target, overwrite) as first:
            (first / "first").touch()
    assert os.listdir(target) == ["first"] and os.listdir(tmp_path) == ["target"]
    with (
        pytest.raises(FileExistsError),
        storage.staged_directory(target, overwrite=True) as second,
    ):
        with storage.staged_directory(target, overwrite=True) as first:
            (first / "third").touch()
    assert os.listdir(target) == ["third"] and os.listdir(tmp_path) == ["target"]


def test_two_fillings_of_one_directory_do_not_mix(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(FileExistsError), storage.staged_directory(target, overwrite=False) as second:
        (second / "second").touch()
        with storage.staged_directory(target) as first:
            (first / "first").touch()
    assert os.listdir(target) == ["first"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "target")
    for name in ("one", "two"):
        with storage.staged_directory(tmp_path / "link", overwrite=True) as staging:
            (staging / name).touch()
        assert os.listdir(tmp_path / "deep" / "target") == [name]
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "deep") == ["target"]
    storage.remove_directory(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "deep" / "target") == []


def test_names_on_the_way_cannot_be_guessed(tmp_path, monkeypatch):
    """Somebody who may write there could have laid a link of that name."""
    names = set()
    for _ in range(3):
        with pytest.raises(KeyError), storage.staged_directory(tmp_path / "target") as staging:
            names.add(staging.name)
            raise KeyError
    assert len(names) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(storage.secrets, "token_hex", lambda size: "0" * 2 * size)
    for target, victim in (("directory", "mine"), ("x", "file")):
        name = storage._beside(tmp_path / target, storage.STAGING_PREFIX)
        name.symlink_to(tmp_path / victim)
    with pytest.raises(FileExistsError), storage.staged_directory(tmp_path / "directory") as staging:
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
    with storage.staged_directory(tmp_path / "target") as staging:
        storage.remove_staging(tmp_path, spare_living=True)
        assert staging.is_dir()
    aside = storage._beside(tmp_path / "lost", storage.REPLACED_PREFIX)
    aside.mkdir()
    storage.remove_staging(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["lost", "target"], "under its own name"


def test_what_killed_processes_left_goes_with_the_next_write(tmp_path):
    """A kill between the beginning of a write and its end costs no disk for good."""
    for write in ("write_atomic(Path(sys.argv[1]), b'x')", "staged_directory(Path(sys.argv[1]))"):
        code = f"""
import os, sys
from pathlib import Path
from linchain_cli import storage
storage._fsync = storage._sync_tree = storage._write = lambda *_: os.kill(os.getpid(), 9)
held = storage.{write}
held.__enter__()
os.kill(os.getpid(), 9)
"""
        name = write.partition("(")[0]
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        assert subprocess.run(command, timeout=60).returncode == -9
        assert len(list(tmp_path.glob(f".staging-{name}-*"))) == 1
    storage.write_atomic(tmp_path / "write_atomic", b"new")
    with storage.staged_directory(tmp_path / "staged_directory"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["staged_directory", "write_atomic"]


def test_what_had_been_moved_aside_is_not_written_over_unasked(tmp_path):
    """Its place is empty since a process was killed that replaced it: it comes back first."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".replaced-target-{dead.pid}").mkdir()
    (tmp_path / f".replaced-target-{dead.pid}" / "old").touch()
    with pytest.raises(FileExistsError), storage.staged_directory(tmp_path / "target") as staging:
        (staging / "new").touch()
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["old"]


def test_a_directory_that_cannot_be_listed_can_be_written_to(tmp_path, monkeypatch):
    def unlistable(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(storage.Path, "iterdir", unlistable)
    storage.write_atomic(tmp_path / "file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


def test_a_place_that_cannot_be_written_is_told_before(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    storage.check_writable(tmp_path / "new" / "deep")
    storage.check_writable(tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"], "nothing is left of the trial"
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    tried, mkdir = [], storage._mkdir
    monkeypatch.setattr(storage, "_mkdir", lambda path: (tried.append(path.parent), mkdir(path)))
    storage.check_writable(storage.Path("."))
    assert tried == [storage.staging_place(storage.Path("."))], "where it will be staged, and not beside that"
    (tmp_path / "empty").rmdir()

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage, "_mkdir", read_only)
    for target in (tmp_path / "new" / "deep", tmp_path / "full"):
        with pytest.raises(InputError, match=f"cannot be written: {tmp_path}: Read-only file system"):
            storage.check_writable(target)


def test_a_removed_directory_is_never_seen_in_part(tmp_path, monkeypatch):
    path = tmp_path / "step-000001"
    path.mkdir()
    for name in "abc":
        (path / name).touch()
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *args, **options: None)  # killed before it
    storage.remove_directory(path)
    assert not path.exists()
    assert all(name.startswith(storage.REMOVED_PREFIX) for name in os.listdir(tmp_path))


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
