"""Weight files read by hand, against the safetensors library."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from linchain_cli.errors import InputError
from linchain_cli.model.checkpoint import companion_files, open_checkpoint, read_header


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(37, 5, generator=generator).bfloat16(),
        "a.weight": torch.randn(6, 7, generator=generator),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


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
