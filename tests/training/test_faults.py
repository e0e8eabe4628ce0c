"""Disks that fail: an error, a crash or a power cut at every single write, sync, rename and mkdir.

Everything that must survive goes through four functions of linchain_cli/storage.py. `Disk` stands between
them and the real file system, under a directory that plays the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from linchain_cli import storage
from linchain_cli.errors import LinchainError
from linchain_cli.run import RunDirectory, read_jsonl
from linchain_cli.training.checkpoints import CheckpointStore

PRIMITIVES = ("_write", "_fsync", "rename", "mkdir")


class Disk:
    """Counts operations below `root`, makes one of them fail, or takes pictures of what a crash would leave
    behind.

    `crashes`: copies of the tree as they are just before each operation, and within each write, half of it
    done. `power_cuts`: what is certain to be left at those moments: a file has the content of its last sync,
    a directory the entries of its last sync, whatever has been written, renamed or removed since.
    """

    def __init__(self, root: Path, pictures: Path, patch: pytest.MonkeyPatch):
        self.root, self.pictures = root, pictures
        self.operations: list[str] = []
        self.fail_at: int | None = None
        self.error = 0
        self.take_pictures = False
        self.crashes: list[Path] = []
        self.power_cuts: list[Path] = []
        self._synced: dict[int, bytes | dict[str, int]] = {}
        self._held: list[int] = []  # open files, so that no inode number is given to another file
        self._sync_all(root)
        for name in PRIMITIVES:
            patch.setattr(storage, name, self._watched(name, getattr(storage, name)))

    def _watched(self, name: str, original: Callable) -> Callable:
        def run(*args):
            if self.take_pictures:
                self._picture()
            if name == "_write" and (self.take_pictures or len(self.operations) == self.fail_at):
                handle, data = args
                handle.write(data[: len(data) // 2])
                handle.flush()
                if self.take_pictures:
                    self._picture()
                args = (handle, data[len(data) // 2 :])
            self.operations.append(name)
            if len(self.operations) - 1 == self.fail_at:
                # The system names paths, not open files.
                named = [str(args[0])] if isinstance(args[0], Path) else []
                raise OSError(self.error, os.strerror(self.error), *named)
            result = original(*args)
            if name == "_fsync":
                self._sync(args[0])
            return result

        return run

    def _sync(self, descriptor: int) -> None:
        path, inode = Path(f"/proc/self/fd/{descriptor}").resolve(), os.fstat(descriptor).st_ino
        self._held.append(os.dup(descriptor))
        if path.is_dir():
            self._synced[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            for entry in os.scandir(path):
                self._held.append(os.open(entry.path, os.O_RDONLY))
        else:
            self._synced[inode] = path.read_bytes()

    def _sync_all(self, path: Path) -> None:
        for place in (path, *path.rglob("*")):
            descriptor = os.open(place, os.O_RDONLY)
            self._sync(descriptor)
            os.close(descriptor)

    def _picture(self) -> None:
        number = len(self.crashes)
        crash = self.pictures / f"crash-{number}"
        shutil.copytree(self.root, crash)
        self.crashes.append(crash)
        self.power_cuts.append(self.after_power_cut(f"power-{number}"))

    def after_power_cut(self, name: str) -> Path:
        """The tree that a power cut now would leave."""
        target = self.pictures / name
        self._restore(os.stat(self.root).st_ino, target)
        return target

    def _restore(self, inode: int, target: Path) -> None:
        content = self._synced.get(inode, b"")  # a file that was never synced is found empty
        if isinstance(content, bytes):
            target.write_bytes(content)
            return
        target.mkdir(parents=True)
        for name, child in content.items():
            self._restore(child, target / name)

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


@pytest.fixture
def disk_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """disk_at(root): a Disk for everything below that directory."""
    disks = []

    def make(root: Path) -> Disk:
        disks.append(Disk(root, tmp_path / f"pictures-{len(disks)}", monkeypatch))
        disks[-1].pictures.mkdir()
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


def checkpoint(step: int) -> dict[str, bytes]:
    return {
        "chain.safetensors": f"chain of step {step}".encode() * 20,
        "state.json": f'{{"step": {step}}}'.encode(),
    }


def newest(store: CheckpointStore) -> tuple[int, dict[str, bytes]] | None:
    return store.read_latest(lambda message: None)


def run_with_checkpoint(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.create("name: run\n")
    CheckpointStore(run.checkpoints_dir, keep=1).save(1, checkpoint(1))
    return run


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_or_power_cut_at_any_operation_of_a_save_leaves_a_checkpoint(tmp_path, disk_at, keep):
    root = tmp_path / "disk"
    run = run_with_checkpoint(root / "runs" / "a")
    disk = disk_at(root)
    disk.take_pictures = True
    CheckpointStore(run.checkpoints_dir, keep).save(2, checkpoint(2))
    disk.take_pictures = False
    assert len(disk.operations) > 10
    assert disk.operations.count("_write") == 3 and len(disk.crashes) == len(disk.operations) + 3

    seen = set()
    for tree in disk.crashes + disk.power_cuts:
        step, files = newest(CheckpointStore(tree / "runs" / "a" / "checkpoints", keep))
        assert files == checkpoint(step)
        seen.add(step)
    assert seen == {1, 2}
    after = disk.after_power_cut("after")
    assert newest(CheckpointStore(after / "runs" / "a" / "checkpoints", keep)) == (2, checkpoint(2))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_of_a_save_leaves_a_checkpoint_and_no_rubbish(tmp_path, disk_at, error):
    run = run_with_checkpoint(tmp_path / "runs" / "a")
    store = CheckpointStore(run.checkpoints_dir, keep=1)
    disk = disk_at(tmp_path / "runs")
    store.save(2, checkpoint(2))
    total = len(disk.operations)
    step = 2
    for number in range(total):
        disk.operations.clear()
        disk.fail_at, disk.error = number, error
        with pytest.raises(OSError, match=os.strerror(error)):
            store.save(step + 1, checkpoint(step + 1))
        disk.fail_at = None
        found, files = newest(store)
        assert found in (step, step + 1) and files == checkpoint(found)
        assert all(path.name.startswith("step-") for path in run.checkpoints_dir.iterdir())
        step = found
    store.save(step + 1, checkpoint(step + 1))
    assert store.steps() == [step + 1]


def test_a_power_cut_after_a_save_loses_nothing_of_the_run(
    tmp_path, run_tiny, recipe_of, disk_at, monkeypatch
):
    """Neither the checkpoint nor a row that was logged before it, also where a file is quite new."""
    root = tmp_path / "runs"
    root.mkdir()
    disk = disk_at(root)
    changes = {
        "training.max_steps": 3,
        "training.save_every": 1,
        "training.log_every": 2,
        "training.eval_every": 3,
    }
    pictures = []
    save = CheckpointStore.save

    def saved(store, step, files):
        save(store, step, files)
        pictures.append(disk.after_power_cut(f"after-{step}"))

    monkeypatch.setattr(CheckpointStore, "save", saved)
    run_tiny(changes)
    for step, tree in enumerate(pictures, start=1):
        left = RunDirectory(tree / "run")
        assert newest(CheckpointStore(left.checkpoints_dir, 1))[0] == step
        assert left.read_status().status == "running"
        assert [row["step"] for row in read_jsonl(left.rows_path)] == list(range(1, step + 1))
        assert {row["step"] for row in read_jsonl(left.metrics_path)} == {s for s in (2, 3) if s <= step}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_directory_is_a_run_or_not_there(tmp_path, disk_at, fresh):
    """Whatever stops its creation, the next start finds nothing, or a run it may resume or replace."""
    root = tmp_path / "disk"
    (root / "runs").mkdir(parents=True)
    run = RunDirectory(root / "runs" / "a")
    if fresh:
        run.create("name: old\n")
    disk = disk_at(root)
    disk.take_pictures = True
    run.create("name: new\n", replace=fresh)
    for tree in disk.crashes + disk.power_cuts:
        left = RunDirectory(tree / "runs" / "a")
        assert not left.path.exists() or left.read_status().status == "running"
        if left.path.exists():
            assert left.recipe_path.read_text() in ("name: old\n", "name: new\n")
        left.check_free(replace=True)
        left.create("name: again\n", replace=True)
        assert sorted(path.name for path in (tree / "runs").iterdir()) == ["a"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_file_is_old_or_new_whatever_fails(tmp_path, disk_at, error):
    path = tmp_path / "d" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    disk = disk_at(tmp_path / "d")
    storage.write_atomic(path, b"old")
    for number in range(len(disk.operations)):
        disk.operations.clear()
        disk.fail_at, disk.error = number, error
        with pytest.raises(OSError) as caught:
            storage.write_atomic(path, b"a new content")
        assert caught.value.filename, "the message must name the file"
        disk.fail_at = None
        assert path.read_bytes() in (b"old", b"a new content")
        assert [entry.name for entry in path.parent.iterdir()] == ["file"]
        storage.write_atomic(path, b"old")


def test_a_file_is_old_or_new_after_a_crash_or_power_cut(tmp_path, disk_at):
    path = tmp_path / "d" / "file"
    path.parent.mkdir()
    path.write_bytes(b"old")
    disk = disk_at(tmp_path / "d")
    disk.take_pictures = True
    storage.write_atomic(path, b"a new content")
    contents = [(tree / "file").read_bytes() for tree in disk.crashes + disk.power_cuts]
    assert set(contents) == {b"old", b"a new content"}
    assert (disk.after_power_cut("after") / "file").read_bytes() == b"a new content"


def test_the_disk_notices_what_was_not_synced(tmp_path, disk_at):
    """The simulation itself: without a sync, neither content nor name survives a power cut."""
    root = tmp_path / "d"
    root.mkdir()
    disk = disk_at(root)
    (root / "file").write_bytes(b"content")
    assert list(disk.after_power_cut("1").iterdir()) == []
    storage.fsync_directory(root)
    assert (disk.after_power_cut("2") / "file").read_bytes() == b""
    storage.fsync_file(root / "file")
    assert (disk.after_power_cut("3") / "file").read_bytes() == b"content"
    os.replace(root / "file", root / "other")
    assert [path.name for path in disk.after_power_cut("4").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_run_whose_disk_fails_says_so_and_resumes_to_the_same_end(
    run_tiny, recipe_of, disk_at, tmp_path, error
):
    """The whole of a run's writing, each tenth operation failing once; what is there then is continued."""
    changes = {"training.max_steps": 4, "training.save_every": 1, "adapter.dropout": 0.1}
    whole = run_tiny({**changes, "name": "whole"})
    expected = (whole.run.adapter_dir / "chain.safetensors").read_bytes()
    disk = disk_at(tmp_path / "runs")
    run_tiny({**changes, "name": "counted"})
    total = len(disk.operations)
    for number in range(3, total, total // 8):
        name = f"failing-{number}"
        run = RunDirectory(recipe_of({"name": name}).run_path)
        disk.operations.clear()
        disk.fail_at, disk.error = number, error
        with pytest.raises((LinchainError, OSError), match=os.strerror(error)):
            run_tiny({**changes, "name": name})
        disk.fail_at = None
        if run.exists():
            assert run.read_status().status in ("failed", "running")
        assert run_tiny({**changes, "name": name}, resume=True) is not None
        assert (run.adapter_dir / "chain.safetensors").read_bytes() == expected
        assert run.rows_path.read_bytes() == whole.run.rows_path.read_bytes()
