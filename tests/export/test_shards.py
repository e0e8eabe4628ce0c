"""Weight files written by hand, against the safetensors library."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linchain_cli.errors import LinchainError
from linchain_cli.export import shards
from linchain_cli.export.shards import NewTensor, plan_shards, write_checkpoint
from linchain_cli.model.checkpoint import open_checkpoint, read_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(37, 5, generator=generator).bfloat16(),
        "a.weight": torch.randn(6, 7, generator=generator),
        "half": torch.randn(9, generator=generator).half(),
        "double": torch.randn(2, 3, generator=generator, dtype=torch.float64),
        "mask": torch.tensor([True, False, True]),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def copies(checkpoint) -> list[NewTensor]:
    return [NewTensor(t.key, t.type, t.shape, t.nbytes, t) for t in checkpoint.tensors.values()]


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("limit", [10**9, 300, 1])
def test_copies_are_what_the_library_reads(tmp_path, monkeypatch, tensors, limit, in_kernel):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    save_file(tensors, source / "model.safetensors")
    if not in_kernel:

        def unsupported(*_):
            raise OSError(errno.EXDEV, "not across file systems")

        monkeypatch.setattr(os, "copy_file_range", unsupported, raising=False)
    written = []
    paths = write_checkpoint(target, copies(open_checkpoint(source)), limit, written.append)
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    loaded = {key: value for path in paths for key, value in load_file(path).items()}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    for path in paths:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        for tensor in read_header(path).values():
            size = tensor.nbytes // max(tensor.shape.numel(), 1) or 1
            assert tensor.start % size == 0, "torch cannot map a tensor that starts between its elements"
    if len(paths) > 1:
        index = json.loads((target / "model.safetensors.index.json").read_bytes())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert {path.name for path in paths} == set(index["weight_map"].values())


def test_written_files_follow_the_umask(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(0o022)
    try:
        (path,) = write_checkpoint(out, copies(open_checkpoint(tmp_path)), 10**9)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_shards_keep_the_order_and_the_limit():
    sizes = [5, 4, 3, 20, 1, 1]
    planned = plan_shards(
        [NewTensor(str(i), "U8", torch.Size([n]), n, lambda: []) for i, n in enumerate(sizes)], 9
    )
    assert [[tensor.nbytes for tensor in shard] for shard in planned] == [[5, 4], [3], [20], [1, 1]]


def test_blocks_made_in_threads_arrive_in_order(tmp_path):
    values = torch.arange(1000.0)

    def blocks():
        return ((10, lambda start=start: values[start : start + 10]) for start in range(0, 1000, 10))

    threads = torch.get_num_threads()
    write_checkpoint(tmp_path, [NewTensor("x", "F32", values.shape, values.nbytes, blocks)], 10**9)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], values)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([(4, lambda: torch.zeros(2))], "a block of 8 bytes was made where 16 were announced"),
        ([(2, lambda: torch.zeros(2))], "its blocks have 8 bytes, not 16"),
    ],
)
def test_too_few_bytes_for_a_tensor_are_an_error(tmp_path, blocks, message):
    with pytest.raises(LinchainError, match=message):
        write_checkpoint(tmp_path, [NewTensor("x", "F32", torch.Size([4]), 16, lambda: blocks)], 10**9)


def test_an_error_in_a_thread_is_the_writers_error(tmp_path):
    def fail():
        raise ZeroDivisionError("in a thread")

    blocks = [(1, lambda: torch.zeros(1)), (1, fail), *[(1, lambda: torch.zeros(1))] * 50]
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        write_checkpoint(tmp_path, [NewTensor("x", "F32", torch.Size([52]), 208, lambda: blocks)], 10**9)


def test_pickled_checkpoints_are_read_without_running_code(tmp_path, tensors):
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(out, copies(checkpoint), 10**9)
    loaded = load_file(out / "model.safetensors")
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert torch.equal(checkpoint.tensors["b.weight"].rows(3, 2), tensors["b.weight"][3:5])


def test_a_file_cut_off_while_it_is_read_is_an_error(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(tmp_path)
    last = list(checkpoint.tensors.values())[-1]
    os.truncate(path, last.start)
    with pytest.raises(LinchainError, match="ends within tensor"):
        last.read()
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(LinchainError, match="ends within tensor"):
        write_checkpoint(out, copies(checkpoint), 10**9)


def test_a_full_disk_is_not_mistaken_for_a_missing_ability(tmp_path, monkeypatch, tensors):
    save_file(tensors, tmp_path / "model.safetensors")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(shards.os, "copy_file_range", full, raising=False)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(out, copies(open_checkpoint(tmp_path)), 10**9)
