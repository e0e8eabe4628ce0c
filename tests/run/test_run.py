"""The run directory: status, lock, which run is meant, and the JSON-lines files."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linchain_cli.errors import InputError, LinchainError
from linchain_cli.run import (
    RunDirectory,
    append_jsonl,
    cut_jsonl,
    find_adapter,
    find_run,
    in_use,
    is_run,
    newest_finished_run,
    read_jsonl,
)


def finished(path: Path, at: str, **fields) -> RunDirectory:
    run = RunDirectory(path)
    run.create("name: x\n")
    run.update_status(status="finished", finished_at=at, **fields)
    return run


def test_a_new_run_is_running_and_holds_its_recipe(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a")
    assert not run.exists() and not is_run(run.path)
    run.create("name: a\n")
    assert run.exists() and is_run(run.path)
    assert run.recipe_path.read_text() == "name: a\n"
    status = run.read_status()
    assert status.status == "running" and status.name == "a" and status.created_at.endswith("+00:00")
    run.update_status(step=3)
    assert run.read_status() == dataclasses.replace(status, step=3)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"step": 1}', b"\xff\xfe", b'{"status": "done"}'),
        *(b'{"status": "finished", "step": "4"}', b'{"status": "finished", "base": {}}', b"[" * 100_000),
    ],
)
def test_a_damaged_status_is_named(tmp_path, content):
    run = RunDirectory(tmp_path / "a")
    run.create("name: a\n")
    run.status_path.write_bytes(content)
    with pytest.raises(InputError, match="run.json"):
        run.read_status()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("finished", "holds a finished run. Use --fresh to replace it, or another name"),
        ("stopped", "holds a run that was stopped. Use --resume to continue it or --fresh to start over"),
        ("failed", "holds a run that failed. Use --resume"),
        ("running", "holds a run that was killed. Use --resume"),
    ],
)
def test_an_existing_run_is_refused_with_the_way_on(tmp_path, status, message):
    run = finished(tmp_path / "a", "2026-01-01")
    run.update_status(status=status)
    with pytest.raises(InputError, match=message):
        run.check_free()
    with pytest.raises(InputError, match=message):
        run.create("name: b\n")
    run.create("name: b\n", replace=True)
    assert run.recipe_path.read_text() == "name: b\n"


def test_a_run_that_is_going_on_is_said_to_be(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.create("name: a\n")
    with (
        run.lock(),
        pytest.raises(
            InputError, match=r"in use by another linchain process \(\d+ on .*\); wait for it or stop it"
        ),
    ):
        run.check_free()


def test_a_comparison_of_that_name_is_told(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "comparison.json").write_text("{}")
    for replace in (False, True):
        with pytest.raises(InputError, match="holds a comparison, not a run: .* another name \\(name=NEW\\)"):
            RunDirectory(tmp_path / "c").check_free(replace=replace)


def test_files_that_are_no_run_are_never_touched(tmp_path):
    for place in ("file", "directory"):
        path = tmp_path / place
        if place == "file":
            path.write_text("mine")
        else:
            path.mkdir()
            (path / "mine").write_text("mine")
        for replace in (False, True):
            with pytest.raises(InputError, match="is not a run directory; it is left alone"):
                RunDirectory(path).create("name: a\n", replace=replace)
    assert (tmp_path / "file").read_text() == (tmp_path / "directory" / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    RunDirectory(tmp_path / "empty").create("name: a\n")
    assert RunDirectory(tmp_path / "empty").exists()


def test_what_killed_starts_left_beside_a_run_goes_and_other_runs_stay(tmp_path):
    leftovers = [".removed-a-0123abcd-77-0123abcd", ".staging-a-0123abcd-77-0123abcd"]
    others = [".staging-a-b-0123abcd-77-0123abcd", ".staging-b-0123abcd-5-0123abcd", ".staging-a", "a-1"]
    for name in leftovers + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    RunDirectory(tmp_path / "a").create("name: a\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "a"])


def test_a_run_that_a_killed_replacement_had_moved_aside_is_not_replaced_unasked(tmp_path):
    RunDirectory(tmp_path / "a").create("name: old\n")
    (tmp_path / "a").rename(tmp_path / ".replaced-a-0123abcd-77-0123abcd")
    with pytest.raises(InputError, match="holds a run that was killed"):
        RunDirectory(tmp_path / "a").create("name: new\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "name: old\n"
    RunDirectory(tmp_path / "a").create("name: new\n", replace=True)
    assert (tmp_path / "a" / "recipe.yaml").read_text() == "name: new\n"


def test_files_of_the_user_in_a_run_are_not_replaced_with_it(tmp_path):
    run = RunDirectory(tmp_path / "a")
    run.create("name: old\n")
    for name in ("adapter", "merged", "peft-step-000200", "eval", "inspect.json", ".x.lock", "report.html"):
        (run.path / name).touch()
    run.create("name: new\n", replace=True)
    (run.path / "notes.md").write_text("mine")
    (run.path / "merged-mine").mkdir()
    with pytest.raises(InputError, match=r"also holds merged-mine, notes.md, which linchain did not write"):
        run.create("name: newest\n", replace=True)
    assert (run.path / "notes.md").read_text() == "mine" and run.recipe_path.read_text() == "name: new\n"


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from linchain_cli.run import RunDirectory
with RunDirectory({path!r}).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process_however_that_ends(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "a")
    code = HOLDER.format(root=str(Path(__file__).resolve().parents[2]), path=str(run.path))
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    assert in_use(run.path)
    with pytest.raises(InputError, match="in use"), run.lock():
        pass
    holder.kill()
    holder.wait()
    assert not in_use(run.path)
    with run.lock():
        assert in_use(run.path)
    assert not in_use(run.path)


def test_the_lock_outlives_a_replaced_directory(tmp_path):
    run = RunDirectory(tmp_path / "a")
    with run.lock():
        run.create("name: a\n")
        run.create("name: a\n", replace=True)
        with open(tmp_path / ".a.lock") as handle, pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_behind_a_link_stays_there(tmp_path):
    """The link leads to a bigger disk: a first run goes there, and --fresh replaces what is there."""
    big, runs = tmp_path / "big", tmp_path / "runs"
    runs.mkdir()
    (runs / "a").symlink_to(big / "a")
    for text in ("first", "second"):
        run = RunDirectory(runs / "a")
        with run.lock():
            run.create(f"name: {text}\n", replace=True)
        assert (big / "a" / "recipe.yaml").read_text() == f"name: {text}\n"
        assert (runs / "a").is_symlink() and os.listdir(runs) == ["a"]
        assert sorted(os.listdir(big)) == [".a.lock", "a"]
    with run.lock():
        assert in_use(big / "a"), "by whatever name"


def test_an_output_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="file cannot be written to .*; choose another output_dir"):
        with RunDirectory(tmp_path / "file" / "a").lock():
            pass


def test_the_newest_finished_run_is_no_arm_of_a_comparison(tmp_path, caplog):
    with pytest.raises(InputError, match="no finished run below .*: name a run directory, or train one"):
        newest_finished_run(tmp_path / "runs")
    runs = tmp_path / "runs"
    finished(runs / "old", "2026-01-01T00:00:00")
    newest = finished(runs / "new", "2026-01-02T00:00:00")
    finished(runs / "arm", "2026-01-03T00:00:00", comparison="depths")
    stopped = finished(runs / "stopped", "2026-01-04T00:00:00")
    stopped.update_status(status="stopped")
    finished(runs / "damaged", "2026-01-05T00:00:00").status_path.write_text("{")
    unknown = finished(runs / "unknown", "2026-01-06")
    unknown.update_status(finished_at=None, created_at=None)
    finished(runs / ".replaced-new-0123abcd-77-0123abcd", "2026-01-07T00:00:00")
    later = finished(runs / "later", "2026-01-08T00:00:00")
    later.status_path.write_text('{"format": "linchain run", "format_version": 99, "status": "finished"}')
    (runs / "directory").mkdir()
    (runs / "file").touch()
    assert newest_finished_run(runs).path == newest.path
    assert {record.args[0].args[0].split()[0] for record in caplog.records} == {
        str(runs / "damaged" / "run.json"),
        str(runs / "later" / "run.json"),
    }


def test_find_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished(Path("runs") / "llama", "2026-01-01")
    assert find_run("runs/llama").path == run.path == find_run(None).path
    with pytest.raises(
        InputError, match=r"runs/lama is not a run directory: it has no run.json. Did you mean 'llama'\?"
    ):
        find_run("runs/lama")
    with pytest.raises(InputError, match=r"Did you mean 'runs/llama'\?"):
        find_run("llama")
    run.update_status(status="stopped")
    assert find_run("runs/llama").path == run.path


def keep(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "chain.json").write_text("{}")
    return directory


def test_the_adapter_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished(Path("runs") / "llama", "2026-01-01")
    with pytest.raises(InputError, match="runs/llama is finished, but its adapter is gone"):
        find_adapter("runs/llama")
    keep(run.adapter_dir)
    early, late = (keep(run.checkpoints_dir / f"step-{step:06d}") for step in (200, 1000))
    for name in ("runs/llama", "runs/llama/", "runs/llama/adapter", None):
        found = find_adapter(name)
        assert (found.adapter_dir, found.step, found.name) == (run.adapter_dir, None, "runs/llama")
        assert found.place("merged") == Path("runs/llama/merged") and not found.note
    named = find_adapter("runs/llama/checkpoints/step-000200")
    assert (named.run.path, named.adapter_dir, named.step) == (run.path, early, 200)
    assert named.name == "runs/llama/checkpoints/step-000200" and not named.note
    assert named.place("merged") == Path("runs/llama/merged-step-000200")
    for status, said in (("stopped", "was stopped"), ("failed", "failed"), ("running", "was killed")):
        run.update_status(status=status)
        newest = find_adapter("runs/llama")
        assert (newest.adapter_dir, newest.step) == (late, 1000)
        assert newest.note == f"runs/llama {said}: taking its newest checkpoint, step-001000"
    with run.lock():
        assert "is going on" in find_adapter("runs/llama").note
    monkeypatch.chdir(early)
    assert find_adapter(".").step == 200


def test_without_an_adapter_there_is_a_way_on(tmp_path):
    run = finished(tmp_path / "a", "2026-01-01")
    run.update_status(status="stopped")
    with pytest.raises(
        InputError, match="was stopped and has no checkpoint yet: continue it with .*--resume"
    ):
        find_adapter(run.path)
    with pytest.raises(InputError, match="is an adapter apart from its run"):
        find_adapter(keep(tmp_path / "elsewhere" / "step-000200"))


def test_rows_go_through_their_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_jsonl(path) == []
    rows = [{"step": 1, "text": "naïve\nline"}, {"step": 2, "rows": [1, 2]}]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    with pytest.raises(ValueError):
        append_jsonl(path, {"loss": float("nan")})
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    "damage", [b'{"step": 3, "ro', b"\x00\x00\x00\x00\n", b'{"step": 3\n', b"[3]\n", b"\xff\xfe\n"]
)
def test_damaged_rows_and_those_behind_them_are_dropped(tmp_path, damage):
    path = tmp_path / "rows.jsonl"
    for step in (1, 2):
        append_jsonl(path, {"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    cut_jsonl(path, 9)
    assert path.read_bytes() == whole
    cut_jsonl(path, 1)
    assert read_jsonl(path) == [{"step": 1}]
    cut_jsonl(tmp_path / "missing.jsonl", 1)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_status_is_never_seen_half_written(tmp_path):
    """One process writes without pause, this one reads."""
    run = RunDirectory(tmp_path / "a")
    run.create("name: a\n")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\n"
        "from linchain_cli.run import RunDirectory\n"
        f"run = RunDirectory({str(run.path)!r})\n"
        "for step in range(200): run.update_status(status='running', step=step, reason='x' * 5000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code])
    reads = 0
    while writer.poll() is None:
        assert run.read_status().status == "running"
        reads += 1
        time.sleep(0.001)
    assert writer.returncode == 0 and reads > 3
    assert run.read_status().step == 199


def test_a_run_that_another_machine_has_removed_from_a_share_is_gone(tmp_path, monkeypatch):
    def stale(descriptor):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    run = RunDirectory(tmp_path / "a")
    run.create("name: a\n")
    with run.watched():
        run.check_there()
        shutil.rmtree(run.path)
        RunDirectory(run.path).create("name: other\n")
        monkeypatch.setattr(os, "fstat", stale)
        with pytest.raises(LinchainError, match="was removed while the run was going on"):
            run.check_there()
        monkeypatch.undo()
    run.check_there()  # of no run that goes on
