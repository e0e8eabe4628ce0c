"""One lock for the whole program, also where the file system knows none."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time

import pytest

from linchain_cli import locks
from linchain_cli.errors import InputError, InUse
from linchain_cli.locks import in_use, locked
from linchain_cli.run import RunDirectory


def test_the_lock_names_its_holder(tmp_path):
    with locked(tmp_path / "a"):
        assert in_use(tmp_path / "a") and not in_use(tmp_path / "b")
        with pytest.raises(InUse, match=rf"a is in use by another linchain process \({os.getpid()} on .+\)"):
            with locked(tmp_path / "a"):
                pass
        with locked(tmp_path / "b"):
            pass
    assert not in_use(tmp_path / "a")


def test_whoever_looks_whether_it_is_held_keeps_nobody_out(tmp_path):
    """To look takes the lock for a moment, as `linchain runs` does while a run begins."""
    with locked(tmp_path / "a"):
        pass
    with open(locks.lock_path(tmp_path / "a")) as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        threading.Timer(0.05, lambda: fcntl.flock(handle, fcntl.LOCK_UN)).start()
        with locked(tmp_path / "a"):
            assert in_use(tmp_path / "a")


def test_one_waits_for_the_other_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_SILENT", 0.1)
    caplog.set_level("INFO")
    order = []

    def second():
        with locked(tmp_path / "a", wait=None):
            order.append("second")

    with locked(tmp_path / "a"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    (record,) = caplog.records
    assert f"Waiting for another linchain process ({os.getpid()} on " in record.getMessage()


def test_whoever_waited_for_a_lock_file_that_is_gone_locks_the_new_one(tmp_path):
    entered = threading.Event()

    def second():
        with locked(tmp_path / "a", wait=None):
            entered.set()
            time.sleep(0.3)

    with locked(tmp_path / "a"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        locks.lock_path(tmp_path / "a").unlink()
    assert entered.wait(10)
    assert in_use(tmp_path / "a"), "it holds what others find"
    thread.join(10)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_file_locks_it_goes_on_and_says_what_to_see_to(tmp_path, monkeypatch, caplog, code):
    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    run = RunDirectory(tmp_path / "runs" / "a")
    with run.lock():
        run.create("name: a\n")
    assert run.exists() and not in_use(run.path)
    (record,) = caplog.records
    assert "has no file locks" in record.getMessage() and "no other process works on a" in record.getMessage()
    caplog.clear()
    with locked(tmp_path / "cache", wait=None, needed=False):
        pass
    assert not caplog.records


def test_a_read_only_place_is_told(tmp_path, monkeypatch):
    def read_only(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", read_only)
    with pytest.raises(
        InputError, match="cannot be written to .Read-only file system.; choose another output_dir"
    ):
        with RunDirectory(tmp_path / "a").lock():
            pass


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".a.lock").symlink_to(tmp_path / "file")
    with pytest.raises(OSError):
        with locked(tmp_path / "a"):
            pass
    assert (tmp_path / "file").read_text() == "mine"
