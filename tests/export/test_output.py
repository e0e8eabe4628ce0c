"""What an export may write over, how much room it needs, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple

import pytest

from linchain_cli import storage
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.export import shards
from linchain_cli.export.card import Origin
from linchain_cli.export.merge import MergeOptions, merge_checkpoint
from linchain_cli.export.output import check_disk, check_output, parse_size, staged_output

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("0.5kb", 500), ("1000", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "five", "-1GB", "0", "0.1", "5XB", "nan", "1e9"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="--max-shard-size: .* is not a size"):
        parse_size(text, "--max-shard-size")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A base, a run with an adapter, and a working directory."""
    base, run, work = tmp_path / "models" / "base", tmp_path / "runs" / "run", tmp_path / "work"
    for folder in (base, run / "adapter", work):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    return base, run, work


def test_outputs_that_would_write_over_what_is_read(places):
    base, run, _ = places
    sources = [base, run / "adapter"]
    for wrong in (
        base,
        base / "merged",
        base.parent,
        run,
        run / "adapter",
        run / "adapter" / "x",
        run.parent,
    ):
        with pytest.raises(InputError, match="it would write into or over"):
            check_output(wrong, overwrite=True, sources=sources)
    assert check_output(run / "merged", overwrite=False, sources=sources) == run / "merged"


def test_a_link_to_the_base_is_the_base(places, tmp_path):
    base, _, _ = places
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(InputError, match="it would write into or over"):
        check_output(tmp_path / "link", overwrite=True, sources=[base])


def test_outputs_that_hold_where_somebody_is(places, monkeypatch, tmp_path):
    _, _, work = places
    with pytest.raises(InputError, match="it holds the current directory"):
        check_output(work, overwrite=True, sources=[])
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    with pytest.raises(InputError, match="it holds the home directory"):
        check_output(tmp_path / "home", overwrite=True, sources=[])


def test_what_exists_is_left_unless_asked(tmp_path, places):
    file, full, bare = tmp_path / "file", tmp_path / "full", tmp_path / "bare"
    file.write_text("x")
    full.mkdir()
    (full / "mine").write_text("x")
    bare.mkdir()
    with pytest.raises(InputError, match="exists and is a file"):
        check_output(file, overwrite=True, sources=[])
    with pytest.raises(InputError, match="--overwrite to replace it"):
        check_output(full, overwrite=False, sources=[])
    assert check_output(full, overwrite=True, sources=[]) == full
    assert check_output(bare, overwrite=False, sources=[]) == bare


def test_a_disk_that_is_too_small_is_told_before_writing(tmp_path, base_of, adapter_of_base, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 70 << 20))
    with pytest.raises(LinchainError, match=r"needs 0\.17 GB, but only 0\.07 GB are free") as error:
        check_disk(tmp_path / "not" / "yet", 10**8)
    assert error.value.exit_code == 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 1 << 20))
    base = base_of("llama")
    with pytest.raises(LinchainError, match="Nothing was written"):
        merge_checkpoint(base, adapter_of_base(base), tmp_path / "out", MergeOptions(), Origin("x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["_write_at", "_copy", "_make"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_midway_leaves_what_was_there(
    tmp_path, base_of, adapter_of_base, monkeypatch, function, code
):
    base = base_of("llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("kept")
    calls = 0
    original = getattr(shards, function)

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise OSError(code, "it broke")
        return original(*arguments)

    monkeypatch.setattr(shards, function, fail)
    with pytest.raises(LinchainError, match="disk .* is full|could not be written") as error:
        merge_checkpoint(base, adapter_of_base(base), out, MergeOptions(overwrite=True), Origin("x"))
    assert error.value.exit_code == 1 and calls >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


@pytest.mark.parametrize("function", ["_fsync", "_rename"])
def test_every_durable_step_may_fail(tmp_path, monkeypatch, function):
    out = tmp_path / "out"
    original = getattr(storage, function)
    for failing in range(1, 20):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "old").write_text("old")
        calls = 0

        def step(*arguments, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "it broke")
            return original(*arguments)

        monkeypatch.setattr(storage, function, step)
        try:
            with staged_output(out) as staging:
                (staging / "new").write_text("new")
        except LinchainError:
            pass
        monkeypatch.setattr(storage, function, original)
        assert [path.name for path in out.iterdir()] in (["old"], ["new"])
        assert [path.name for path in tmp_path.iterdir()] == ["out"], f"failure {failing} of {function}"
        if calls < failing:
            return
    pytest.fail("the steps have no end")


def test_an_overwritten_output_holds_the_new_files_alone(tmp_path, base_of, adapter_of_base):
    base = base_of("llama")
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        merge_checkpoint(base, adapter_of_base(base), out, MergeOptions(), Origin("x"))
    merge_checkpoint(base, adapter_of_base(base), out, MergeOptions(overwrite=True), Origin("x"))
    assert not (out / "stale.safetensors").exists() and (out / "merge.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigterm_leaves_nothing_half_written(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="was not written") as error, staged_output(tmp_path / "out") as staging:
        (staging / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert error.value.exit_code == 143
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == handler


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path):
    dead, alive = dead_process(), os.getppid()
    for name in (
        f".staging-out-{dead}",
        f".staging-out-{alive}",
        f".staging-other-{dead}",
        f".replaced-out-{dead}",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / f".replaced-out-{dead}" / "mine").write_text("x")
    with pytest.raises(ZeroDivisionError), staged_output(tmp_path / "out"):
        raise ZeroDivisionError
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f".staging-out-{alive}", f".staging-other-{dead}", "out"}
    assert (tmp_path / "out" / "mine").read_text() == "x", "an output that was only moved aside is put back"
