"""What an export may write over, how much room it needs, and what is left when it fails."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from linchain_cli import storage
from linchain_cli.errors import InputError, LinchainError, Stopped
from linchain_cli.export import output, shards
from linchain_cli.export.card import Origin
from linchain_cli.export.merge import MergeOptions, merge_checkpoint
from linchain_cli.export.output import check_disk, check_output, parse_size, staged_output
from linchain_cli.export.receipts import MergeReceipt, check_replaceable

from ..command_line import linchain
from ..failing import failing_at_each_call

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("0.5kb", 500), ("1000", 1000)],
)
def test_sizes(text, size):
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "GB", "five", "-1GB", "0", "0.1", "5XB", "nan", "1e9", "9" * 400])
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
            check_output(wrong, MergeReceipt, overwrite=True, sources=sources)
    assert check_output(run / "merged", overwrite=False, sources=sources) == run / "merged"


def test_a_link_to_the_base_is_the_base(places, tmp_path):
    base, _, _ = places
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(InputError, match="it would write into or over"):
        check_output(tmp_path / "link", MergeReceipt, overwrite=True, sources=[base])


def test_outputs_that_hold_where_somebody_is(places, monkeypatch, tmp_path):
    _, _, work = places
    with pytest.raises(InputError, match="it holds the current directory"):
        check_output(work, MergeReceipt, overwrite=True, sources=[])
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    with pytest.raises(InputError, match="it holds the home directory"):
        check_output(tmp_path / "home", MergeReceipt, overwrite=True, sources=[])
    (tmp_path / "disk" / "me").mkdir(parents=True)
    (tmp_path / "homes").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path / "homes" / "me"))
    with pytest.raises(InputError, match="it holds the home directory"):
        check_output(tmp_path / "disk" / "me", MergeReceipt, overwrite=True, sources=[])


@pytest.fixture
def merged(tmp_path, base_of, adapter_of_base):
    """What `linchain merge` wrote to tmp_path / "out", and a function that merges there again."""
    base = base_of("llama")
    adapter = adapter_of_base(base, targets=["q_proj"])

    def again(**options):
        return merge_checkpoint(base, adapter, tmp_path / "out", MergeOptions(**options), Origin("x"))

    again()
    return tmp_path / "out", again


def test_a_user_without_a_home_may_write(tmp_path, monkeypatch):
    def expanded(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.setattr(Path, "expanduser", expanded)
    assert check_output(tmp_path / "out", MergeReceipt, sources=[]) == tmp_path / "out"
    with pytest.raises(InputError, match="home directory is not known here"):
        check_output(Path("~/out"), MergeReceipt, sources=[])


def test_what_exists_is_left_unless_asked(tmp_path, places):
    file, full, bare = tmp_path / "file", tmp_path / "full", tmp_path / "bare"
    file.write_text("x")
    full.mkdir()
    (full / "mine").write_text("x")
    bare.mkdir()
    with pytest.raises(InputError, match="exists and is a file"):
        check_output(file, MergeReceipt, overwrite=True, sources=[])
    with pytest.raises(InputError, match="cannot be made: .*file is a file"):
        check_output(file / "below" / "it", MergeReceipt, overwrite=True, sources=[])
    with pytest.raises(InputError, match="full exists and is left as it is. Choose another --out"):
        check_output(full, MergeReceipt, overwrite=False, sources=[])
    assert check_output(bare, MergeReceipt, overwrite=False, sources=[]) == bare


def test_overwrite_replaces_what_the_command_wrote(merged):
    out, again = merged
    with pytest.raises(InputError, match="Use --overwrite"):
        again()
    before = (out / "merge.json").read_bytes()
    again(overwrite=True, dtype=torch.bfloat16)
    assert (out / "merge.json").read_bytes() != before


def test_what_is_staged_inside_a_mount_point_is_nobodys(merged):
    out, again = merged
    (out / ".staging-out-0123abcd-1-0123abcd").mkdir()
    (out / ".staging-out-0123abcd-1-0123abcd" / "model.safetensors").write_text("half")
    check_replaceable(out, MergeReceipt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt is not of it"),
        (lambda out: ((out / "eval").mkdir(), (out / "eval" / "a.json").write_text("{}")), "eval/a.json is"),
        (lambda out: (out / ".git").symlink_to("/tmp"), ".git is not of it"),
        (lambda out: (out / "merge.json").unlink(), "there is no merge.json of it"),
        (lambda out: (out / "merge.json").write_text("{"), "merge.json is damaged"),
        (lambda out: (out / "merge.json").rename(out / "export.json"), "there is no merge.json of it"),
        (lambda out: (out / "README.md").write_text("by hand"), "README.md was changed since"),
        (lambda out: (out / "generation_config.json").write_text("{}"), "generation_config.json was changed"),
        (
            lambda out: [(out / name).write_text("{}") for name in ("config.json", "README.md")],
            "README.md, config.json were changed since",
        ),
    ],
)
def test_overwrite_leaves_what_another_hand_wrote(merged, change, message):
    out, again = merged
    change(out)
    before = {path: path.read_bytes() if path.is_file() else None for path in out.rglob("*")}
    with pytest.raises(InputError, match=f"replaces only what 'linchain merge' wrote.*{message}"):
        again(overwrite=True)
    assert {path: path.read_bytes() if path.is_file() else None for path in out.rglob("*")} == before


def test_overwrite_leaves_other_directories(tmp_path, make_run, base_of, capsys):

    run, other = make_run(base_of("llama"), targets=["q_proj"]), make_run(base_of("llama"), name="other")
    people = tmp_path / "people"
    people.mkdir()
    (people / "thesis.tex").write_text("years of work")
    for command in ("merge", "export"):
        for place in (people, other.path):
            assert linchain(command, run.path, "--out", place, "--overwrite") == 2
            assert f"replaces only what 'linchain {command}' wrote" in capsys.readouterr().err
    assert (people / "thesis.tex").read_text() == "years of work"
    assert (other.adapter_dir / "chain.safetensors").exists()


def test_of_two_merges_into_one_output_the_second_to_end_says_so(tmp_path):
    for overwrite in (False, True):
        with pytest.raises(InputError, match="in the meantime|replaces only what"):
            with staged_output(tmp_path / "out", MergeReceipt, overwrite=overwrite) as staging:
                (staging / "mine").write_text("x")
                (tmp_path / "out").mkdir(exist_ok=True)
                (tmp_path / "out" / "theirs").write_text("x")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to_is_told_at_once(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="locked: Permission denied. Choose another --out"):
        check_output(tmp_path / "locked" / "out", MergeReceipt, sources=[])


def test_a_read_only_place_is_told_at_once(tmp_path, monkeypatch):
    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage, "mkdir", read_only)
    with pytest.raises(InputError, match="out cannot be written: .*: Read-only file system. Choose"):
        check_output(tmp_path / "out", MergeReceipt, sources=[])


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
def test_a_disk_that_fails_midway_leaves_what_was_there(tmp_path, merged, monkeypatch, function, code):
    out, again = merged
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    calls = 0
    original = getattr(shards, function)

    def fail(*arguments):
        nonlocal calls
        calls += 1
        if calls == (5 if function == "_copy" else 2):
            raise OSError(code, "it broke")
        return original(*arguments)

    monkeypatch.setattr(shards, function, fail)
    with pytest.raises(LinchainError, match="disk .* is full|could not be written") as error:
        again(overwrite=True)
    assert error.value.exit_code == 1 and calls
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("function", ["_fsync", "rename"])
def test_every_durable_step_may_fail(tmp_path, monkeypatch, function):
    out = tmp_path / "out"
    monkeypatch.setattr(output, "check_replaceable", lambda *_: None)
    for failing in failing_at_each_call(monkeypatch, storage, function):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "old").write_text("old")
        try:
            with staged_output(out, MergeReceipt, overwrite=True) as staging:
                (staging / "new").write_text("new")
        except LinchainError:
            pass
        assert [path.name for path in out.iterdir()] in (["old"], ["new"])
        assert [path.name for path in tmp_path.iterdir()] == ["out"], f"failure {failing} of {function}"


def test_an_overwritten_output_holds_the_new_files_alone(tmp_path, merged):
    out, again = merged
    again(overwrite=True, max_shard_bytes=50_000)
    assert not (out / "model.safetensors").exists() and (out / "model.safetensors.index.json").exists()
    again(overwrite=True)
    assert (out / "model.safetensors").exists() and not (out / "model.safetensors.index.json").exists()
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


def test_leftovers_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path, monkeypatch):
    def made_by(process: int, name: str, prefix: str) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: process)
            (path := storage.beside(tmp_path / name, prefix)).mkdir()
        return path

    dead = dead_process()
    made_by(dead, "out", storage.STAGING_PREFIX)
    (made_by(dead, "out", storage.REPLACED_PREFIX) / "mine").write_text("x")
    living = made_by(os.getppid(), "out", storage.STAGING_PREFIX)
    others = made_by(dead, "other", storage.STAGING_PREFIX)
    with pytest.raises(ZeroDivisionError), staged_output(tmp_path / "out", MergeReceipt, overwrite=True):
        raise ZeroDivisionError
    assert {*tmp_path.iterdir()} == {living, others, tmp_path / "out"}
    assert (tmp_path / "out" / "mine").read_text() == "x", "an output that was only moved aside is put back"
