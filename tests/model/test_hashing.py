"""The hash that tells bases apart: by their tensors, in whatever files; kept for as long as a file stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from linchain_cli import console
from linchain_cli.errors import InputError
from linchain_cli.model import hashing
from linchain_cli.model.hashing import base_hash, refuse_other_base
from linchain_cli.storage import sha256_file


@pytest.fixture
def checkpoint(tmp_path, tiny_llama_dir) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


@pytest.fixture(autouse=True)
def reads(monkeypatch, tmp_path) -> list[str]:
    """A cache of the test's own; the names of the weight files that are read."""
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    read, names = hashing._read_and_hash, []
    monkeypatch.setattr(hashing, "_read_and_hash", lambda path: names.append(path.name) or read(path))
    return names


@pytest.fixture
def old_files(monkeypatch):
    """Lets all files count as settled: a change of one's times is itself a change."""
    monkeypatch.setattr("linchain_cli.cache.SETTLED_AFTER", -1.0)


def test_the_same_tensors_in_other_files_are_the_same_base(checkpoint, tmp_path, tiny_tied_dir):
    expected = base_hash(checkpoint)
    assert expected.startswith("tensors:") and len(expected) == 8 + 64
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert base_hash(tmp_path / "sharded") == expected
    tensors = load_file(checkpoint / "model.safetensors")
    (tmp_path / "pickled").mkdir()
    torch.save(dict(reversed(tensors.items())), tmp_path / "pickled" / "pytorch_model.bin")
    assert base_hash(tmp_path / "pickled") == expected
    (checkpoint / "generation_config.json").write_text("{}")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt", "made": "elsewhere"})
    assert base_hash(checkpoint) == expected != base_hash(tiny_tied_dir)


def test_every_part_of_a_tensor_counts(checkpoint):
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights)
    name = "model.norm.weight"
    found = {base_hash(checkpoint)}
    value = tensors[name]
    flipped = value.clone()
    flipped.view(torch.int32)[-1] ^= 1
    for other in (
        {name: flipped},
        {name: value.view(1, -1)},
        {name: value.view(torch.int32)},
        {"model.norm.scale": value},
        {},
    ):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file({**rest, **other}, weights)
        found.add(base_hash(checkpoint))
    assert len(found) == 6


def test_a_file_is_read_once_until_it_changes(checkpoint, reads, old_files):
    first = base_hash(checkpoint)
    assert base_hash(checkpoint) == first and reads == ["model.safetensors"]
    weights = checkpoint / "model.safetensors"
    data, times = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps its times would
    assert base_hash(checkpoint) != first and len(reads) == 2


def test_a_file_that_was_just_written_is_read_again(checkpoint, reads):
    base_hash(checkpoint), base_hash(checkpoint)
    assert len(reads) == 2


def test_the_hubs_name_for_a_file_stands_for_its_content(checkpoint, tmp_path, reads, old_files):
    weights = checkpoint / "model.safetensors"
    content = sha256_file(weights)
    for cache in ("one", "two"):
        (blobs := tmp_path / cache / "blobs").mkdir(parents=True)
        (snapshot := tmp_path / cache / "snapshots" / "0123").mkdir(parents=True)
        shutil.copy(weights, blobs / content)
        (snapshot / weights.name).symlink_to(blobs / content)
        base_hash(snapshot)
    assert reads == [weights.name]


def test_without_a_cache_it_is_read_every_time(checkpoint, tmp_path, monkeypatch, reads, old_files):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "file"))
    assert base_hash(checkpoint) == base_hash(checkpoint) and len(reads) == 2


def test_a_damaged_cache_is_made_anew(checkpoint, tmp_path, reads, old_files):
    expected = base_hash(checkpoint)
    (entry,) = (tmp_path / "cache" / "hashes").glob("*.json")
    entry.write_text("{")
    assert base_hash(checkpoint) == expected == base_hash(checkpoint) and len(reads) == 2


def test_another_base_is_refused_unless_it_is_allowed(checkpoint, tiny_tied_dir):
    wanted = base_hash(checkpoint)
    with pytest.raises(InputError, match="trained on other weights than .*--base MODEL.*--allow-other-base"):
        refuse_other_base(tiny_tied_dir, wanted, "runs/a")
    assert refuse_other_base(tiny_tied_dir, wanted, "runs/a", allow=True) == base_hash(tiny_tied_dir)
    assert refuse_other_base(tiny_tied_dir, None, "runs/a") == base_hash(tiny_tied_dir)


def test_a_damaged_weight_file_is_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        base_hash(checkpoint)


def test_a_large_base_is_told_about_while_it_is_read(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0)
    base_hash(checkpoint)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21 and lines[0].startswith("reading the base's weights (model.safetensors): 0 MB")
