"""Checkpoints that were damaged, by name; and what a resume takes instead."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.run import RunDirectory
from linchain_cli.training.checkpoints import CheckpointStore

FILES = ["chain.safetensors", "chain.json", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def stopped(run_tiny, recipe_of, dies_after) -> RunDirectory:
    """A run that died in its sixth step, with checkpoints of steps 2 and 4."""
    with dies_after(5):
        run_tiny()
    run = RunDirectory(recipe_of().run_path)
    assert CheckpointStore(run.checkpoints_dir, 2).steps() == [2, 4]
    return run


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(stopped, run_tiny, capsys, name, damage):
    store = CheckpointStore(stopped.checkpoints_dir, 2)
    damaged = store.path(4) / name
    damage(damaged)
    with pytest.raises(InputError, match=str(damaged)):
        store.read(4)
    notes = []
    step, files = store.read_latest(notes.append)
    assert step == 2 and set(files) >= set(FILES) - {"manifest.json"}
    assert (
        len(notes) == 1 and str(damaged) in notes[0] and "falling back to the checkpoint before" in notes[0]
    )


def test_a_resume_falls_back_and_ends_as_it_would_have(stopped, run_tiny, capfd):
    expected = run_tiny({"name": "untouched"})
    flip(stopped.checkpoints_dir / "step-000004" / "optimizer.safetensors")
    job = run_tiny(resume=True)
    printed = capfd.readouterr().err
    assert "optimizer.safetensors is damaged: its SHA-256 is not the manifest's: falling back" in printed
    assert "after step 2 of 6" in printed
    assert (stopped.checkpoints_dir / "damaged-step-000004").is_dir()
    for name in ("chain.safetensors", "chain.json"):
        assert (job.run.adapter_dir / name).read_bytes() == (expected.run.adapter_dir / name).read_bytes()
    assert stopped.rows_path.read_bytes() == expected.run.rows_path.read_bytes()


def test_when_all_are_damaged_nothing_is_trained_over(stopped, run_tiny):
    for step in (2, 4):
        truncate(stopped.checkpoints_dir / f"step-{step:06d}" / "state.json")
    before = stopped.rows_path.read_bytes()
    with pytest.raises(
        InputError, match="no checkpoint below .* can be used: .*step-000004.*step-000002.*--fresh"
    ):
        run_tiny(resume=True)
    assert stopped.rows_path.read_bytes() == before


def test_a_manifest_that_names_files_elsewhere_is_refused(stopped):
    store = CheckpointStore(stopped.checkpoints_dir, 2)
    path = store.path(4) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"]["../step-000002/state.json"] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest.json is missing or damaged"):
        store.read(4)


def test_a_checkpoint_under_another_ones_name_is_refused(stopped):
    store = CheckpointStore(stopped.checkpoints_dir, 2)
    store.path(4).rename(store.path(7))
    with pytest.raises(InputError, match="another checkpoint's"):
        store.read(7)


def test_the_last_ones_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (5, 10, 999_999, 1_000_000):
        store.save(step, {"state.json": b"{}"})
    assert store.steps() == [999_999, 1_000_000]
    assert store.path(1_000_000).name == "step-1000000"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def is_pickle(data: bytes) -> bool:
    try:
        list(pickletools.genops(data))
    except Exception:
        return False
    return True


def test_nothing_is_pickled(run_tiny):
    """Every file is text or safetensors (8 bytes of length, then a JSON header)."""
    assert is_pickle(pickle.dumps({"step": 1}))
    job = run_tiny({"training.max_steps": 2})
    files = [path for path in job.run.path.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert not is_pickle(data)
        if path.suffix == ".safetensors":
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            data.decode()
