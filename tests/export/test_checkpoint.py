"""Weight files read and written by hand, against the safetensors library."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linchain_cli.errors import InputError, LinchainError
from linchain_cli.export import shards
from linchain_cli.export.checkpoint import companion_files, open_checkpoint, read_header
from linchain_cli.export.shards import NewTensor, plan_shards, write_checkpoint


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


def test_headers_give_every_tensor(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_header(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].shape == tensor.shape and found[key].nbytes == tensor.nbytes
        if tensor.is_floating_point():
            assert torch.equal(found[key].tensor(), tensor)
    assert torch.equal(found["b.weight"].rows(30, 7), tensors["b.weight"][30:])
    blocks = list(found["b.weight"].row_blocks(40))
    assert blocks[0] == (0, 8) and sum(count for _, count in blocks) == 37


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


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"x": Harmful(str(tmp_path / "run"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="code in it is never run"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:4],
        lambda data: (10**12).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"}" + data[9:],
        lambda data: data.replace(b'"shape":[6,7]', b'"shape":[6,8]'),
        lambda data: b"",
    ],
)
def test_damaged_files_are_named(tmp_path, tensors, damage):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        open_checkpoint(tmp_path)


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


def test_companions_are_the_small_files_of_the_model(tmp_path):
    kept = ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
    dropped = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "README.md",
        "modeling.py",
    ]
    for name in [*kept, *dropped, ".gitattributes", "model.gguf", "tf_model.h5"]:
        (tmp_path / name).write_text("x")
    for folder, name in (("onnx", "model.json"), ("additional_chat_templates", "tools.jinja")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("x")
    found = [str(path.relative_to(tmp_path)) for path in companion_files(tmp_path)]
    assert found == [*sorted(kept), "additional_chat_templates/tools.jinja"]


def test_a_full_disk_is_not_mistaken_for_a_missing_ability(tmp_path, monkeypatch, tensors):
    save_file(tensors, tmp_path / "model.safetensors")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(shards.os, "copy_file_range", full, raising=False)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(out, copies(open_checkpoint(tmp_path)), 10**9)
